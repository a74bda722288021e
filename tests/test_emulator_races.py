"""Races that no schedule shows."""

import re

import pytest
import torch
from attention_helpers import Case, raw_ops
from emulator import build, ops
from emulator_helpers import Kernels
from helpers import OPTIONS, Problem

import bigkern
from bigkern import backends
from bigkern.ops import adam_, grad_norm

FLOAT, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16

X = torch.randint(-100, 100, (128,), dtype=torch.int32)


@pytest.fixture(scope="module")
def races():
    kernels = Kernels("races", build.HERE / "kernels/races.cu", build.HERE / "kernels/matrices.cu")
    kernels.controls.find_races(True)
    return kernels


def zeros(n):
    return torch.zeros(n, dtype=torch.int32)


def neighbours(run, bug):
    out = zeros(32)
    run("neighbours", X, out, bug)
    lane = torch.arange(32)
    return torch.equal(out, X[(lane + (lane ^ 16) + 1) % 32])


def bytes_of_words(run, bug):
    out = torch.zeros(64, dtype=torch.int8)
    run("bytes", X[:64].char(), out, bug, block=(64, 1, 1))
    return torch.equal(out, X[:64].char())


def halves(run, bug):
    out = zeros(128)
    run("halves", X, out, bug, block=(128, 1, 1))
    return torch.equal(out, X.view(2, 64).roll(-1, 1).flatten())


def sum_of_blocks(run, bug):
    out = zeros(1)
    run("sum_of_blocks", X, out, bug, grid=(128, 1, 1))
    return out.item() == X.sum()


def last_block(run, bug, name="last_block", grid=128):
    out = zeros(1)
    run(name, X, zeros(128), zeros(1), out, bug, grid=(grid, 1, 1), block=(32, 1, 1))
    return out.item() == X.sum()


def last_block_together(run, bug):
    return last_block(run, bug, "last_block_together", 4)


def flag(run, bug):
    out = zeros(1)
    run("flag", X, out, zeros(128), bug, grid=(128, 1, 1))
    return out.item() == 1


def pipeline(run, bug):
    x, out = torch.randn(2000), torch.zeros(2000)
    run("pipeline", x, out, 2000, bug, block=(64, 1, 1))
    return torch.equal(out, 2 * x)


RACES = {
    (neighbours, 1): r"ld.shared.u32 at races.cu:\d+ reads shared memory at offset \d+, which s"
    r"t.shared\S* at races.cu:\d+ of thread \(\d+, 0, 0\) has written: nothing orders them\n.* ne",
    (bytes_of_words, 1): r"st.shared.u8 at races.cu:\d+ writes .* has written",
    (halves, 1): r"memory at offset 0, .* thread \((0|127), 0, 0\) has .*\n.*\((0|127), 0, 0\)",
    (sum_of_blocks, 1): r"global memory at .* of thread \(0, 0, 0\) of block \(\d+.* has written",
    (last_block, 1): r"ld.global\S* at races.cu:\d+ reads global memory .* has written",
    (last_block, 2): r"ld.global\S* at races.cu:\d+ reads global memory .* has written",
    (last_block_together, 1): r"ld.global\S* at races.cu:\d+ reads global memory .* has written",
    (flag, 1): r"of thread \(0, 0, 0\) of block \(\d+, 0, 0\) has (read|written)",
    (pipeline, 1): r"ld.shared\S* at \S+ .*but the bytes of cp.async\S* .* are on their way",
    (pipeline, 2): r"ld.shared\S* at \S+ .*but the bytes of cp.async\S* .* are on their way",
    (pipeline, 3): r"ld.shared\S* at \S+ .* which cp.async\S* at .* written|are on their way",
    (pipeline, 4): r"cp.async\S* at \S+ .* writes .* ld.shared\S* .* has read|are on their way",
}  # fmt: skip


@pytest.mark.parametrize("schedule", ["asc", "desc", "random"])
@pytest.mark.parametrize(("kernel", "bug"), RACES)
def test_a_race_is_named_under_any_schedule(races, kernel, bug, schedule):
    races.controls.set_schedule(schedule)
    assert kernel(races, 0)
    with pytest.raises(RuntimeError) as error:
        kernel(races, bug)
    assert str(error.value).startswith("race: ")
    assert re.search(RACES[kernel, bug], str(error.value)), str(error.value)


@pytest.mark.parametrize(
    "kernel", [neighbours, sum_of_blocks, last_block, last_block_together, flag]
)
@pytest.mark.parametrize("schedule", ["asc", "desc", "random"])
def test_no_schedule_shows_it(races, kernel, schedule):
    races.controls.set_schedule(schedule)
    races.controls.find_races(False)
    try:
        assert kernel(races, 1)
    finally:
        races.controls.find_races(True)


def test_equal_writes_can_be_allowed(races):
    def write_one_byte_twice(x):
        races("bytes", x, torch.zeros(64, dtype=torch.int8), 1, block=(64, 1, 1))

    equal, different = torch.ones(64, dtype=torch.int8), torch.arange(64, dtype=torch.int8)
    with pytest.raises(RuntimeError, match=r"^race: .* writes .* has written"):
        write_one_byte_twice(equal)
    races.controls.find_races(True, allow_equal_writes=True)
    try:
        write_one_byte_twice(equal)
        with pytest.raises(RuntimeError, match=r"^race: .* writes .* has written"):
            write_one_byte_twice(different)
        races("same_word", torch.ones(32, dtype=torch.int32), zeros(1))
        last = torch.arange(32, dtype=torch.int32) // 31  # differs in the last thread alone
        with pytest.raises(RuntimeError, match=r"^race: .* writes .* has written"):
            races("same_word", last, zeros(1))
    finally:
        races.controls.find_races(True)


@pytest.fixture
def racing(emulated_ops):
    """Ops are run by kernels whose races are errors."""
    emulated_ops.find_races(True)
    with ops.backend():
        yield
    emulated_ops.find_races(False)


@pytest.mark.usefixtures("racing")
def test_adam_has_no_races():
    problem = Problem(torch.bfloat16, shapes=[(1,), (5000,), (0,), (127,)])
    adam_(*problem.lists(), **OPTIONS)
    grad_norm(problem.grads)


EXTRAS = {"mask": "float32", "alibi": "BH", "softcap": 2.0, "dropout": 0.3}
ATTENTION = {
    "causal": Case(BRAIN, 2, 4, 2, 140, 150, 16, 16, causal=True),
    "wide": Case(HALF, 1, 2, 2, 70, 90, 128, 128, causal=True),
    "extras": Case(BRAIN, 3, 4, 2, 70, 90, 64, 64, seqlens=True, window=(60, 9), **EXTRAS),
    "decoding": Case(BRAIN, 2, 8, 2, 1, 1100, 64, 64),
    "float32": Case(FLOAT, 2, 2, 1, 70, 90, 24, 16, window=(40, 0)),
}


@pytest.mark.usefixtures("racing")
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_has_no_races(name):
    case = ATTENTION[name]
    raw_ops(backends.select("attention", "cpu"), case, case.inputs(), case.tensors())


@pytest.mark.usefixtures("racing")
@pytest.mark.parametrize("is_row_major", [False, True])
@pytest.mark.parametrize(("M", "N", "K"), [(130, 130, 200), (1, 64, 512), (33, 80, 1100)])
def test_int8_has_no_races(M, N, K, is_row_major):
    a, weight = torch.randint(-128, 128, (M, K)).char(), torch.randint(-128, 128, (N, K)).char()
    bigkern.int8_mm(a, weight.T.contiguous() if is_row_major else weight.T)
    x, scale, bias = torch.randn(M, K), torch.rand(N), torch.randn(N)
    bigkern.int8_linear(x, weight, scale, bias)
    bigkern.weight_only_linear(x, weight, scale, bias)
