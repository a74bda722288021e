"""quantize_rows and quantize_rows_stochastic: rows of floats to int8 and a scale each.

A row is read twice, the second time from a cache mostly: first for its largest magnitude, then to
be divided by what 127 steps make of that.
"""

import torch
import triton
import triton.language as tl
from bigkern.kernels import tuning
from bigkern.kernels.int8_call import as_rows, check_stochastic, read_static_scale
from torch import Tensor

# Whose sum with x, from -127 to 127, has x in its last bits, rounded half to even: 1.5 * 2^23.
ROUNDER = tl.constexpr(12582912.0)
INFINITY = tl.constexpr(0x7F800000)
# Columns of a row come in so many at a time where rows begin at multiples of it, else one by one.
CHUNK = 16


@triton.jit
def magnitude(x):
    """|x| as an integer of the same order; INFINITY and what is larger are infinities and NaN."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def to_scale(largest, static_scale, is_static):
    """max|x| / 127, or a static scale; NaN where that is none or an element isn't finite."""
    scale = tl.div_rn(largest.to(tl.float32, bitcast=True), 127.0)
    if is_static:
        is_scale = (static_scale >= 0.0) & (magnitude(static_scale) < INFINITY)
        scale = tl.where(is_scale, static_scale, float("nan"))
    return tl.where(largest < INFINITY, scale, float("nan"))


@triton.jit
def saturate(steps, scale):
    """From -127 to 127; 0 where the scale is 0 or NaN."""
    return tl.where(scale > 0.0, tl.minimum(tl.maximum(steps, -127.0), 127.0), 0.0)


@triton.jit
def to_int8(x, scale):
    """round(x / scale), half to even; 0 where the scale is 0 or NaN."""
    return (saturate(tl.div_rn(x, scale), scale) + ROUNDER).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit(do_not_specialize=["rows", "cols", "x_row", "values_row", "static_stride"])
def quantize_rows_kernel(
    x, values, scale, static_scale,  # [rows, cols], [rows, values_row], [rows], [rows] or [1]
    rows, cols, x_row, values_row,  # all but rows in units of CHUNK
    static_stride, is_static,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_K)
    is_row = i < rows
    K, K_out = cols * CHUNK, values_row * CHUNK
    x += i[:, None] * (x_row.to(tl.int64) * CHUNK) + j[None, :]
    values += i[:, None] * (values_row.to(tl.int64) * CHUNK) + j[None, :]

    # s = max|x| / 127  [BLOCK_M]
    largest = tl.zeros((BLOCK_M, BLOCK_K), tl.int32)
    for k in range(0, K, BLOCK_K):
        v = tl.load(x + k, mask=is_row[:, None] & (k + j < K)[None, :], other=0.0)
        largest = tl.maximum(largest, magnitude(v.to(tl.float32)))
    fixed = tl.load(static_scale + i * static_stride, mask=is_row & (is_static != 0), other=0.0)
    s = to_scale(tl.max(largest, 1), fixed, is_static)
    tl.store(scale + i, s, mask=is_row)

    # q = x / s, rounded; 0 beyond the row's end
    for k in range(0, K_out, BLOCK_K):
        v = tl.load(x + k, mask=is_row[:, None] & (k + j < K)[None, :], other=0.0)
        q = to_int8(v.to(tl.float32), s[:, None])
        tl.store(values + k, q, mask=is_row[:, None] & (k + j < K_out)[None, :])


@triton.jit(do_not_specialize=["rows", "cols", "x_row", "has_factor"])
def quantize_rows_stochastic_kernel(
    x, values, scale, factor, philox,  # [rows, cols], the same, [rows], [cols], [2]
    rows, cols, x_row,  # the last two in units of CHUNK
    has_factor,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = i < rows
    K = cols * CHUNK
    x += i[:, None] * (x_row.to(tl.int64) * CHUNK)
    values += i[:, None] * (cols.to(tl.int64) * CHUNK)

    # s = max|x * factor| / 127  [BLOCK_M]
    largest = tl.zeros((BLOCK_M, BLOCK_K), tl.int32)
    for k in range(0, K, BLOCK_K):
        v = load_scaled(x, factor, (k + tl.arange(0, BLOCK_K))[None, :], K, is_row, has_factor)
        largest = tl.maximum(largest, magnitude(v))
    s = to_scale(tl.max(largest, 1), 0.0, False)
    tl.store(scale + i, s, mask=is_row)

    # q = floor(x * factor / s + u): a counter's words are for four columns, 16 apart
    seed, offset = tl.load(philox), tl.load(philox + 1).to(tl.int32)
    zeros = tl.zeros((BLOCK_M, BLOCK_K // 4), tl.int32)
    for k in range(0, K, BLOCK_K):
        n = k // 4 + tl.arange(0, BLOCK_K // 4)
        counter = n[None, :] + zeros, i.to(tl.int32)[:, None] + zeros
        word0, word1, word2, word3 = tl.philox(seed, counter[0], counter[1], zeros, offset + zeros)
        column = n // 16 * 64 + n % 16
        round_randomly(x, factor, values, word0, column, K, s, is_row, has_factor)
        round_randomly(x, factor, values, word1, column + 16, K, s, is_row, has_factor)
        round_randomly(x, factor, values, word2, column + 32, K, s, is_row, has_factor)
        round_randomly(x, factor, values, word3, column + 48, K, s, is_row, has_factor)


@triton.jit
def load_scaled(x, factor, column, K, is_row, has_factor):
    v = tl.load(x + column, mask=is_row[:, None] & (column < K), other=0.0).to(tl.float32)
    if has_factor:
        v *= tl.load(factor + column, mask=column < K, other=0.0)
    return v


@triton.jit
def round_randomly(x, factor, values, word, column, K, scale, is_row, has_factor):
    column = column[None, :]
    v = load_scaled(x, factor, column, K, is_row, has_factor)
    u = (word >> 8).to(tl.float32) * (2.0**-24)  # from 0 to below 1
    steps = saturate(tl.floor(tl.div_rn(v, scale[:, None]) + u), scale[:, None])
    tl.store(values + column, steps.to(tl.int8), mask=is_row[:, None] & (column < K))


# ---- Host ----


def chunk_of(x: Tensor, *sizes: int) -> int:
    """The unit of sizes for the kernels: CHUNK where all are multiples of it, x's rows lie at such
    and its first at 16 bytes."""
    strides = (x.stride(0),) if x.size(0) > 1 else ()
    is_aligned = all(n % CHUNK == 0 for n in (*sizes, *strides)) and x.data_ptr() % 16 == 0
    return CHUNK if is_aligned else 1


def quantize(x: Tensor, values: Tensor, scale: Tensor, static_scale: Tensor | None) -> None:
    """Fills values [rows, K or more], with zeros beyond, and scale [rows] from x [rows, K]."""
    rows, K = x.shape
    if rows == 0:
        return
    chunk, tile = chunk_of(x, K, values.size(1)), tuning.lookup("quantize_rows", x.dtype, K=K)
    quantize_rows_kernel[(triton.cdiv(rows, tile["BLOCK_M"]),)](
        x,
        values,
        scale,
        scale if static_scale is None else static_scale,
        rows,
        K // chunk,
        x.stride(0) // chunk,
        values.size(1) // chunk,
        int(static_scale is not None and static_scale.numel() > 1),
        static_scale is not None,
        CHUNK=chunk,
        **tile,
    )


def quantize_rows(x: Tensor, static_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    rows = as_rows("x", x)
    static_scale = read_static_scale("static_scale", static_scale, x)
    values = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    quantize(rows, values.view(rows.shape), scale, static_scale)
    return values, scale


def quantize_rows_stochastic(
    x: Tensor, philox: Tensor, factor: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    check_stochastic(x, philox, factor)
    x = as_rows("x", x)
    M, K = x.shape
    values = torch.empty((M, K), dtype=torch.int8, device=x.device)
    scale = torch.empty(M, dtype=torch.float32, device=x.device)
    if M:
        chunk, tile = chunk_of(x, K), tuning.lookup("quantize_rows", x.dtype, K=K)
        quantize_rows_stochastic_kernel[(triton.cdiv(M, tile["BLOCK_M"]),)](
            x,
            values,
            scale,
            scale if factor is None else factor.contiguous(),
            philox.contiguous(),
            M,
            K // chunk,
            x.stride(0) // chunk,
            factor is not None,
            CHUNK=chunk,
            **tile,
        )
    return values, scale
