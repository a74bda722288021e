"""Clusters in the emulator: blocks that use one another's shared memory."""

import re

import numpy as np
import pytest
import torch
from emulator import build
from emulator_helpers import SCHEDULES, Kernels, tensor_map

KERNELS = build.HERE / "kernels"
THREADS = 96


@pytest.fixture(scope="module")
def clusters():
    sources = [KERNELS / "clusters.cu", KERNELS / "cluster_products.cu"]
    return Kernels("clusters", *sources, architectures=["90a"])


@pytest.fixture(params=SCHEDULES, ids=lambda s: "-".join(map(str, s)))
def run(clusters, request):
    clusters.controls.set_schedule(*request.param)
    clusters.controls.take_launches()
    yield clusters
    clusters.controls.find_races(False)


def histogram(run, bug, size=(4, 1, 1), grid=(8, 1, 1)):
    per_cluster, blocks = 700, size[0] * size[1]
    x = torch.randint(0, 64, (grid[0] * grid[1] // blocks, per_cluster), dtype=torch.int32)
    out = torch.zeros(len(x), 64, dtype=torch.int32)
    launch = {"grid": grid, "block": (THREADS, 1, 1), "cluster": size}
    run("histogram", x, out, per_cluster, bug, **launch)
    expected = np.stack([np.bincount(row, minlength=64) for row in x.numpy()])
    return np.array_equal(out.numpy(), expected)


def sums(run, bug, blocks=4):
    x = torch.randint(-100, 100, (2, blocks, THREADS)).float()
    out = torch.zeros_like(x)
    launch = {"grid": (2 * blocks, 1, 1), "block": (THREADS, 1, 1), "cluster": (blocks, 1, 1)}
    run("sums", x, out, bug, **launch)
    return torch.equal(out, x.sum(1, keepdim=True).expand_as(x))


def ring(run, bug, blocks=3, steps=5, name="ring"):
    x = torch.randn(2, blocks, 4 * THREADS)
    out = torch.zeros_like(x)
    launch = {"grid": (2 * blocks, 1, 1), "block": (THREADS, 1, 1), "cluster": (blocks, 1, 1)}
    run(name, x, out, steps, bug, **launch)
    return torch.equal(out, x.roll(steps, 1))


def bulk_ring(run, bug, blocks=3, steps=5):
    return ring(run, bug, blocks, steps, "bulk_ring")


def async_sum(run, bug, blocks=4):
    x = torch.randint(0, 1000, (2, blocks * THREADS), dtype=torch.int32)
    out = torch.zeros(2, dtype=torch.int32)
    launch = {"grid": (2 * blocks, 1, 1), "block": (THREADS, 1, 1), "cluster": (blocks, 1, 1)}
    run("async_sum", x, out, bug, **launch)
    return torch.equal(out, x.sum(1, dtype=torch.int32))


def product(run, bug, blocks=2, depth=96):
    """Of integers, so that any order of sums gives the same."""
    a = torch.randint(-8, 8, (32 * 2 * blocks, depth)).float()
    b = torch.randint(-8, 8, (32, depth)).float()
    out = torch.zeros(len(a), 32)
    for x in (a, b):
        run.controls.add_buffer(x.data_ptr(), x.nbytes, "a matrix")
    try:
        maps = [tensor_map(run, a, (32, 32)), tensor_map(run, b, (32 // blocks, 32))]
        launch = {"grid": (2 * blocks, 1, 1), "block": (128, 1, 1), "cluster": (blocks, 1, 1)}
        run("product", *maps, out, depth, bug, **launch)
    finally:
        for x in (a, b):
            run.controls.remove_buffer(x.data_ptr())
    return torch.equal(out, a @ b.T)


def broadcast(run, bug, blocks=5, n=200):
    x = torch.randn(n)
    out = torch.zeros(blocks, n)
    launch = {"grid": (blocks, 1, 1), "block": (64, 1, 1), "cluster": (blocks, 1, 1)}
    run("broadcast", x, out, n, bug, smem=4 * n, **launch)
    return torch.equal(out, x.expand(blocks, n))


def late_exit(run, bug):
    out = torch.zeros(32, dtype=torch.int32)
    run("late_exit", out, bug, grid=(2, 1, 1), cluster=(2, 1, 1))
    return out.tolist() == [*range(32)]


# ---- What is right ----


@pytest.mark.parametrize("finds_races", [False, True])
@pytest.mark.parametrize(
    "kernel", [histogram, sums, ring, bulk_ring, async_sum, product, broadcast]
)
def test_kernels(run, kernel, finds_races):
    run.controls.find_races(finds_races)
    assert kernel(run, 0)


@pytest.mark.parametrize(
    ("size", "grid"), [((1, 1, 1), (3, 1, 1)), ((8, 1, 1), (16, 1, 1)), ((3, 2, 1), (6, 4, 1))]
)
def test_a_histogram_in_shared_memory_of_many_blocks(run, size, grid):
    assert histogram(run, 0, size, grid)
    (launch,) = run.controls.take_launches()
    assert (launch["grid"], launch["cluster"]) == (grid, size)


@pytest.mark.parametrize("blocks", [1, 2, 8])
def test_sizes(run, blocks):
    for kernel in (sums, ring, product):
        assert kernel(run, 0, blocks)
    assert ring(run, 0, blocks, steps=1)


@pytest.mark.parametrize(
    ("size", "grid"), [((2, 1, 1), (6, 1, 1)), ((2, 3, 1), (4, 3, 2)), ((1, 2, 2), (3, 2, 4))]
)
def test_registers_and_addresses(run, size, grid):
    blocks = np.prod(size)
    out = torch.zeros(*grid[::-1], 16, dtype=torch.int32)
    run("registers", out, grid=grid, cluster=size)
    for z, y, x in np.ndindex(*grid[::-1]):
        number, index = np.divmod((x, y, z), size)
        rank = index[0] + size[0] * (index[1] + size[1] * index[2])
        clusters = np.array(grid) // size
        other = 100 + blocks - 1 - rank
        expected = [*number, *clusters, *index, *size, rank, blocks, other, 3]
        assert out[z, y, x].tolist() == expected


def test_a_launch_without_clusters_has_clusters_of_one_block(run):
    out = torch.zeros(3, 16, dtype=torch.int32)
    run("registers", out, grid=(3, 1, 1))
    for block, row in enumerate(out.tolist()):
        assert row == [block, 0, 0, 3, 1, 1, 0, 0, 0, 1, 1, 1, 0, 1, 100, 1]


def test_threads_that_have_exited_are_not_waited_for(run):
    out = torch.zeros(3, dtype=torch.int32)
    run("early_exit", out, grid=(3, 1, 1), cluster=(3, 1, 1))
    assert out.tolist() == [1, 0, 1]


# ---- Mistakes ----

BLOCK = r"block \(\d, 0, 0\)"
AT = r"\S* at \S+( \(in \S+\))?"  # an instruction, and its line
THEIRS = rf"shared memory at offset \d+ of {BLOCK}, which"
ON_THEIR_WAY = rf"race: {AT}, but the bytes of {AT} are on their way"
EXITED = rf"{AT}: {BLOCK} has exited, whose shared memory it uses"
EXITS = "race: the block exits, and nothing orders that after"
MISTAKES = {
    (histogram, 1): rf"race: atom{AT} writes {THEIRS} st.shared|race: st.shared{AT} .* which atom",
    (histogram, 2): rf"race: ld.shared{AT} .* which atom|race: atom{AT} writes {THEIRS} ld.shared",
    (histogram, 3): rf"{EXITED}|{EXITS} atom{AT} of thread .* of {BLOCK}, which writes",
    (sums, 1): rf"race: ld.shared{AT} reads {THEIRS} st.shared|race: st.* which ld.shared|{EXITED}",
    (sums, 2): rf"{EXITED}|{EXITS} ld.shared{AT} of thread .* of {BLOCK}, which reads",
    (sums, 3): rf"mapa{AT}: rank 4 in a cluster of 4 blocks",
    (sums, 4): rf"ld.shared{AT}: 4 bytes at offset 384 are outside the block's 384 bytes of shared "
    rf"memory(, that is, those of {BLOCK})?\n.* thread \(95, 0, 0\)",
    (sums, 5): rf"race: ld.shared{AT} reads {THEIRS} st.shared",
    (sums, 6): rf"barrier.cluster.wait{AT}: no barrier.cluster.arrive before it\n.*\(40, 0, 0\)$",
    (sums, 7): rf"deadlock: 384 of 384 threads .*\n(.*\n)*  {BLOCK}: threads 40 to 40 wait at bar.s"
    r"ync at .*\n  .* threads 41 to 95 wait at barrier.cluster.wait at (.*\n)*  the cluster's bar"
    r"rier: 383 of 384 threads have arrived",
    (ring, 1): rf"deadlock: \d+ of 288 threads wait for ever\n  {BLOCK}: threads 0 to 95 wait at "
    r"mbarrier.try_wait(.*\n)*  mbarrier at offset \d+.*: 0 of 1 arrivals and 16 bytes to come",
    (ring, 2): r"race: |more arrivals than the 1 of the mbarrier",
    (ring, 3): rf"race: (mbarrier.arrive|st.async|cp.async){AT} writes {THEIRS} mbarrier.init",
    (ring, 4): rf"race: ld.shared{AT}.* st.async|race: st.async{AT}.* which ld.shared",
    (ring, 5): rf"st.async{AT}: the mbarrier at offset \d+ isn't in the block of the bytes at ",
    (bulk_ring, 1): r"deadlock: (.*\n)*  mbarrier at .*: 0 of 1 arrivals and 16 bytes to come",
    (bulk_ring, 3): rf"race: (mbarrier.arrive|st.async|cp.async){AT} writes {THEIRS} mbarrier.init",
    (bulk_ring, 4): r"race: (ld.shared|cp.async.bulk.shared::cluster.shared::cta)",
    (bulk_ring, 6): rf"cp.async.bulk.shared::cluster.shared::cta{AT}: no fence.proxy.async since",
    (async_sum, 1): rf"{ON_THEIR_WAY}|race: |{EXITED}|has exited before it is done",
    (product, 1): r"deadlock: (.*\n)*  mbarrier at offset \d+.* 0 of 1 arrivals and 2048 bytes to",
    (product, 2): rf"cp.async.bulk.tensor{AT}: rank 2 in a cluster of 2 blocks",
    (product, 3): r"race: |more arrivals than the 1 of the mbarrier",
    (product, 4): rf"race: \S+( .*)? writes {THEIRS} mbarrier.init",
    (product, 5): rf"{EXITED}|{EXITS} cp.async|cp.async.* the block has exited before it is done",
    (product, 6): rf"{ON_THEIR_WAY}|race: (ld.shared|cp.async)",
    (broadcast, 1): rf"{ON_THEIR_WAY}|race: (ld.shared|cp.async)",
    (broadcast, 2): rf"cp.async.bulk{AT}: its mask names no block",
    (broadcast, 3): rf"race: cp.async.bulk{AT} writes {THEIRS} mbarrier.init",
    (late_exit, 1): rf"{EXITS} ld.shared{AT} of thread .* of {BLOCK}, which reads its shared",
}  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES[:3], ids=["asc", "desc", "random"])
@pytest.mark.parametrize(("kernel", "bug"), MISTAKES)
def test_a_mistake_is_named_under_any_schedule(clusters, kernel, bug, schedule):
    clusters.controls.set_schedule(*schedule)
    clusters.controls.find_races(True)
    try:
        with pytest.raises(RuntimeError) as error:
            kernel(clusters, bug)
        assert re.search(MISTAKES[kernel, bug], str(error.value)), str(error.value)
        assert kernel(clusters, 0)  # what was abandoned doesn't disturb the next
    finally:
        clusters.controls.find_races(False)


@pytest.mark.parametrize(
    ("kernel", "bug"),
    [(histogram, 1), (histogram, 2), (sums, 1), (sums, 2), (ring, 2), (ring, 4), (product, 3)],
)
def test_mistakes_show_under_some_schedule(clusters, kernel, bug):
    def is_right(schedule):
        clusters.controls.set_schedule(*schedule)
        try:
            return kernel(clusters, bug)
        except RuntimeError:
            return False

    assert not all(is_right(schedule) for schedule in SCHEDULES)


def test_no_schedule_shows_a_sleep_in_the_place_of_a_barrier(run):
    assert late_exit(run, 0)
    assert late_exit(run, 1)
