"""Memory grows with the lengths, not with their product."""

from pathlib import Path

import pytest
import torch

from bigkern import scaled_dot_product_attention
from bigkern.testing import memory_beyond_results


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_forward_and_backward_take_less_than_64_mib():
    """The scores of one head alone would take 256 MiB."""
    L = 8192
    q, k, v = (torch.randn(1, 2, L, 32, requires_grad=True) for _ in range(3))
    grad = torch.randn(1, 2, L, 32)
    small = [x[:, :, :512] for x in (q, k, v)]
    torch.autograd.grad(scaled_dot_product_attention(*small), small, grad[:, :, :512])  # warm-up

    def step():
        out = scaled_dot_product_attention(q, k, v, is_causal=True)
        return [out, *torch.autograd.grad(out, (q, k, v), grad)]

    assert memory_beyond_results(step) < 64 << 20
