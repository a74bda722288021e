"""The emulator's products of a warpgroup, of sm_90."""

import re
from typing import NamedTuple

import pytest
import torch
from emulator import build
from emulator_helpers import SCHEDULES, Kernels

KERNELS = build.HERE / "kernels"
# dtype of A and B -> their type, D's, and the constraint of D's registers.
TYPES = {
    torch.float16: ("f16", "f32", "f"),
    torch.bfloat16: ("bf16", "f32", "f"),
    torch.float32: ("tf32", "f32", "f"),
    torch.int8: ("s8", "s32", "r"),
}
LAYOUTS = {0: 0, 128: 1, 64: 2, 32: 3}  # a descriptor's number for each swizzle


class Case(NamedTuple):
    dtype: torch.dtype
    n: int
    a_from: str = "shared"  # or registers, or shared, transposed
    b_from: str = "shared"
    swizzle: int = 128
    block: int = 0  # which 32 bytes of K
    negates: bool = False

    @property
    def depth(self):
        return 32 // self.dtype.itemsize


CASES = [
    *(Case(dtype, n) for dtype in TYPES for n in (8, 64)),
    *(Case(dtype, 24, "registers") for dtype in TYPES),
    *(Case(torch.float16, 256, swizzle=s, block=1 if s > 32 else 0) for s in (0, 32, 64, 128)),
    Case(torch.int8, 16, swizzle=0),
    Case(torch.bfloat16, 128, "transposed", "transposed"),
    Case(torch.float16, 192, "registers", "transposed", block=0),
    *(Case(torch.float16, 64, "transposed", "transposed", swizzle=s) for s in (0, 32, 64)),
    Case(torch.float16, 8, block=3, negates=True),
]


def source():
    """A kernel for each case: inline assembly has its operands' number in its text."""
    text = '#include "products.cuh"\n'
    for number, case in enumerate(CASES):
        kind, d_kind, constraint = TYPES[case.dtype]
        size = case.n // 2
        registers = ", ".join(f"%{i}" for i in range(size))
        outputs = ", ".join(f'"+{constraint}"(d[{i}])' for i in range(size))
        if case.a_from == "registers":
            a, inputs = (
                ", ".join(f"%{size + i}" for i in range(4)),
                '"r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])',
            )
            a, used = f"{{{a}}}", 4
        else:
            a, inputs, used = f"%{size}", '"l"(a_at)', 1
        flags = "" if d_kind == "s32" else f", {-1 if case.negates else 1}, 1"
        if case.dtype.itemsize == 2:
            flags += "" if case.a_from == "registers" else f", {int(case.a_from == 'transposed')}"
            flags += f", {int(case.b_from == 'transposed')}"
        c_type = "float" if d_kind == "f32" else "int"
        text += f"""
extern "C" __global__ void product_{number}(
    const uint8_t* a, const uint8_t* b, {c_type}* out, uint64_t a_matrix, uint64_t b_matrix,
    int a_bytes, int b_bytes, int accumulates) {{
  fill(0, a, a_bytes);
  fill(kPlaceOfB, b, b_bytes);
  fence_proxy();
  __syncthreads();
  {c_type} d[{size}];
  const uint32_t* x = reinterpret_cast<const uint32_t*>(a) + 4 * threadIdx.x;
  for (int i = 0; i < {size}; ++i) d[i] = out[threadIdx.x * {size} + i];
  const uint64_t a_at = descriptor_at(a_matrix, 0), b_at = descriptor_at(b_matrix, kPlaceOfB);
  fence_products();
  asm volatile("{{.reg .pred p;\\nsetp.ne.b32 p, %{size + used + 1}, 0;\\n"
               "wgmma.mma_async.sync.aligned.m64n{case.n}k{case.depth}.{d_kind}.{kind}.{kind} "
               "{{{registers}}}, {a}, %{size + used}, p{flags};}}"
               : {outputs} : {inputs}, "l"(b_at), "r"(accumulates));
  commit_products();
  wait_products<0>();
  for (int i = 0; i < {size}; ++i) out[threadIdx.x * {size} + i] = d[i];
}}
"""
    return text


@pytest.fixture(scope="module")
def products():
    text = source().replace('"products.cuh"', f'"{KERNELS}/products.cuh"')
    return Kernels("products", build.keep_source("products.cu", text), architectures=["90a"])


# ---- Layouts, as the PTX ISA draws them ----


def laid_out(matrix, swizzle, transposed):
    """Its bytes in shared memory, and its descriptor. matrix: [rows, K], rows of A or columns of B.

    Atoms of 8 rows of `swizzle` bytes, or 16 without, lie in the order of K, then of the rows;
    transposed ones have K for rows.
    """
    x = matrix.T if transposed else matrix
    per_row = (swizzle or 16) // matrix.element_size()
    rows, columns = x.shape
    atoms = x.reshape(rows // 8, 8, columns // per_row, per_row).transpose(1, 2)
    row_step, column_step = 8 * (swizzle or 16) * (columns // per_row), 8 * (swizzle or 16)
    data = atoms.contiguous().flatten().view(torch.uint8)
    if swizzle:
        data = swizzled(data, swizzle)
    leading, stride = column_step, row_step
    if transposed and not swizzle:
        leading, stride = row_step, column_step
    return data, leading >> 4 << 16 | stride >> 4 << 32 | LAYOUTS[swizzle] << 62


def swizzled(data, swizzle):
    """Chunk i of 16 bytes of each 128 goes to i ^ (the number of the 128 mod swizzle / 16)."""
    chunks = data.view(-1, 16)
    i = torch.arange(len(chunks))
    moved = torch.empty_like(chunks)
    moved[i ^ (i // 8 % (swizzle // 16))] = chunks
    return moved.flatten()


def threads_of(d):
    """[64, n] -> [128, n / 2], the registers of each thread."""
    # row = 16 warp + 8 i + group; column = 8 j + 2 k + l
    return d.view(4, 2, 8, -1, 4, 2).permute(0, 2, 4, 3, 1, 5).reshape(128, -1)


def a_registers(a):
    """[64, K] -> the bytes of 4 registers of each thread."""
    words = a.contiguous().view(torch.int32)  # [64, 8]
    return (
        words.view(4, 2, 8, 2, 4).permute(0, 2, 4, 3, 1).reshape(-1).contiguous().view(torch.uint8)
    )


def as_bytes(descriptor):
    return descriptor.to_bytes(8, "little")


def draw(rows, columns, dtype):
    low = -100 if dtype == torch.int8 else -8
    return torch.randint(low, 9, (rows, columns)).to(dtype)


@pytest.mark.parametrize("schedule", ["asc", "desc", "random"])
@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda i: "-".join(map(str, CASES[i])))
def test_products(products, number, schedule):
    products.controls.set_schedule(schedule)
    products.controls.find_races(schedule == "random")
    case = CASES[number]
    depth = max(case.swizzle or 32, 32) // case.dtype.itemsize
    transposed = {"a": case.a_from == "transposed", "b": case.b_from == "transposed"}
    # Transposed, K is the outer dimension, all of which is multiplied.
    a = draw(64, case.depth if transposed["a"] else depth, case.dtype)
    b = draw(case.n, case.depth if transposed["b"] else depth, case.dtype)
    offset = case.block * 32
    k = slice(case.block * case.depth, (case.block + 1) * case.depth)
    a_used, b_used = (x if transposed[n] else x[:, k] for n, x in (("a", a), ("b", b)))
    (a_data, a_matrix), (b_data, b_matrix) = (
        laid_out(x, case.swizzle, transposed[n]) for n, x in (("a", a), ("b", b))
    )
    steps = {n: 0 if transposed[n] else (offset if case.swizzle else offset * 8) for n in "ab"}
    if case.a_from == "registers":
        a_data = a_registers(a_used)
    out_dtype = torch.int32 if case.dtype == torch.int8 else torch.float32
    c = torch.randint(-50, 50, (64, case.n)).to(out_dtype)
    product = a_used.double() @ b_used.double().T * (-1 if case.negates else 1)
    for accumulates in (0, 1):
        out = threads_of(c).contiguous()
        products(
            f"product_{number}",
            a_data,
            b_data,
            out,
            as_bytes(a_matrix + (steps["a"] >> 4)),
            as_bytes(b_matrix + (steps["b"] >> 4)),
            a_data.numel() if case.a_from != "registers" else 0,
            b_data.numel(),
            accumulates,
            block=(128, 1, 1),
            smem=0xA000,
        )
        expected = threads_of((product + accumulates * c).to(out_dtype))
        assert torch.equal(out, expected)


# ---- Mistakes ----


@pytest.fixture(scope="module")
def chains():
    return Kernels("chain", KERNELS / "product_chain.cu", architectures=["90a"])


def chain(run, bug):
    a, b = draw(64, 64, torch.float16), draw(8, 64, torch.float16)
    (a_data, a_matrix), (b_data, b_matrix) = laid_out(a, 128, False), laid_out(b, 128, False)
    out = torch.zeros(128, 4)
    arguments = (a_data, b_data, out, as_bytes(a_matrix), as_bytes(b_matrix), bug)
    run("chain", *arguments, block=(128, 1, 1), smem=0x9000)
    return torch.equal(out, threads_of((a.double() @ b.double().T).float()))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("finds_races", [False, True])
def test_a_chain_of_products(chains, schedule, finds_races):
    chains.controls.set_schedule(*schedule)
    chains.controls.find_races(finds_races)
    assert chain(chains, 0)


@pytest.mark.parametrize("bug", [1, 2])
@pytest.mark.parametrize("schedule", ["asc", "desc", "random"])
def test_sums_are_poison_until_they_are_waited_for(chains, bug, schedule):
    chains.controls.set_schedule(schedule)
    chains.controls.find_races(False)
    assert not chain(chains, bug)


MISTAKES = {
    3: r"wgmma.mma_async\S* at .*: no fence.proxy.async since st.shared\S* at .* wrote shared mem",
    4: r"wgmma.mma_async\S* at \S+( \(in \S+\))?: no wgmma.fence before it",
    5: r"race: st.shared\S* at \S+.* wgmma.mma_async\S* at .*(are on their way|has read)",
    6: r"deadlock: 96 of 128 threads wait for ever\n  threads 0 to 95 wait at wgmma.wait_group",
    7: r"the descriptor \w+ leads to offset \d+, outside the block's 36864 bytes of shared memory",
    8: r"wgmma.mma_async\S* at \S+( \(in \S+\))?: the thread has exited without waiting for it",
}  # fmt: skip


@pytest.mark.parametrize("schedule", ["asc", "desc", "random"])
@pytest.mark.parametrize("bug", MISTAKES)
def test_mistakes_are_named(chains, bug, schedule):
    chains.controls.set_schedule(schedule)
    chains.controls.find_races(True)
    with pytest.raises(RuntimeError) as error:
        chain(chains, bug)
    assert re.search(MISTAKES[bug], str(error.value)), str(error.value)


def test_an_overwritten_matrix_shows_under_some_schedule(chains):
    chains.controls.find_races(False)

    def is_right(schedule):
        chains.controls.set_schedule(*schedule)
        return chain(chains, 5)

    assert not all(is_right(schedule) for schedule in SCHEDULES)
