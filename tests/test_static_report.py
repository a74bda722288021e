"""benchmarks/static_report.py: what it says of the kernels, and that it sees what it should."""

import re
import subprocess

import cubins
import loops
import pytest
import static_report
import traffic
from cuda_compiler import NoCompilerError, nvcc_command

SOURCE = """
#include <mma.h>
using namespace nvcuda::wmma;

namespace {
enum class Mode { one };
}

// Two HMMA.16816 a pass of the inner loop.
template <Mode kMode>
__global__ void __launch_bounds__(128) products(const half* a, const half* b, float* c, int n) {
  __shared__ half a_smem[256];
  fragment<accumulator, 16, 16, 16, float> sum;
  fragment<matrix_a, 16, 16, 16, half, row_major> a_reg;
  fragment<matrix_b, 16, 16, 16, half, col_major> b_reg;
#pragma unroll 1
  for (int j = 0; j < n; ++j) {
    fill_fragment(sum, 0.0f);
#pragma unroll 1
    for (int i = 0; i < n; ++i) {
      a_smem[threadIdx.x] = a[i * 128 + threadIdx.x];
      __syncthreads();
      load_matrix_sync(a_reg, a_smem, 16);
      load_matrix_sync(b_reg, b + i * 256, 16);
      mma_sync(sum, a_reg, b_reg, sum);
    }
    store_matrix_sync(c + j * 256, sum, 16, mem_row_major);
  }
}
template __global__ void products<Mode::one>(const half*, const half*, float*, int);

// 32 registers for 96 values.
__global__ void __launch_bounds__(1024, 2) spilling(float* x) {
  float values[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) values[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 96; ++i) x[(95 - i) * 1024 + threadIdx.x] = values[i] * values[(i + 1) % 96];
}
"""


@pytest.fixture(scope="module")
def occupancy():
    try:
        return static_report.Occupancy()
    except cubins.NoToolError as obstacle:
        pytest.skip(str(obstacle))


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> dict[tuple[str, str], cubins.Kernel]:
    """SOURCE's kernels by name and architecture."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "examples.cu").write_text(SOURCE)
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ("80", "90a")]
    try:
        command = [nvcc_command()[0], "-std=c++17", *codes, "-c", "examples.cu", "-o", "examples.o"]
        subprocess.run(command, cwd=folder, check=True)
        found = cubins.read_kernels(folder / "examples.o")
    except (NoCompilerError, cubins.NoToolError) as obstacle:
        pytest.skip(str(obstacle))
    return {(kernel.base_name, kernel.arch): kernel for kernel in found}


# ---- The package's kernels. That none spills is in test_cuda_build.py ----


def test_every_kernel_fits_its_cards(cuda_kernels, occupancy):
    for kernel in cuda_kernels:
        cards = [card for card in static_report.CARDS if card.arch == kernel.arch]
        assert all(occupancy(kernel, card) >= 1 for card in cards), kernel.name


@pytest.fixture(scope="module")
def emulated(emulated_ops):
    """What calls moved, by card."""
    return {card: traffic.emulate_all(card) for card in ("a100", "rtx4090", "h100")}


@pytest.mark.parametrize("card", ["a100", "rtx4090", "h100"])
def test_emulated_calls_fit_every_card(cuda_kernels, occupancy, emulated, card):
    calls, dynamic_smem = emulated[card]
    assert calls
    by_name = {k.name for k in cuda_kernels}
    assert set(dynamic_smem) <= by_name
    (model,) = [c for c in static_report.CARDS if c.name.lower().replace(" ", "") == card]
    for kernel in cuda_kernels:
        if kernel.arch == model.arch and kernel.name in dynamic_smem:
            assert occupancy(kernel, model, dynamic_smem[kernel.name]) >= 1, kernel.name


def test_emulated_calls_in_the_tables(cuda_kernels, occupancy, emulated):
    calls, dynamic_smem = emulated["h100"]
    rows = [static_report.row(k, dynamic_smem.get(k.name), occupancy) for k in cuda_kernels]
    grouped = static_report.kernel_table(rows, groups=True).splitlines()
    assert sum(line.startswith("| adam_kernel (20) | sm_") for line in grouped) == 2
    assert len(static_report.kernel_table(rows, groups=False).splitlines()) == len(cuda_kernels) + 2
    adam = next(call for call in calls if call["call"].startswith("Adam"))
    assert "adam_kernel<float, float, false, false>" in adam["kernels"]
    bound = static_report.call_bound(adam, {}, "A100")
    assert (bound.share, bound.limit) == (1.0, "DRAM")
    assert len(static_report.call_table(calls, rows).splitlines()) == len(calls) + 2


# ---- Kernels of which all is known ----


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_main_loop(examples, arch):
    kernel = examples["products", arch]
    assert kernel.name == "products<(Mode)0>"
    assert (kernel.max_threads, kernel.static_smem, kernel.stack_bytes) == (128, 512, 0)
    loop = kernel.main_loop
    assert sum(i.is_matrix_product for i in loop) == kernel.count("HMMA") == 2
    assert any(i.opcode.startswith("BAR") for i in loop)
    assert len(loop) < len(kernel.instructions) / 2  # without the outer loop


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_spills_are_seen(examples, arch):
    kernel = examples["spilling", arch]
    assert kernel.registers == 32
    assert kernel.spills > 0
    assert kernel.stack_bytes > 0
    assert kernel.main_loop == kernel.instructions
    assert static_report.loop_bound(kernel, "H100") is None


# address: opcode target. A copy under a condition lies out of line, as compilers do it.
LOOPS = """
0 MOV
1 IADD3
2 @P0 BRA 8
3 HMMA.16816.F32
4 @P1 BRA 6
5 FMUL
6 @P2 BRA 1
7 EXIT
8 LDGSTS.E.128
9 BRA 3
"""


def test_loops_and_what_each_pass_runs():
    code = []
    for line in LOOPS.split("\n")[1:-1]:
        address, predicate, opcode, target = re.fullmatch(
            r"(\d+) (@P\d )?(\S+) ?(\d*)", line
        ).groups()
        operands = f"0x{target}" if target else ""
        code.append(cubins.Instruction(int(address), predicate or "", opcode, operands))
    (loop,) = loops.find_loops(code)
    assert loop.body == {1, 2, 3, 4, 5, 6, 8, 9}
    assert loop.always == {1, 2, 3, 4, 6}
    kernel = cubins.Kernel("f", "sm_80", 32, 0, 0, 128, code)
    assert [i.address for i in kernel.main_loop] == [1, 2, 3, 4, 6, 8]


def test_bound_of_a_loop(examples):
    """16 cycles of an A100's tensor cores, where each pass issues more instructions than that."""
    kernel = examples["products", "sm_80"]
    instructions = len(kernel.main_loop)
    units = static_report.unit_cycles(kernel.main_loop, "A100")
    assert units["issue"] == instructions > 16 == units["tensor cores"]
    bound = static_report.loop_bound(kernel, "A100")
    assert bound.share == 16 / max(units.values())
    # An H100's are twice as fast, but not by mma.sync.
    units = static_report.unit_cycles(examples["products", "sm_90a"].main_loop, "H100")
    assert units["tensor cores"] == pytest.approx(8 / 0.63)


def test_what_a_large_call_moves_is_found_from_small_ones():
    case = traffic.Case(
        "x", "x", None, lambda M, N, K: (M * K + N * K, M * N),
        [(4, 8, 2), (4, 8, 4)], (16, 32, 64), lambda M, N, K: M * N * K,
    )  # fmt: skip
    assert traffic.moved_at_large(case, [3 * 32 + 5 * 64, 3 * 32 + 5 * 128]) == pytest.approx(
        3 * 16 * 32 + 5 * 16 * 32 * 64
    )
    case = traffic.Case("x", "x", None, lambda n: (2 * n, n), [(10,)], (1000,))
    assert traffic.moved_at_large(case, [45]) == 4500


def test_bound_of_a_call():
    call = {"kernels": ["f"], "flops": 312e12, "rate": 1.0, "least": 2.039e11, "moved": 0}
    assert static_report.call_bound(call, {}, "A100").share == 1.0
    bound = static_report.call_bound(call, {"f": 0.5, "g": 0.1}, "A100")
    assert (bound.share, bound.limit) == (0.5, "main loop")
    bound = static_report.call_bound(call | {"moved": 4 * 5120 * 1.41e9}, {"f": 0.5}, "A100")
    assert (bound.share, bound.limit) == (0.25, "L2")


def test_occupancy_follows_registers_and_shared_memory(occupancy):
    a100, rtx4090, h100 = static_report.CARDS

    def blocks(card, registers, smem, threads=256):
        kernel = cubins.Kernel("f", card.arch, registers, 0, 0, threads, [])
        return occupancy(kernel, card, smem)

    assert [blocks(card, 32, 0) for card in (a100, rtx4090, h100)] == [8, 6, 8]
    assert [blocks(card, 255, 0) for card in (a100, rtx4090, h100)] == [1, 1, 1]
    assert [blocks(card, 64, 80 << 10) for card in (a100, rtx4090, h100)] == [2, 1, 2]
    most = [card.smem_per_block for card in (a100, rtx4090, h100)]
    assert [blocks(c, 64, n) for c, n in zip(static_report.CARDS, most, strict=True)] == [1] * 3
    assert [blocks(c, 64, n + 1) for c, n in zip(static_report.CARDS, most, strict=True)] == [0] * 3
    assert blocks(h100, 255, 0, threads=1024) == 0


@pytest.mark.parametrize(
    ("opcode", "cycles"),
    [
        ("LDSM.16.M88.4", 16),
        ("LDSM.16.MT88.2", 8),
        ("LDSM.16.M88", 4),
        ("LDGSTS.E.BYPASS.128", 16),
        ("LDGSTS.E.64", 8),
        ("LDS.128", 4),
        ("FFMA", 0),
    ],
)
def test_cycles_of_shared_memory(opcode, cycles):
    assert static_report.shared_memory_cycles(opcode) == cycles


def test_short_names():
    full = "void bigkern::(anonymous namespace)::f<c10::Half, (bigkern::Mode)1>(bigkern::T, int)"
    assert cubins.short_name(full) == "f<Half, (Mode)1>"
    assert cubins.short_name("g") == "g"
