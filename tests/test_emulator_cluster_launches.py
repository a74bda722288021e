"""How clusters are launched in the emulator, by the CUDA runtime's own calls, and what it refuses."""

import pytest
import torch
from emulator import build
from emulator_helpers import Kernels

ANY_SIZE, OF_TWO, OF_LAUNCH, AT_MOST_FOUR = range(4)
INVALID_CLUSTER_SIZE, NOT_PERMITTED, NO_KERNEL_IMAGE = 912, 800, 209  # cudaError_t


@pytest.fixture(scope="module")
def kernels():
    source = build.HERE / "kernels/cluster_launches.cu"
    return Kernels("cluster_launches", source, architectures=["80", "90a"])


@pytest.fixture(autouse=True)
def device(kernels):
    yield kernels.controls
    kernels.controls.set_device("h100")


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
        (INVALID_CLUSTER_SIZE, {"kernel": ANY_SIZE, "cluster": (3, 1)}),  # of a grid of 8 x 2
        (INVALID_CLUSTER_SIZE, {"kernel": ANY_SIZE, "cluster": (1, 4)}),
        (INVALID_CLUSTER_SIZE, {"kernel": ANY_SIZE, "cluster": (4, 0)}),
        (INVALID_CLUSTER_SIZE, {"kernel": ANY_SIZE, "cluster": (8, 2)}),
        (INVALID_CLUSTER_SIZE, {"kernel": ANY_SIZE, "cluster": (16, 2), "grid": 16, "allows_large": 1}),
        (INVALID_CLUSTER_SIZE, {"kernel": OF_TWO, "grid": 7}),
        (INVALID_CLUSTER_SIZE, {"kernel": OF_TWO, "cluster": (4, 1)}),
        (INVALID_CLUSTER_SIZE, {"kernel": OF_LAUNCH}),
        (INVALID_CLUSTER_SIZE, {"kernel": ANY_SIZE, "width": 4, "cluster": (2, 1)}),
        (INVALID_CLUSTER_SIZE, {"kernel": AT_MOST_FOUR, "cluster": (4, 2)}),
        (NOT_PERMITTED, {"kernel": OF_TWO, "width": 2}),
    ],
)  # fmt: skip
def test_launches_that_a_card_refuses(error, options):
    assert launch(**options) == error
    assert launch(ANY_SIZE) == (1, 1, 1)


def test_older_cards_have_no_clusters(device):
    source = build.HERE / "kernels/clusters.cu"
    run = Kernels("clusters", source, build.HERE / "kernels/cluster_products.cu", architectures=["90a"])
    device.set_device("a100")
    run.controls.set_device("a100")
    with pytest.raises(RuntimeError, match="no kernel image is available"):
        run("registers", torch.zeros(16, dtype=torch.int32))
