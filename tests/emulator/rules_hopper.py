"""Barriers in shared memory, bulk copies, and small things of sm_90."""

import re

from emulator.parse import Address, PtxError, Symbol, Vector
from emulator.rules import rule
from emulator.rules_memory import shared_place
from emulator.together import Collective

SCOPES = "cta cluster relaxed acquire release"
SHARED = "shared shared::cta"
ANY_BLOCK = f"{SHARED} shared::cluster"


def _barrier(c, i, address: Address) -> str:
    kind = "Write" if {"init", "inval"}.intersection(i.modifiers) else "Update"
    return f"{c.site(i)}, {shared_place(c, i, address, 8, kind)}"


def _is_relaxed(i) -> str:
    return str("relaxed" in i.modifiers).lower()


@rule("mbarrier", "b64", f"init inval {SHARED}")
def mbarrier(c, i):
    address, *count = i.operands
    numbers = "".join(f", {c.value(n, 'u32')}" for n in count)
    return f"mbarrier_{i.modifiers[0]}({_barrier(c, i, address)}{numbers});"


@rule("mbarrier", "b64", f"arrive expect_tx {SCOPES} {ANY_BLOCK}", "arrive")
def arrive(c, i):
    """Another block's phase isn't known here."""
    target, address, *number = i.operands
    if "shared::cluster" in i.modifiers and target != Symbol("_"):
        raise PtxError(f"{i.source}: no rule for the instruction `{i.text}`")
    number = c.value(number[0], "u32") if number else "1"
    counts = f"1, {number}" if "expect_tx" in i.modifiers else f"{number}, 0"
    arguments = f"{_barrier(c, i, address)}, {counts}, {_is_relaxed(i)}"
    return c.assign(target, "u64", f"mbarrier_arrive({arguments})")


@rule("mbarrier", "b64", f"expect_tx complete_tx {SCOPES} {ANY_BLOCK}")
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
    arguments = f"{_barrier(c, i, address)}, {value}, {_is_relaxed(i)}"
    return c.assign(target, "pred", f"mbarrier_{name}{'_parity' * parity}({arguments})")


BULK = "async bulk global shared::cta shared::cluster multicast::cluster L2::cache_hint"
TENSOR = f"{BULK} tensor tile 1d 2d 3d 4d 5d"
TO_BARRIER = "mbarrier::complete_tx::bytes"


LOADS = [("shared::cluster", "global"), ("shared::cta", "global")]
STORE = ("global", "shared::cta")
SEND = ("shared::cluster", "shared::cta")


def _way(i) -> tuple[str, ...]:
    """The spaces that a copy goes to and comes from; all loads are one, the first."""
    way = tuple(m for m in i.modifiers if m in ("global", "shared::cta", "shared::cluster"))
    known = [STORE] if "bulk_group" in i.modifiers else [*LOADS, SEND]
    is_multicast = "multicast::cluster" in i.modifiers
    if way not in known or (is_multicast and way != LOADS[0]):
        raise PtxError(f"{i.source}: no rule for the instruction `{i.text}`")
    return LOADS[0] if way in LOADS else way


def shared_address(c, i, address: Address) -> str:
    """Another block's too, where the instruction says shared::cluster."""
    text = f"{c.value(address.base, 'u32')} + {address.offset}"
    return text if "shared::cluster" in i.modifiers else f"check_own({c.site(i)}, {text})"


def _address(c, address: Address) -> str:
    return f"{c.value(address.base, 'u64')} + {address.offset}"


def _target(c, i, barrier: Address, others: list) -> str:
    """Where a load is counted; the blocks that get it."""
    mask = c.value(others[0], "u16") if "multicast::cluster" in i.modifiers else "kNoMulticast"
    return f"{shared_address(c, i, barrier)}, {mask}"


@rule("cp", "", f"{BULK} {TO_BARRIER} bulk_group", "bulk")
def bulk_copy(c, i):
    to, source, size, *others = i.operands
    site, size, way = c.site(i), c.value(size, "u32"), _way(i)
    if way == STORE:
        return f"bulk_store({site}, {_address(c, to)}, {shared_address(c, i, source)}, {size});"
    to = shared_address(c, i, to)
    if way == SEND:
        places = f"{to}, {shared_address(c, i, source)}, {size}, {shared_address(c, i, others[0])}"
        return f"bulk_send({site}, {places});"
    places = f"{to}, {_address(c, source)}, {size}, {_target(c, i, others[0], others[1:])}"
    return f"bulk_load({site}, {places});"


@rule("cp", "", f"{TENSOR} {TO_BARRIER} bulk_group", "tensor")
def tensor_copy(c, i):
    rank = int(re.search(r"\.(\d)d\.", i.text)[1])
    to, source, *others = i.operands
    is_load = _way(i) == LOADS[0]
    tensor = source if is_load else to
    coordinates = ", ".join(c.value(x, "s32") for x in tensor.coordinates)
    if len(tensor.coordinates) != rank or _way(i) == SEND:
        raise PtxError(f"{i.source}: no rule for the instruction `{i.text}`")
    box = f"{_address(c, tensor)}, {rank}, Coordinates{{{{{coordinates}}}}}"
    if is_load:
        target = _target(c, i, others[0], others[1:])
        return f"tensor_load({c.site(i)}, {shared_address(c, i, to)}, {box}, {target});"
    return f"tensor_store({c.site(i)}, {box}, {shared_address(c, i, source)});"


@rule("cp", "", "async bulk commit_group", "bulk")
def commit(c, i):
    return "commit_bulk_group();"


@rule("cp", "", "async bulk wait_group read", "bulk")
def wait_for_groups(c, i):
    return f"wait_for_bulk_groups({c.value(i.operands[0], 'u32')});"


@rule(
    "fence",
    "",
    "proxy async async::generic async.shared::cta shared::cta shared::cluster global",
    "proxy",
)
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
