"""Memory grows with the lengths, not with their product."""

from pathlib import Path

import pytest
import torch

from bigkern import scaled_dot_product_attention

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident(field):
    """Bytes."""
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


@pytest.mark.skipif(not CLEAR_REFS.exists(), reason="needs Linux's /proc")
def test_forward_and_backward_take_less_than_64_mib():
    """The scores of one head alone would take 256 MiB."""
    L = 8192
    q, k, v = (torch.randn(1, 2, L, 32, requires_grad=True) for _ in range(3))
    grad = torch.randn(1, 2, L, 32)
    small = [x[:, :, :512] for x in (q, k, v)]
    torch.autograd.grad(scaled_dot_product_attention(*small), small, grad[:, :, :512])  # warm-up
    CLEAR_REFS.write_text("5")  # the peak is now what is resident
    before = resident("VmRSS")
    out = scaled_dot_product_attention(q, k, v, is_causal=True)
    results = [out, *torch.autograd.grad(out, (q, k, v), grad)]
    assert resident("VmHWM") - before - sum(x.nbytes for x in results) < 64 << 20
