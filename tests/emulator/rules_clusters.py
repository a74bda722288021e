"""What blocks of a cluster do together: addresses, their barrier, values for one another."""

from emulator.parse import SIZES, PtxError, Vector
from emulator.rules import C_TYPES, rule
from emulator.rules_hopper import TO_BARRIER, shared_address
from emulator.rules_memory import OPERATIONS


@rule("mapa", "u32", "shared::cluster")
@rule("mapa", "u64")
def map_address(c, i):
    """Of a generic address, a generic one."""
    target, address, rank = i.operands
    value = c.value(address, i.type)
    is_generic = i.type == "u64"
    mapped = f"map_shared({c.site(i)}, {f'to_shared({value})' if is_generic else value}, "
    mapped += f"{c.value(rank, 'u32')})"
    return c.assign(target, i.type, f"to_generic({mapped})" if is_generic else mapped)


@rule("getctarank", "u32", "shared::cluster")
@rule("getctarank", "u64")
def rank_of_address(c, i):
    target, address = i.operands
    value = c.value(address, i.type)
    value = f"to_shared({value})" if i.type == "u64" else value
    return c.assign(target, "u32", f"rank_of({value})")


@rule("isspacep", "", "shared shared::cta shared::cluster")
def is_in_space(c, i):
    target, address = i.operands
    value = c.value(address, "u64")
    name = "is_in_cluster" if i.type == "shared::cluster" else "is_in_block"
    return c.assign(target, "pred", f"{name}({value})")


@rule("barrier", "", "cluster arrive release relaxed aligned", "cluster arrive")
def arrive(c, i):
    kinds = (str(m in i.modifiers).lower() for m in ("relaxed", "aligned"))
    return f"cluster_arrive({c.site(i)}, {', '.join(kinds)});"


@rule("barrier", "", "cluster wait acquire aligned", "cluster wait")
def wait(c, i):
    return f"cluster_wait({c.site(i)});"


@rule(
    "st",
    "b32 b64 u32 u64 s32 s64 f32 f64",
    f"async weak shared::cluster {TO_BARRIER} v2 v4",
    f"async shared::cluster {TO_BARRIER}",
)
def store(c, i):
    to, value, barrier = i.operands
    items = value.items if isinstance(value, Vector) else (value,)
    if len(items) * SIZES[i.type] > 16:
        raise PtxError(f"{i.source}: no rule for the instruction `{i.text}`")
    values = ", ".join(c.value(item, i.type) for item in items)
    places = f"{shared_address(c, i, to)}, values_, sizeof values_, {shared_address(c, i, barrier)}"
    return f"{C_TYPES[i.type]} values_[] = {{{values}}}; store_async({c.site(i)}, {places});"


@rule(
    "red",
    "b32 u32 s32 u64",
    f"async relaxed cluster shared::cluster {TO_BARRIER} add min max and or xor inc dec",
    f"async shared::cluster {TO_BARRIER}",
)
def reduce(c, i):
    to, value, barrier = i.operands
    operation = next(m for m in i.modifiers if m in OPERATIONS)
    if i.type not in REDUCTIONS[operation].split():
        raise PtxError(f"{i.source}: no rule for the instruction `{i.text}`")
    kind = C_TYPES[i.type]
    new = OPERATIONS[operation].format("old_", f"({kind})value", type=kind)
    update = (
        f"[](unsigned char* p, uint64_t value) {{ {kind} old_ = load<{kind}>(p); "
        f"store<{kind}>(p, {new}); }}"
    )
    size, barrier = SIZES[i.type], shared_address(c, i, barrier)
    values = f"{update}, {c.value(value, i.type)}, {size}, {barrier}"
    return f"reduce_async({c.site(i)}, {shared_address(c, i, to)}, {values});"


REDUCTIONS = {"add": "u32 s32 u64"}
REDUCTIONS |= dict.fromkeys(("min", "max"), "u32 s32")
REDUCTIONS |= dict.fromkeys(("inc", "dec"), "u32")
REDUCTIONS |= dict.fromkeys(("and", "or", "xor"), "b32")
