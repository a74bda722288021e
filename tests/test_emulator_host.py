"""The host code of CUDA sources, in the emulator."""

import pytest
import torch
from emulator import build
from emulator_helpers import Kernels


@pytest.fixture(scope="module")
def twice():
    Kernels("host_access", build.HERE / "kernels/host_access.cu")
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


@pytest.mark.parametrize("architectures", [("80",), ("80", "90a"), ("90a",)])
def test_a_card_takes_the_newest_code_that_runs_on_it(architectures):
    source = build.HERE / "kernels/architectures.cu"
    name = f"architectures_{'_'.join(architectures)}"
    run = Kernels(name, source, architectures=architectures)
    out = torch.zeros(2, dtype=torch.int32)
    for _ in range(2):
        run.controls.set_device("h100")
        run("architecture", out)
        newest = architectures[-1]
        assert out.tolist() == [int(newest.rstrip("a")) * 10, newest == "90a"]
        run.controls.set_device("a100")
        if "80" in architectures:
            run("architecture", out)
            assert out.tolist() == [800, 0]
        else:
            with pytest.raises(RuntimeError, match="no kernel image is available"):
                run("architecture", out)
