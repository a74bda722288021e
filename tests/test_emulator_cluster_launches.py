"""Launches of clusters by the CUDA runtime's own calls, in the emulator, and what it refuses."""

import pytest
import torch
from emulator import build
from emulator_helpers import Kernels

ANY_SIZE, OF_TWO, OF_LAUNCH, AT_MOST_FOUR = range(4)
BAD_CLUSTER, NOT_PERMITTED = 912, 800  # cudaError_t


@pytest.fixture(scope="module", autouse=True)
def kernels():
    Kernels("cluster_launches", build.HERE / "kernels/cluster_launches.cu", architectures=["90a"])


def launch(kernel, grid=8, cluster=(0, 0), width=0, allows_large=0):
    out = torch.zeros(3, dtype=torch.int32)
    error = torch.ops.bigkern_cluster_launches.launch(
        out, kernel, grid, *cluster, width, allows_large
    )
    return error or tuple(out.tolist())


@pytest.mark.parametrize(
    ("expected", "options"),
    [
        ((1, 1, 1), {"kernel": ANY_SIZE}),
        ((4, 2, 1), {"kernel": ANY_SIZE, "cluster": (4, 2)}),
        ((2, 1, 1), {"kernel": OF_TWO}),
        ((2, 1, 1), {"kernel": OF_TWO, "cluster": (2, 1)}),
        ((1, 2, 1), {"kernel": OF_LAUNCH, "cluster": (1, 2)}),
        ((4, 1, 1), {"kernel": ANY_SIZE, "width": 4}),
        ((8, 2, 1), {"kernel": ANY_SIZE, "cluster": (8, 2), "allows_large": 1}),
        ((4, 1, 1), {"kernel": AT_MOST_FOUR, "cluster": (4, 1)}),
    ],
)
def test_sizes_come_from_the_kernel_or_the_launch(expected, options):
    assert launch(**options) == expected


@pytest.mark.parametrize(
    ("error", "options"),
    [
        (BAD_CLUSTER, {"kernel": ANY_SIZE, "cluster": (3, 1)}),  # of a grid of 8 x 2
        (BAD_CLUSTER, {"kernel": ANY_SIZE, "cluster": (1, 4)}),
        (BAD_CLUSTER, {"kernel": ANY_SIZE, "cluster": (4, 0)}),
        (BAD_CLUSTER, {"kernel": ANY_SIZE, "cluster": (8, 2)}),
        (BAD_CLUSTER, {"kernel": ANY_SIZE, "cluster": (16, 2), "grid": 16, "allows_large": 1}),
        (BAD_CLUSTER, {"kernel": OF_TWO, "grid": 7}),
        (BAD_CLUSTER, {"kernel": OF_TWO, "cluster": (4, 1)}),
        (BAD_CLUSTER, {"kernel": OF_LAUNCH}),
        (BAD_CLUSTER, {"kernel": ANY_SIZE, "width": 4, "cluster": (2, 1)}),
        (BAD_CLUSTER, {"kernel": AT_MOST_FOUR, "cluster": (4, 2)}),
        (NOT_PERMITTED, {"kernel": OF_TWO, "width": 2}),
    ],
)  # fmt: skip
def test_launches_that_a_card_refuses(error, options):
    assert launch(**options) == error
    assert launch(ANY_SIZE) == (1, 1, 1)


def test_older_cards_have_no_clusters():
    run = Kernels("launches_80", build.HERE / "kernels/bugs.cu")
    out = torch.empty(64)
    arguments = {"grid": (2, 1, 1), "block": (64, 1, 1)}
    run("deadlock", out, 0, cluster=(2, 1, 1), **arguments)
    run.controls.set_device("a100")
    run("deadlock", out, 0, **arguments)
    with pytest.raises(RuntimeError, match="cluster misconfiguration"):
        run("deadlock", out, 0, cluster=(2, 1, 1), **arguments)
