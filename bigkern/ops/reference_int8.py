"""The int8 ops in plain PyTorch: the definition of what backends compute."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS = {
    None: lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def int8_mm(a: Tensor, b: Tensor) -> Tensor:
    """Exact in float64 (K < 2**39), then modulo 2**32."""
    return (a.double() @ b.double()).long().int()


def row_scale(x: Tensor) -> Tensor:
    """By a division proper: by a number that isn't a tensor, a GPU multiplies by the reciprocal."""
    largest = x.abs().amax(-1) if x.size(-1) else x.new_zeros(x.shape[:-1])
    return largest / largest.new_full((), 127)


def quantize_rows(x: Tensor, static_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    x = x.float()
    scale = row_scale(x) if static_scale is None else static_scale.expand(x.shape[:-1])
    scale = torch.where(x.isfinite().all(-1), scale, math.nan)
    steps = (x / scale[..., None]).round().clamp(-127, 127)
    return torch.where(scale[..., None] > 0, steps, 0).to(torch.int8), scale


def int8_linear(
    x: Tensor,
    weight_q: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    x_scale: Tensor | None = None,
    *,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """What follows the product of integers is computed in `dtype`."""
    values, scale = quantize_rows(x, x_scale)
    product = int8_mm(values, weight_q.T).to(dtype)
    out = product * (scale.to(dtype)[..., None] * weight_scale.to(dtype))
    if bias is not None:
        out = out + bias.to(dtype)
    return ACTIVATIONS[activation](out).to(out_dtype or x.dtype)


def dequantize(
    weight_q: Tensor, weight_scale: Tensor, group_size: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The weight [N, K] that integers and scales stand for, in `dtype`."""
    scale = weight_scale.to(dtype)
    if group_size:
        scale = scale.repeat_interleave(group_size, 1)[:, : weight_q.size(1)]
    else:
        scale = scale[:, None]
    return weight_q.to(dtype) * scale


def weight_only_linear(
    x: Tensor,
    weight_q: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    group_size: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    weight = dequantize(weight_q, weight_scale, group_size, dtype)
    return F.linear(x.to(dtype), weight, None if bias is None else bias.to(dtype)).to(x.dtype)
