"""Asynchronous copies, and the matrices of a warp."""

from emulator.parse import Immediate, PtxError
from emulator.rules import rule
from emulator.rules_memory import shared_offset
from emulator.together import Collective


@rule("cp", "", "async ca cg shared shared::cta global L2::64B L2::128B L2::256B")
def copy_async(c, i):
    """Of `size` bytes, those from the fourth operand on are 0 and aren't read."""
    to, source, size, *size_read = i.operands
    if not isinstance(size, Immediate) or size.number not in (4, 8, 16):
        raise PtxError(f"{i.source}: no rule for a copy of {size}")
    n, site = size.number, c.site(i)
    count = c.value(size_read[0], "u32") if size_read else n
    to = f"{c.value(to.base, 'u32')} + {to.offset}"
    source = f"{c.value(source.base, 'u64')} + {source.offset}"
    return (
        f"uint32_t n_ = {count}; auto* from_ = partial_global_pointer<{n}>({site}, {source}, n_); "
        f"copy_async({site}, shared_pointer<Write, {n}>({c.site(i)}, {to}), from_, {n}, n_);"
    )


@rule("cp", "", "async commit_group")
def commit(c, i):
    return "commit_copies();"


@rule("cp", "", "async wait_group wait_all")
def wait(c, i):
    if "wait_all" in i.modifiers:
        return "commit_copies(); wait_for_copies(0);"
    return f"wait_for_copies({c.value(i.operands[0], 'u32')});"


# The types of D, A, B and C -> how registers hold A and B, and how many elements one has.
PRODUCTS = {
    ("f32", "f16", "f16", "f32"): ("F16", 2),
    ("f32", "bf16", "bf16", "f32"): ("Bf16", 2),
    ("f32", "tf32", "tf32", "f32"): ("Tf32", 1),
    ("s32", "s8", "s8", "s32"): ("S8", 4),
}
SHAPES = "m16n8k4 m16n8k8 m16n8k16 m16n8k32"


@rule(
    "mma",
    "",
    f"sync aligned {SHAPES} row col satfinite f32 f16 bf16 tf32 s32 s8",
    is_collective=True,
)
def multiply(c, i):
    d, a, b, accumulator = (o.items for o in i.operands)
    element, elements = PRODUCTS.get(i.modifiers[-4:], ("", 0))
    if i.modifiers[2:5] != (f"m16n8k{4 * len(b) * elements}", "row", "col"):
        raise PtxError(f"{i.source}: no rule for the instruction `{i.text}`")
    saturates = "Saturating" if "satfinite" in i.modifiers else ""  # integers alone may
    work = f"multiply<{element}{saturates}, {len(b)}>"
    return Collective(work, (*a, *b, *accumulator), tuple((r, "b32") for r in d))


@rule("ldmatrix", "b16", "sync aligned m8n8 x1 x2 x4 trans shared shared::cta", is_collective=True)
def load_matrices(c, i):
    target, address = i.operands
    registers = getattr(target, "items", (target,))
    row = shared_offset(c, i, address, 16, "Read")
    count = len(registers)
    if count < 4:  # the other lanes' addresses don't matter
        row = f"current->lane < {8 * count} ? {row} : 0"
    work = f"load_matrices<{count}, {str('trans' in i.modifiers).lower()}>"
    return Collective(work, (row,), tuple((r, "b32") for r in registers))


@rule("stmatrix", "b16", "sync aligned m8n8 x1 x2 x4 trans shared shared::cta", is_collective=True)
def store_matrices(c, i):
    address, source = i.operands
    registers = getattr(source, "items", (source,))
    row = shared_offset(c, i, address, 16, "Write")
    count = len(registers)
    if count < 4:
        row = f"current->lane < {8 * count} ? {row} : 0"
    work = f"store_matrices<{count}, {str('trans' in i.modifiers).lower()}>"
    return Collective(work, (row, *registers), ())


@rule("cvt", "f32", "rna tf32")
def round_to_tf32(c, i):
    """Ties away from 0."""
    if i.modifiers != ("rna", "tf32", "f32"):
        raise PtxError(f"{i.source}: no rule for the instruction `{i.text}`")
    return c.assign(i.operands[0], "b32", f"to_tf32({c.value(i.operands[1], 'f32')})")
