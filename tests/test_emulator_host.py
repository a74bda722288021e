"""The host code of CUDA sources, in the emulator."""

import pytest
import torch
from cuda_compiler import ROOT
from emulator import build
from emulator_helpers import Kernels


@pytest.fixture(scope="module")
def twice():
    header = ROOT / "csrc/cuda/launch.cuh"
    Kernels("host_access", build.HERE / "kernels/host_access.cu", headers=(header,))
    return torch.ops.bigkern_host_access.twice


@pytest.mark.parametrize("n", [1, 7, 1000])
def test_device_memory_is_not_the_hosts(twice, n):
    x, out = torch.randn(n), torch.zeros(n)
    twice(x, out, 0)
    assert torch.equal(out, 2 * x)
    for bug in range(1, 5):
        with pytest.raises(RuntimeError, match="host code reads or writes device memory"):
            twice(x, out, bug)
    twice(x, out, 0)
