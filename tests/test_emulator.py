"""The emulator of tests/emulator: what threads do together, and that it finds what is wrong."""

import re

import pytest
import torch
from emulator import build
from emulator.parse import PtxError
from emulator.translate import translate
from emulator_helpers import SCHEDULES, Kernels

KERNELS = build.HERE / "kernels"


@pytest.fixture(scope="module")
def library():
    return Kernels("threads", KERNELS / "threads.cu", KERNELS / "bugs.cu")


@pytest.fixture(params=SCHEDULES, ids=lambda s: "-".join(map(str, s)))
def run(library, request):
    """The library under one schedule."""
    library.controls.set_schedule(*request.param)
    library.controls.take_launches()
    yield library
    library.controls.set_schedule("asc")


# ---- What threads do together ----


def test_shuffles(run):
    x = torch.randint(-1000, 1000, (32,), dtype=torch.int32)
    out = torch.zeros(10, 32, dtype=torch.int32)
    run("shuffles", x, out)
    lane = torch.arange(32)
    group = lane // 8 * 8
    sources = [
        lane * 0 + 5,
        lane * 7 % 32,
        torch.where(lane >= 3, lane - 3, lane),
        torch.where(lane + 30 < 32, lane + 30, lane),
        lane ^ 17,
        group + 5,
        torch.where(lane - group >= 3, lane - 3, lane),
        torch.where(lane % 16 + 3 < 16, lane + 3, lane),
        # Lanes of a later segment aren't read, those of an earlier one are.
        torch.where((lane ^ 12) < group + 8, lane ^ 12, lane),
        lane // 4 * 4 + 3,
    ]
    for actual, source in zip(out, sources, strict=True):
        assert torch.equal(actual, x[source])


@pytest.mark.parametrize("n", [1, 7, 32])
def test_votes_and_reductions_of_a_warp(run, n):
    x = torch.randint(-100, 100, (n,), dtype=torch.int32)
    out = torch.zeros(8, n, dtype=torch.int32)
    run("votes", x, out, n)
    bit = 1 << torch.arange(n)
    remainder = x.fmod(4)  # as in C
    xor = 0
    for value in x.tolist():
        xor ^= value
    expected = [
        (bit * (x > 0)).sum(),
        (x > 90).any(),
        (x > -200).all(),
        torch.stack([(bit * (remainder == r)).sum() for r in remainder]),
        x.sum(),
        x.min(),
        x.max(),
        torch.tensor(xor),
    ]
    for actual, e in zip(out, expected, strict=True):
        assert torch.equal(actual, e.to(torch.int64).to(torch.int32).expand(n))


@pytest.mark.parametrize("n", [1, 33, 1000])
def test_barrier_reductions(run, n):
    for x in (torch.randn(n) * 100, torch.ones(n), torch.zeros(n)):
        x, out = x.int(), torch.zeros(3, dtype=torch.int32)
        run("barrier_reductions", x, out, block=(n, 1, 1))
        positive = x > 0
        assert out.tolist() == [positive.sum(), positive.all(), positive.any()]


@pytest.mark.parametrize("n", [1, 7, 127, 1024])
def test_dynamic_shared_memory(run, n):
    x = torch.randint(0, 1000, (5, n), dtype=torch.int32)
    out = torch.zeros_like(x)
    run("reverse", x, out, grid=(5, 1, 1), block=(n, 1, 1), smem=4 * n)
    assert torch.equal(out, x.flip(1))
    (launch,) = run.controls.take_launches()
    assert (launch["grid"], launch["block"]) == ((5, 1, 1), (n, 1, 1))
    assert launch["global_read"] == launch["global_written"] == x.nbytes
    assert launch["barriers"] == 5


def test_named_barriers(run):
    x = torch.randint(0, 1000, (9, 32), dtype=torch.int32)
    out = torch.zeros_like(x)
    run("hand_over", x, out, 9, block=(64, 1, 1))
    assert torch.equal(out, 2 * x.flip(1))


@pytest.mark.parametrize(("name", "dtype"), [("s32", torch.int32), ("u64", torch.int64)])
def test_integer_atomics(run, name, dtype):
    x = torch.randint(1, 2**30, (1000,), dtype=dtype)
    out = torch.tensor([0, 2**31 - 1, 0, 0, 0], dtype=dtype)
    run(f"atomics_{name}", x, out, x.numel(), grid=(4, 1, 1), block=(256, 1, 1))
    assert out[[0, 1, 2, 4]].tolist() == [x.sum(dtype=dtype), x.min(), x.max(), x.max()]
    assert out[3] in x


def test_float_atomics(run):
    x = torch.randint(-1000, 1000, (1000,)).float()  # sums are exact, in any order
    out, wide_out = torch.zeros(1), torch.zeros(1, dtype=torch.float64)
    run("atomics_float", x, out, wide_out, x.numel(), grid=(4, 1, 1), block=(256, 1, 1))
    assert out.item() == wide_out.item() == x.sum().item()


def test_local_memory_calls_and_variables(run):
    x = torch.randint(-100, 100, (32,), dtype=torch.int32)
    x[0] = 5  # coprime to 32: a permutation
    calls = []
    for _ in range(2):
        out = torch.zeros(65, dtype=torch.int32)
        run("local_memory", x, out, block=(64, 1, 1))
        thread, i = torch.arange(64), torch.arange(32)
        moved = torch.empty(32, dtype=torch.int64)
        moved[i * 5 % 32] = x.long()
        expected = ((i + 1) * (moved + thread[:, None])).sum(1) + (thread % 8) ** 2
        assert torch.equal(out[:64].long(), expected)
        calls.append(out[64].item())
    assert calls[1] == calls[0] + 1


def test_printf(run, capfd):
    run("print", 7, 2.5)
    assert capfd.readouterr().out == f"x = 7, y = 2.50 of thread, {7 << 33}%\n"


@pytest.mark.parametrize(("stride", "conflicts"), [(1, 0), (2, 1), (8, 7), (32, 31), (33, 0)])
def test_bank_conflicts(run, stride, conflicts):
    out = torch.zeros(32)
    run.controls.count_conflicts(True)
    try:
        run("shared_stride", out, stride)
    finally:
        run.controls.count_conflicts(False)
    assert torch.equal(out, torch.arange(32.0))
    (launch,) = run.controls.take_launches()
    assert launch["shared_accesses"] == 2
    assert launch["bank_conflicts"] == 2 * conflicts


@pytest.mark.parametrize(
    ("stride", "offset", "sectors"),
    [(1, 0, 4), (1, 1, 5), (2, 0, 8), (8, 0, 32), (33, 0, 32), (0, 0, 1)],
)
def test_sectors(run, stride, offset, sectors):
    x = torch.arange(96 * 33.0 + 1)
    out = torch.zeros(96 * 33 + 1)
    run.controls.count_sectors(True)
    try:
        run("global_stride", x[offset:], out[offset:], stride, grid=(3, 1, 1))
    finally:
        run.controls.count_sectors(False)
    (launch,) = run.controls.take_launches()
    assert launch["sectors_read"] == launch["sectors_written"] == 3 * sectors


# ---- Mistakes. Each kernel runs without its bug too. ----


@pytest.mark.parametrize("name", ["reduction", "reduction_start", "reused_buffer"])
def test_a_missing_barrier_shows_under_some_schedule(library, name):
    x = torch.randint(0, 100, (256,)).float()
    if name == "reused_buffer":
        expected, block = x.view(4, 64).flip(1).sum(0), (64, 1, 1)
    else:
        expected, block = x.sum()[None], (256, 1, 1)

    def is_right(bug, schedule):
        library.controls.set_schedule(*schedule)
        out = torch.zeros_like(expected)
        library(name, x, out, bug, block=block)
        return torch.equal(out, expected)

    assert all(is_right(0, schedule) for schedule in SCHEDULES)
    assert not all(is_right(1, schedule) for schedule in SCHEDULES)


FLOATS = torch.arange(200.0)
BUGS = {
    "read_past_end": (
        lambda run, bug: run(
            "read_past_end", FLOATS[:100], torch.empty(100), 100, bug, grid=(4, 1, 1)
        ),
        r"ld.global\S*f32 at bugs.cu:\d+: 4 bytes at address 0x\w+ are in no known buffer: it "
        r"ends 4 bytes after the end of argument 0 of 400 bytes\n"
        r"  in kernel read_past_end, block \(3, 0, 0\), thread \(4, 0, 0\)",
    ),
    "write_past_end": (
        lambda run, bug: run(
            "write_past_end", FLOATS, torch.empty(101)[:100], 100, bug, grid=(4, 1, 1)
        ),
        r"st.global\S*f32 at bugs.cu:\d+: .* 4 bytes after the end of argument 1 of 400 bytes\n"
        r"  in kernel write_past_end, block \(3, 0, 0\), thread \(4, 0, 0\)",
    ),
    "read_before_begin": (
        lambda run, bug: run("read_before_begin", FLOATS[1:33], torch.empty(32), 32, bug),
        r"ld.global\S* at bugs.cu:\d+: .* it begins 4 bytes before argument 0 .*\n.*\(0, 0, 0\)",
    ),
    "row_past_end": (
        lambda run, bug: run(
            *("row_past_end", FLOATS[:196], torch.empty(200)[:196], 28, 7, bug),
            **{"grid": (1, 2, 1), "block": (16, 16, 1)},
        ),
        r"ld.global\S*f32 at bugs.cu:\d+: .* \d+ bytes after the end of argument 0 of 784 bytes\n"
        r"  in kernel row_past_end, block \(0, 1, 0\), thread \(\d, 12, 0\)",
    ),
    "spin": (
        lambda run, bug: run("spin", torch.zeros(1, dtype=torch.int32), bug, block=(64, 1, 1)),
        r"deadlock: nanosleep\S* at bugs.cu:\d+ comes back again and again, and nothing else .*\n"
        r"  in kernel spin, block \(0, 0, 0\), thread \(0, 0, 0\)",
    ),
    "shared_past_end": (
        lambda run, bug: run("shared_past_end", torch.empty(32), bug, smem=128),
        r"4 bytes at offset 128 are outside the block's 128 bytes of shared memory\n.*\(31, 0, 0\)",
    ),
    "divergent_barrier": (
        lambda run, bug: run("divergent_barrier", torch.empty(64), bug, block=(64, 1, 1)),
        r"divergent barrier: some threads wait at bar\S* at bugs.cu:\d+, this one at bar",
    ),
    "barrier_after_exit": (
        lambda run, bug: run("barrier_after_exit", torch.empty(64), bug, block=(64, 1, 1)),
        r"divergent barrier: .* exited",
    ),
    "deadlock": (
        lambda run, bug: run("deadlock", torch.empty(64), bug, block=(64, 1, 1)),
        r"deadlock: 64 of 64 threads wait for ever\n  threads 0 to 31 wait at bar.sync at bugs.cu:"
        r"\d+\n  threads 32 to 63 wait at bar.sync at bugs.cu:\d+\n  in kernel deadlock",
    ),
    "warp_deadlock": (
        lambda run, bug: run("warp_deadlock", torch.empty(32, dtype=torch.int32), bug),
        r"deadlock: 32 of 32 threads .*\n(.*\n)*  warp 0: shfl\S* at \S+ has lanes 0000ffff of f",
    ),
    "absent_lane": (
        lambda run, bug: run("absent_lane", torch.empty(32, dtype=torch.int32), bug),
        r"shfl.sync.bfly.b32 at bugs.cu:\d+: lane 0 reads lane 16, which isn't there",
    ),
    "failed_assert": (
        lambda run, bug: run("failed_assert", torch.empty(32, dtype=torch.int32), bug),
        r"assertion `threadIdx.x < 32 - bug` failed\n.*thread \(31, 0, 0\)",
    ),
    "trapped": (
        lambda run, bug: run("trapped", torch.empty(32, dtype=torch.int32), bug),
        r"trap\n  in kernel trapped, block \(0, 0, 0\), thread \(9, 0, 0\)",
    ),
    "misaligned": (
        lambda run, bug: run("misaligned", FLOATS, torch.empty(32), bug),
        r"ld.global.v2.f32 at bugs.cu:\d+: address 0x\w+ isn't a multiple of 8 bytes",
    ),
    "zero_divisor": (
        lambda run, bug: run("zero_divisor", *torch.ones(2, 32, dtype=torch.int32), bug),
        r"div.s32 at bugs.cu:\d+: division by zero\n.*thread \(0, 0, 0\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BUGS)
def test_bugs_are_named(run, name):
    launch, message = BUGS[name]
    launch(run, 0)
    with pytest.raises(RuntimeError) as error:
        launch(run, 1)
    assert re.search(message, str(error.value)), str(error.value)
    launch(run, 0)  # what was abandoned doesn't disturb the next


def test_uninitialised_shared_memory_is_nan(run):
    out = torch.empty(64)
    run("uninitialised_shared", out, 0, block=(64, 1, 1))
    assert (out == 1).all()
    run("uninitialised_shared", out, 1, block=(64, 1, 1))
    assert out.isnan().tolist() == [False] * 63 + [True]


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        ({"block": (1025, 1, 1)}, "invalid configuration argument"),
        ({"grid": (0, 1, 1)}, "invalid configuration argument"),
        ({"grid": (1, 65536, 1)}, "invalid configuration argument"),
        ({"smem": 48 * 1024 + 1}, "invalid argument"),
    ],
)
def test_launches_that_a_card_refuses(library, launch, message):
    x = torch.zeros(32, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=message):
        library("reverse", x, x, **launch)


def test_controls_check_their_arguments(library):
    with pytest.raises(ValueError, match="schedule must be asc, desc or random, got up"):
        library.controls.set_schedule("up")
    with pytest.raises(ValueError, match=r"model must be one of t4, .*, h100, .* got k80"):
        library.controls.set_device("k80")
    with pytest.raises(ValueError, match="print takes 2 arguments, got 1"):
        library("print", 1)


# ---- Translation ----

PTX = """
.version 9.0
.target sm_80
.address_size 64
.visible .entry kernel(.param .u64 p)
{{
    .reg .b32 %r<4>;
    .loc 1 17 3
    {}
    ret;
}}
.file 1 "/somewhere/some.cu"
"""


@pytest.mark.parametrize(
    "instruction",
    [
        "frobnicate.b32 %r1, %r2;",
        "add.sat.s32 %r1, %r2, %r3;",
        "add.rz.f32 %r1, %r2, %r3;",
        "ld.global.surprising.u32 %r1, [%r2];",
        "mov.u32 %r1, %surprise;",
        "call.uni surprise;",
        "cvt.rna.satfinite.tf32.f32 %r1, %r2;",
    ],
)
def test_what_is_unknown_is_an_error_with_its_line(instruction):
    with pytest.raises(PtxError, match=r"some.cu:17: no rule for "):
        translate([PTX.format(instruction)], "register")
    translate([PTX.format("add.s32 %r1, %r2, %r3;")], "register")


@pytest.mark.parametrize(
    ("instruction", "call"),
    [
        ("cp.async.commit_group;", "commit_copies()"),
        ("cp.async.bulk.commit_group;", "commit_bulk_group()"),
        ("cp.async.wait_group 1;", "wait_for_copies("),
        ("cp.async.bulk.wait_group.read 1;", "wait_for_bulk_groups("),
        ("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r1], %r2;", "mbarrier_expect("),
        ("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], %r2;", "mbarrier_arrive("),
        ("fence.proxy.async.shared::cta;", "proxy_fence()"),
        ("fence.acq_rel.gpu;", " fence()"),
    ],
)
def test_instructions_of_like_names_are_told_apart(instruction, call):
    assert call in translate([PTX.format(instruction)], "register")
