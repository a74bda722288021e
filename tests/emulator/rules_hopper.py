"""Barriers in shared memory, bulk copies, and small things of sm_90."""

import re

from emulator.parse import Address, PtxError, Symbol, Vector
from emulator.rules import rule
from emulator.rules_memory import shared_offset
from emulator.together import Collective

SCOPES = "cta cluster relaxed acquire release"
SHARED = "shared shared::cta"


def _barrier(c, i, address: Address) -> str:
    kind = "Write" if {"init", "inval"}.intersection(i.modifiers) else "Update"
    return f"{c.site(i)}, {shared_offset(c, i, address, 8, kind)}"


@rule("mbarrier", "b64", f"init inval {SHARED}")
def mbarrier(c, i):
    address, *count = i.operands
    numbers = "".join(f", {c.value(n, 'u32')}" for n in count)
    return f"mbarrier_{i.modifiers[0]}({_barrier(c, i, address)}{numbers});"


@rule("mbarrier", "b64", f"arrive expect_tx {SCOPES} {SHARED}", "arrive")
def arrive(c, i):
    target, address, *number = i.operands
    number = c.value(number[0], "u32") if number else "1"
    counts = f"1, {number}" if "expect_tx" in i.modifiers else f"{number}, 0"
    return c.assign(target, "u64", f"mbarrier_arrive({_barrier(c, i, address)}, {counts})")


@rule("mbarrier", "b64", f"expect_tx complete_tx {SCOPES} {SHARED}")
def count_bytes(c, i):
    name = i.modifiers[0].removesuffix("_tx")
    address, number = i.operands
    return f"mbarrier_{name}({_barrier(c, i, address)}, {c.value(number, 'u32')});"


@rule("mbarrier", "b64", f"test_wait try_wait parity {SCOPES} {SHARED}")
def wait(c, i):
    """How long try_wait may take is a hint."""
    target, address, phase, *_ = i.operands
    name = i.modifiers[0].removesuffix("_wait")
    parity = "parity" in i.modifiers
    value = c.value(phase, "u32" if parity else "u64")
    call = f"mbarrier_{name}{'_parity' * parity}({_barrier(c, i, address)}, {value})"
    return c.assign(target, "pred", call)


BULK = "async bulk global shared::cta shared::cluster L2::cache_hint"
TENSOR = f"{BULK} tensor tile 1d 2d 3d 4d 5d"
TO_BARRIER = "mbarrier::complete_tx::bytes"


def _is_load(i) -> bool:
    """Into shared memory."""
    spaces = [m.split("::")[0] for m in i.modifiers if m.split("::")[0] in ("global", "shared")]
    if sorted(spaces) != ["global", "shared"]:
        raise PtxError(f"{i.source}: no rule for the instruction `{i.text}`")
    return spaces[0] == "shared"


def _offset(c, address: Address) -> str:
    return f"{c.value(address.base, 'u32')} + {address.offset}"


def _address(c, address: Address) -> str:
    return f"{c.value(address.base, 'u64')} + {address.offset}"


@rule("cp", "", f"{BULK} {TO_BARRIER} bulk_group", "bulk")
def bulk_copy(c, i):
    to, source, size, *barrier = i.operands
    site, size = c.site(i), c.value(size, "u32")
    if _is_load(i):
        places = f"{_offset(c, to)}, {_address(c, source)}, {size}, {_offset(c, barrier[0])}"
        return f"bulk_load({site}, {places});"
    return f"bulk_store({site}, {_address(c, to)}, {_offset(c, source)}, {size});"


@rule("cp", "", f"{TENSOR} {TO_BARRIER} bulk_group", "tensor")
def tensor_copy(c, i):
    rank = int(re.search(r"\.(\d)d\.", i.text)[1])
    to, source, *barrier = i.operands
    tensor = source if _is_load(i) else to
    coordinates = ", ".join(c.value(x, "s32") for x in tensor.coordinates)
    if len(tensor.coordinates) != rank:
        raise PtxError(f"{i.source}: no rule for the instruction `{i.text}`")
    box = f"{_address(c, tensor)}, {rank}, Coordinates{{{{{coordinates}}}}}"
    if _is_load(i):
        return f"tensor_load({c.site(i)}, {_offset(c, to)}, {box}, {_offset(c, barrier[0])});"
    return f"tensor_store({c.site(i)}, {box}, {_offset(c, source)});"


@rule("cp", "", "async bulk commit_group", "bulk")
def commit(c, i):
    return "commit_bulk_group();"


@rule("cp", "", "async bulk wait_group read", "bulk")
def wait_for_groups(c, i):
    return f"wait_for_bulk_groups({c.value(i.operands[0], 'u32')});"


@rule("fence", "", "proxy async async::generic async.shared::cta shared::cta global", "proxy")
def fence_proxy(c, i):
    return "proxy_fence();"


@rule("fence", "", "mbarrier_init release cluster", "mbarrier_init")
def fence_init(c, i):
    """Initialisation is one of the accesses that fences and barriers order."""
    return "fence();"


@rule("prefetch", "", "tensormap param const")
@rule("griddepcontrol", "", "launch_dependents wait")
def nothing(c, i):
    """Launches run one after another."""
    return ""


@rule("setmaxnreg", "u32", "inc dec sync aligned")
def set_registers(c, i):
    """A hint here, since there are registers enough."""
    number = i.operands[0].number
    if number % 8 or not 24 <= number <= 256:
        raise PtxError(f"{i.source}: no rule for {number} registers")
    return ""


@rule("elect", "", "sync", is_collective=True)
def elect(c, i):
    """The first of the lanes that are there."""
    target, mask = i.operands
    leader, is_leader = target.items if isinstance(target, Vector) else (target, Symbol("_"))
    results = ((leader, "b32"), (is_leader, "pred"))
    inputs = (c.value(mask, "u32"),)
    return Collective("elect", inputs, results, c.value(mask, "u32"))
