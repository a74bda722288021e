"""What the attention kernels take, made of an op's arguments."""

from typing import NamedTuple

import torch
import triton
from bigkern.kernels.attention_arguments import Arguments
from torch import Tensor


class Operand(NamedTuple):
    """A tensor over (batch entry, head, row, column): strides in elements, that of columns is 1."""

    data: Tensor
    batch: int
    head: int
    row: int


class Mask(NamedTuple):
    data: Tensor
    batch: int
    head: int
    row: int
    col: int
    is_there: int


class Slopes(NamedTuple):
    data: Tensor
    batch: int
    head: int
    are_there: int


class Dropout(NamedTuple):
    """16 random bits below the threshold drop a weight."""

    philox: Tensor  # seed and, a stride on, offset
    stride: int
    threshold: int


class Lengths(NamedTuple):
    """Of sequences: as many rows as there are, or int32 lengths [batch], or starts [batch + 1]."""

    data: Tensor
    kind: int  # 0, 1, 2
    rows: int


class Problem(NamedTuple):
    """What attention computes, for kernels.

    Triton compiles a kernel for integers that are 1 or multiples of 16 and another for the rest,
    of each argument. So that there is one kernel, all integers are multiplied by 16, and divided
    where they are used (`attention_tile.plain`).
    """

    query: Operand
    key: Operand
    value: Operand
    out: Operand
    row_max: Tensor
    row_sum: Tensor
    stats: Operand  # how they, and what else there is by row, lie: without data
    mask: Mask
    slopes: Slopes
    dropout: Dropout
    queries: Lengths
    keys: Lengths
    heads: int
    group: int  # heads of queries that share their keys
    head_dim: int
    value_dim: int
    # The keys of query i end with i + 1 + ahead, and with its diagonal + 1 + right, if not before.
    ahead: int
    left: int
    right: int
    scale: float
    softcap: float
    keep_scale: float


def scaled(n: int) -> int:
    return 16 * n


def operand(x: Tensor, is_packed: bool) -> Operand:
    """Of [B, H, L, E], or packed [total, H, E]; a copy where features don't lie side by side."""
    if x.stride(-1) != 1 and x.size(-1) > 1:
        x = x.contiguous()
    strides = (0, x.stride(1), x.stride(0)) if is_packed else x.stride()[:3]
    return Operand(x, *map(scaled, strides))


def is_vectorized(x: Operand, cols: int) -> bool:
    """Whether rows of `cols` elements are whole vectors of 16 bytes, at multiples of them."""
    chunk = 16 // x.data.element_size()
    numbers = (cols, *(n // 16 for n in x[1:]))
    return all(n % chunk == 0 for n in numbers) and x.data.data_ptr() % 16 == 0


def block_of(features: int) -> int:
    """Columns of a tile: what products take at least."""
    return max(16, triton.next_power_of_2(features))


def empty_like_attention(x: Tensor, features: int) -> Tensor:
    """[B, H, L, E], or [B, L, H, E] transposed where `x` is so in memory; or packed."""
    if x.dim() == 4 and x.stride(1) < x.stride(2):
        B, H, L, _ = x.shape
        return x.new_empty(B, L, H, features).transpose(1, 2)
    return x.new_empty(*x.shape[:-1], features)


class Call(Arguments):
    """A call of an attention op."""

    def empty_stats(self) -> Tensor:
        return self.query.new_empty(self.stats_shape(), dtype=torch.float32)

    def problem(self, row_max: Tensor, row_sum: Tensor, out: Tensor | None = None) -> Problem:
        kept = 65536 - self.threshold
        unbounded = self.max_q_len + self.max_k_len
        left, right = (
            min(n, unbounded) if n >= 0 else unbounded
            for n in (self.window_left, self.window_right)
        )
        query, key = (operand(x, self.is_packed) for x in (self.query, self.key))
        value = key if self.value is None else operand(self.value, self.is_packed)
        stats = (0, row_max.stride(0), 1) if self.is_packed else row_max.stride()
        return Problem(
            query,
            key,
            value,
            query if out is None else operand(out, self.is_packed),
            row_max,
            row_sum,
            Operand(None, *map(scaled, stats)),
            self._mask(row_max),
            self._slopes(row_max),
            self._dropout(row_max),
            self._lengths(self.cu_seqlens_q, self.seqlens_q, self.query, row_max),
            self._lengths(self.cu_seqlens_k, self.seqlens_k, self.key, row_max),
            scaled(self.heads),
            scaled(self.group),
            scaled(self.query.size(-1)),
            scaled(self.value_dim),
            scaled(0 if self.is_causal else unbounded),
            scaled(left),
            scaled(right),
            self.scale,
            self.softcap,
            65536 / kept if kept else 0.0,
        )

    # ---- What isn't there has the address of something that is: `any_` is of float32. ----

    def _mask(self, any_: Tensor) -> Mask:
        mask = self.attn_mask
        if mask is None:
            return Mask(any_, 0, 0, 0, 0, 0)
        strides = [0 if n == 1 else x for n, x in zip(mask.shape, mask.stride(), strict=True)]
        data = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
        return Mask(data, *map(scaled, strides), scaled(1))

    def _slopes(self, any_: Tensor) -> Slopes:
        slopes = self.alibi_slopes
        if slopes is None:
            return Slopes(any_, 0, 0, 0)
        batch = slopes.stride(0) if slopes.dim() == 2 else 0
        return Slopes(slopes, *map(scaled, (batch, slopes.stride(-1), 1)))

    def _dropout(self, any_: Tensor) -> Dropout:
        if not self.threshold:
            return Dropout(any_.new_empty(0, dtype=torch.int64), 0, 0)
        return Dropout(self.philox, scaled(self.philox.stride(0)), scaled(self.threshold))

    def _lengths(self, starts, lengths, rows_of: Tensor, any_: Tensor) -> Lengths:
        rows = rows_of.size(0 if self.is_packed else 2)
        if starts is not None:
            return Lengths(starts, scaled(2), scaled(rows))
        if lengths is not None:
            return Lengths(lengths, scaled(1), scaled(rows))
        return Lengths(any_.view(torch.int32), 0, scaled(rows))
