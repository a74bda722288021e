"""The emulator's tensor cores and asynchronous copies."""

import pytest
import torch
from emulator import build
from emulator_helpers import SCHEDULES, Kernels


@pytest.fixture(scope="module")
def run():
    return Kernels("matrices", build.HERE / "kernels/matrices.cu")


@pytest.mark.parametrize(
    ("name", "dtype", "k", "out_dtype"),
    [
        ("f16", torch.float16, 16, torch.float32),
        ("bf16", torch.bfloat16, 16, torch.float32),
        ("tf32", torch.float32, 8, torch.float32),
        ("s8", torch.int8, 32, torch.int32),
    ],
)
def test_products(run, name, dtype, k, out_dtype):
    a, b = torch.randint(-128, 128, (16, k)), torch.randint(-128, 128, (8, k))  # sums are exact
    out = torch.randint(-1000, 1000, (16, 8), dtype=out_dtype)
    expected = out + (a @ b.T).to(out_dtype)
    run(f"product_{name}", a.to(dtype), b.to(dtype), out)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("clamped", [False, True])
def test_sums_of_integers_wrap_around_or_are_clamped(run, clamped):
    a, b = torch.randint(-128, 128, (16, 32)), torch.randint(-128, 128, (8, 32))
    out = torch.tensor([-(2**31), 2**31 - 1]).repeat(16, 4).int()
    exact = out.long() + a @ b.T
    run("product_s8" + clamped * "_clamped", a.char(), b.char(), out)
    assert torch.equal(out, (exact.clamp(-(2**31), 2**31 - 1) if clamped else exact).int())


def test_tf32_ignores_the_lower_bits(run):
    a, b = torch.full((16, 8), 1 + 2.0**-11), torch.eye(8)
    out = torch.zeros(16, 8)
    run("product_tf32", a, b, out)
    assert (out == 1).all()


@pytest.mark.parametrize(
    ("name", "dtype", "k"),
    [("f16", torch.float16, 16), ("bf16", torch.bfloat16, 16), ("tf32", torch.float32, 8)],
)
@pytest.mark.parametrize(
    ("products", "expected"),
    [
        ([1.5], 0),  # float32 rounds up
        ([1, 1], 2),
        ([0.75, 0.75], 0),  # each is cut
        ([torch.inf], torch.inf),
        ([torch.inf, -torch.inf], torch.nan),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_sums_are_cut_off_and_not_rounded(run, name, dtype, k, products, expected, sign):
    """In units of half of the last place of the sum before, 1."""
    a, b, out = torch.zeros(16, k), torch.full((8, k), 2.0**-12), torch.full((16, 8), float(sign))
    a[:, : len(products)] = sign * 2.0**-12 * torch.tensor(products)
    run(f"product_{name}", a.to(dtype), b.to(dtype), out)
    expected = torch.full_like(out, sign * (1 + 2.0**-24 * expected))
    assert torch.equal(out.nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.parametrize(("stride", "conflicts"), [(16, True), (24, False)])
def test_ldmatrix(run, stride, conflicts):
    a, b = torch.randint(-100, 100, (16, 16)), torch.randint(-100, 100, (16, 8))
    out = torch.zeros(16, 8)
    run.controls.take_launches()
    run.controls.count_conflicts(True)
    try:
        run("product_by_ldmatrix", a.half(), b.half(), out, stride)
    finally:
        run.controls.count_conflicts(False)
    assert torch.equal(out, (a @ b).float())
    (launch,) = run.controls.take_launches()
    assert (launch["bank_conflicts"] > 0) == conflicts


@pytest.fixture(scope="module")
def gemm():
    return Kernels("gemm", build.HERE / "kernels/gemm.cu")


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 32), (7, 127, 64), (100, 70, 96), (64, 64, 32)])
@pytest.mark.parametrize("schedule", ["asc", "desc", "random"])
def test_a_tiled_product(gemm, m, n, k, schedule):
    a, b = torch.randint(-10, 10, (m, k)), torch.randint(-10, 10, (n, k))
    out = torch.zeros(m, n)
    grid = (-(-n // 64), -(-m // 64), 1)
    gemm.controls.set_schedule(schedule)
    gemm.controls.find_races(True)
    gemm("gemm", a.half(), b.half(), out, m, n, k, grid=grid, block=(128, 1, 1))
    assert torch.equal(out, (a @ b.T).float())


def pipeline(run, n, bug, schedule):
    run.controls.set_schedule(*schedule)
    x, out = torch.randn(n), torch.zeros(n)
    run("pipeline", x, out, n, bug, block=(64, 1, 1))
    return torch.equal(out, 2 * x)


@pytest.mark.parametrize("n", [1, 7, 127, 256, 1000, 2048])
def test_asynchronous_copies(run, n):
    assert all(pipeline(run, n, 0, schedule) for schedule in SCHEDULES)


@pytest.mark.parametrize("bug", [1, 2, 3, 4])
def test_mistakes_in_a_pipeline_show_under_some_schedule(run, bug):
    assert not all(pipeline(run, 2000, bug, schedule) for schedule in SCHEDULES)


def test_an_asynchronous_copy_past_the_end_is_named(run):
    with pytest.raises(
        RuntimeError, match=r"cp.async\S* at matrices.cu:\d+ \(in \S+\): 16 bytes .*argument 0"
    ):
        pipeline(run, 1001, 5, ("asc", 0))
