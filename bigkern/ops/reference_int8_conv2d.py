"""int8_conv2d in plain PyTorch: the definition of what backends compute."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from bigkern.ops.reference_int8 import ACTIVATIONS, quantize_rows


def exact_conv2d(
    values: Tensor,
    weight_q: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Exact in float64."""
    top, bottom, left, right = padding
    padded = F.pad(values.double(), (left, right, top, bottom))
    return F.conv2d(padded, weight_q.double(), None, stride, 0, dilation, groups)


def int8_conv2d(
    x: Tensor,
    weight_q: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    x_scale: Tensor | None = None,
    *,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
    dtype: torch.dtype = torch.float32,
    conv2d: Callable[..., Tensor] = exact_conv2d,
) -> Tensor:
    """What follows the product of integers, `conv2d`, is computed in `dtype`."""
    values, scale = quantize_rows(x.flatten(1), x_scale)
    values = values.view(x.shape)
    product = conv2d(values, weight_q, stride, padding, dilation, groups).to(dtype)
    out = product * (scale.to(dtype)[:, None] * weight_scale.to(dtype))[..., None, None]
    if bias is not None:
        out = out + bias.to(dtype)[:, None, None]
    return ACTIVATIONS[activation](out).to(out_dtype or x.dtype)
