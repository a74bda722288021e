"""What the tests of swapping share."""

import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


class Attention(nn.Module):
    """Self-attention that calls torch's function."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.qkv, self.num_heads = nn.Linear(dim, 3 * dim), num_heads

    def forward(self, x):
        heads = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).transpose(1, -2)
        q, k, v = heads.unbind(-3)  # [N, H, L, E] each
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.transpose(1, 2).flatten(2)


class OpCounter(TorchDispatchMode):
    """Counts the calls of an op."""

    def __init__(self, op):
        super().__init__()
        self.op, self.count = op, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.name() == self.op
        return func(*args, **(kwargs or {}))


def snapshot(model):
    """All that a module is, to be compared: its class and attributes, tensors by identity."""
    return {
        module: (
            type(module),
            {k: dict(v) if isinstance(v, dict) else v for k, v in vars(module).items()},
        )
        for module in model.modules()
    }
