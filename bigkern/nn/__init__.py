"""Layers, drop-in for :mod:`torch.nn`'s."""

from bigkern.nn.attention import MultiheadAttention

__all__ = ["MultiheadAttention"]
