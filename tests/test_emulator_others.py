"""Instructions in the emulator that other compilers emit than nvcc's."""

import pytest
import torch
from emulator import build
from emulator_helpers import Kernels


@pytest.fixture(scope="module")
def run():
    kernels = Kernels("others", ptx=[build.HERE / "kernels/others.ptx"])
    kernels.controls.set_device("h100")
    return kernels


def fragments(matrices):
    """A lane's registers have two neighbours of a row each: [32, matrices, 2]."""
    return matrices.view(len(matrices), 32, 2).transpose(0, 1).contiguous()


@pytest.mark.parametrize("schedule", ["asc", "desc", "random"])
def test_stmatrix(run, schedule):
    run.controls.set_schedule(schedule)
    run.controls.find_races(True)
    matrices = torch.randint(-(2**15), 2**15, (4, 8, 8), dtype=torch.int16)
    out = torch.zeros_like(matrices)
    run("store_matrices", fragments(matrices), out)
    assert torch.equal(out, matrices)
    out = torch.zeros_like(matrices[:2])
    run("store_matrices_transposed", fragments(matrices[:2]), out)
    assert torch.equal(out, matrices[:2].mT)


def test_jumps_by_an_index(run):
    index = torch.randint(0, 3, (32,), dtype=torch.int32)
    out = torch.zeros_like(index)
    run("jump_by_index", index, out)
    assert torch.equal(out, 10 * (index + 1))
    with pytest.raises(RuntimeError, match="no such target"):
        run("jump_by_index", index.fill_(3), out)
