"""Each row of the tables of tile sizes, compiled for its card, which needn't be there."""

import pytest
import torch

pytest.importorskip("triton", reason="torch for CPUs comes without Triton")

import triton_kernels
import triton_static
from bigkern.kernels import tuning
from triton.language import float32
from triton.runtime.errors import OutOfResources


@pytest.mark.parametrize("architecture", tuning.ARCHITECTURES)
def test_rows_of_adam_compile_and_fit(architecture, monkeypatch):
    monkeypatch.delenv("BIGKERN_TUNING", raising=False)
    rows = [row for row in tuning.rows(architecture) if row["op"] == "adam_"]
    assert rows
    assert [fault for row in rows for fault in triton_static.faults(architecture, row)] == []


@pytest.mark.slow
@pytest.mark.parametrize("architecture", tuning.ARCHITECTURES)
def test_rows_compile_and_fit(architecture, monkeypatch):
    monkeypatch.delenv("BIGKERN_TUNING", raising=False)
    assert triton_static.all_faults(architecture, tuning.rows(architecture)) == []


@pytest.mark.parametrize(
    ("architecture", "size", "spills"),
    [("sm_80", 1024, False), ("sm_80", 16384, True), ("gfx942", 1024, False)],
)
def test_spills_are_seen(architecture, size, spills):
    launch = triton_kernels.hundreds_of_registers[(1,)]
    x = torch.zeros(size)
    (kernel,) = triton_static.compiled(architecture, lambda: launch(x, size, num_warps=1))
    assert (kernel.spilled_bytes > 0) == spills
    assert kernel.registers > 8


def test_too_much_shared_memory_is_refused():
    x, y = torch.zeros(256, 256, dtype=torch.float16), torch.zeros(256, 256)
    launch = triton_kernels.matmul[(1, 1)]
    arguments = (x, x, y, 256, 256, 256, 128, 128, 128, float32)

    def call(num_stages):
        launch(*arguments, num_warps=8, num_stages=num_stages)

    (kernel,) = triton_static.compiled("sm_80", lambda: call(3))
    assert kernel.smem > triton_static.LIMITS["sm_120"]
    with pytest.raises(OutOfResources, match=r"shared memory, Required: .*limit: 101376"):
        triton_static.compiled("sm_120", lambda: call(4))
