"""weight_only_linear: a layer of int8 weights on inputs as they are.

One row of x takes as long as the weight is read: its products are summed in float32 by all threads.
More rows go through tensor cores in the dtype of x, which holds an int8 exactly; a group's scale is
applied to its sum.
"""

import math

import torch
import triton
import triton.language as tl
from bigkern.kernels import tuning
from bigkern.kernels.int8_call import as_rows, check_weight_only, read_bias, read_weight_scale
from bigkern.kernels.int8_mm import CHUNK, KINDS, chunked, load_floats
from torch import Tensor

# What scales belong to: whole rows, groups of whole runs of 32 weights, or groups of any size.
ROWS, RUNS, ANY = (tl.constexpr(n) for n in range(3))
RUN = tl.constexpr(32)

SIZES = ["M", "N", "K", "x_row", "w_row", "group_size", "num_groups", "bias_kind"]


@triton.jit
def load_scales(scale, j, k, N, K, group_size, num_groups):
    """Of rows j [n, 1] or [n] and columns k of the weight."""
    group = tl.minimum(k // group_size, num_groups - 1)
    return tl.load(scale + j.to(tl.int64) * num_groups + group, mask=(j < N) & (k < K), other=0.0)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["scale", "bias"])
def weight_only_row_kernel(
    x, w, scale, bias, out,  # X [M, K], W [N, K], SCALE [N, num_groups], BIAS [N], OUT [M, N]
    M, N, K, x_row, w_row,  # the last three in chunks
    group_size, num_groups, bias_kind,
    GROUPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A row of x; the programs of the same weights run together."""
    K *= CHUNK
    row, j = tl.program_id(0) % M, tl.program_id(0) // M * BLOCK_N + tl.arange(0, BLOCK_N)
    x += row.to(tl.int64) * (x_row.to(tl.int64) * CHUNK)
    w += tl.minimum(j, N - 1).to(tl.int64)[:, None] * (w_row.to(tl.int64) * CHUNK)

    # y = sum of x * w, k by k a partial sum  [BLOCK_N, BLOCK_K]
    sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for k_begin in range(0, K, BLOCK_K):
        k = k_begin + tl.arange(0, BLOCK_K)
        weights = tl.load(w + k[None, :], mask=(k < K)[None, :], other=0).to(tl.float32)
        if GROUPS == RUNS:
            run = k_begin + tl.arange(0, BLOCK_K // RUN) * RUN
            scales = load_scales(scale, j[:, None], run[None, :], N, K, group_size, num_groups)
            weights = weights.reshape(BLOCK_N, BLOCK_K // RUN, RUN) * scales[:, :, None]
            weights = weights.reshape(BLOCK_N, BLOCK_K)
        elif GROUPS == ANY:
            weights *= load_scales(scale, j[:, None], k[None, :], N, K, group_size, num_groups)
        sums += weights * tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
    y = tl.sum(sums, 1)

    if GROUPS == ROWS:
        y *= tl.load(scale + j, mask=j < N, other=0.0)
    y += load_floats(bias, bias_kind, j, j < N)
    tl.store(out + row.to(tl.int64) * N + j, y, mask=j < N)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["scale", "bias"])
def weight_only_kernel(
    x, w, scale, bias, out,  # as above
    M, N, K, x_row, w_row, group_size, num_groups, bias_kind,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    K *= CHUNK
    tiles_m = tl.cdiv(M, BLOCK_M)
    i = tl.program_id(0) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(0) // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    x += tl.minimum(i, M - 1).to(tl.int64)[:, None] * (x_row.to(tl.int64) * CHUNK)
    w += tl.minimum(j, N - 1).to(tl.int64)[None, :] * (w_row.to(tl.int64) * CHUNK)

    # S = X @ W^T * scale  [BLOCK_M, BLOCK_N], step by step: sums of products alone would be less
    # exact in float32, since the dot product adds one at a time
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    scales = load_scales(scale, j, 0, N, K, group_size, num_groups)
    for k_begin in range(0, K, BLOCK_K):
        k = k_begin + tl.arange(0, BLOCK_K)
        x_tile = tl.load(x + k[None, :], mask=(k < K)[None, :], other=0.0)
        w_tile = tl.load(w + k[:, None], mask=(k < K)[:, None], other=0).to(x_tile.dtype)
        if GROUPS == RUNS:
            scales = load_scales(scale, j, k_begin, N, K, group_size, num_groups)
        sums += tl.dot(x_tile, w_tile, input_precision="ieee") * scales[None, :]

    # Y = S + bias
    sums += load_floats(bias, bias_kind, j, j < N)[None, :]
    out += i.to(tl.int64)[:, None] * N + j[None, :]
    tl.store(out, sums, mask=(i < M)[:, None] & (j < N)[None, :])


# ---- Host ----


def weight_only_linear(
    x: Tensor,
    weight_q: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    group_size: int = 0,
) -> Tensor:
    check_weight_only(x, weight_q, weight_scale, group_size)
    scale = read_weight_scale(weight_scale, x)
    N, K = weight_q.shape
    bias = read_bias(bias, x, N)
    M = math.prod(x.shape[:-1])
    out = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)
    if M * N == 0:
        return out
    rows, weight = (chunked(matrix[None])[0] for matrix in (as_rows("x", x), weight_q))
    num_groups = scale.numel() // N if group_size else 1
    groups = ROWS if num_groups == 1 else ANY if group_size % RUN.value else RUNS
    arguments = (
        rows,
        weight,
        scale,
        (scale if bias is None else bias).view(torch.int8),
        out,
        M,
        N,
        *(n // CHUNK.value for n in (rows.size(1), rows.stride(0), weight.stride(0))),
        group_size or max(K, 1),
        num_groups,
        KINDS[None if bias is None else bias.dtype],
    )
    if M == 1 or groups is ANY:
        tile = tuning.lookup("weight_only_linear", x.dtype, M=1)
        grid = (M * triton.cdiv(N, tile["BLOCK_N"]),)
        weight_only_row_kernel[grid](*arguments, GROUPS=groups, **tile)
    else:
        tile = tuning.lookup("weight_only_linear", x.dtype, M=max(M, 16))
        if groups is RUNS:
            tile["BLOCK_K"] = min(tile["BLOCK_K"], RUN.value)
        grid = (triton.cdiv(M, tile["BLOCK_M"]) * triton.cdiv(N, tile["BLOCK_N"]),)
        weight_only_kernel[grid](*arguments, GROUPS=groups, **tile)
    return out
