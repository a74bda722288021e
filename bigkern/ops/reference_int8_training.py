"""The ops of int8_training.py in plain PyTorch: the definition of what backends compute."""

import math

import torch
from torch import Tensor

from bigkern.ops.reference import philox as philox_words
from bigkern.ops.reference_int8 import int8_mm, row_scale


def uniform(philox: Tensor, shape: tuple[int, int]) -> Tensor:
    """Numbers [rows, columns] from 0 to below 1, of 24 random bits: of Philox 4x32-10 with the
    counter (16 floor(j / 64) + j mod 16, i, 0, offset) word floor((j mod 64) / 16)."""
    i, j = (torch.arange(n) for n in shape)
    seed, offset = philox.cpu().unbind()
    low = 0xFFFFFFFF
    counter = torch.broadcast_tensors(j // 64 * 16 + j % 16, i[:, None], torch.tensor(0), offset)
    words = philox_words([c & low for c in counter], [seed & low, seed >> 32 & low])
    words = torch.stack(words, -1)[..., torch.arange(len(j)), j % 64 // 16]
    return (words >> 8).float() * 2.0**-24


def quantize_rows_stochastic(
    x: Tensor, philox: Tensor, factor: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    x = x.float() if factor is None else x.float() * factor
    scale = torch.where(x.isfinite().all(-1), row_scale(x), math.nan)
    steps = (x / scale[:, None] + uniform(philox, x.shape).to(x.device)).floor().clamp(-127, 127)
    return torch.where(scale[:, None] > 0, steps, 0).to(torch.int8), scale


def int8_scaled_mm(
    a: Tensor,
    b: Tensor,
    row_scale: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """What follows the product of integers is computed in `dtype`."""
    return (int8_mm(a, b).to(dtype) * row_scale.to(dtype)[:, None]).to(out_dtype or torch.float32)
