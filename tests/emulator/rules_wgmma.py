"""Products of a warpgroup, which go on beside its threads."""

from emulator.parse import PtxError, Vector
from emulator.rules import rule

# The types of D, A and B -> how 32 bits hold elements, and how many.
PRODUCTS = {
    ("f32", "f16", "f16"): ("F16", 2),
    ("f32", "bf16", "bf16"): ("Bf16", 2),
    ("f32", "tf32", "tf32"): ("Tf32", 1),
    ("s32", "s8", "s8"): ("S8", 4),
}
SHAPES = " ".join(f"m64n{n}k{k}" for n in range(8, 257, 8) for k in (8, 16, 32))


@rule("wgmma", "", f"mma_async sync aligned {SHAPES} satfinite f32 f16 bf16 tf32 s32 s8")
def multiply(c, i):
    """After the matrices: whether D is added; signs of A and B; whether they are transposed."""
    d, a, b, accumulates, *flags = i.operands
    element, elements = PRODUCTS.get(i.modifiers[-3:], ("", 0))
    n = 2 * len(d.items)
    if i.modifiers[3] != f"m64n{n}k{8 * elements}":
        raise PtxError(f"{i.source}: no rule for the instruction `{i.text}`")
    numbers = [flag.number for flag in flags]
    in_registers = isinstance(a, Vector)
    signs = numbers[:2] or [1, 1]
    a_transposed, b_transposed = [0] * (4 - len(numbers)) + numbers[2:] if numbers else [0, 0]
    a_registers = c.addresses(a.items) if in_registers else "nullptr"
    a_matrix = "0" if in_registers else c.value(a, "u64")
    values = [c.addresses(d.items), n, a_registers, a_matrix, c.value(b, "u64")]
    values += [c.value(accumulates, "pred"), a_transposed, b_transposed, *signs]
    saturates = "Saturating" if "satfinite" in i.modifiers else ""
    product = f"Product{{{', '.join(map(str, values))}}}"
    return f"start_product({c.site(i)}, multiply_warpgroup<{element}{saturates}>, {product});"


@rule("wgmma", "", "fence sync aligned")
def fence(c, i):
    return "fence_products();"


@rule("wgmma", "", "commit_group sync aligned")
def commit(c, i):
    return "commit_products();"


@rule("wgmma", "", "wait_group sync aligned")
def wait(c, i):
    return f"wait_for_products({c.site(i)}, {c.value(i.operands[0], 'u32')});"
