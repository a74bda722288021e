"""attention_backward in Triton: the gradient of an additive mask. A block owns a tile of its
elements and goes over all that they are broadcast to, in one order, without atomics."""

import torch
import triton
import triton.language as tl
from bigkern.kernels import tuning
from bigkern.kernels.attention_backward_tile import (
    Gradients,
    differentiate,
    load_stats,
    stats_as_column,
)
from bigkern.kernels.attention_call import Call, Mask, Problem, is_vectorized, scaled
from bigkern.kernels.attention_tile import (
    are_kept,
    as_column,
    keys_of,
    plain,
    products_by_steps,
    queries_at,
    sequence_of,
    wide,
)
from torch import Tensor


@triton.jit(do_not_specialize=["mask_batch", "mask_heads", "mask_rows", "mask_cols", "batch"])
def mask_kernel(
    p, g, grad, mask_batch, mask_heads, mask_rows, mask_cols, batch, VECTORIZED: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
):  # fmt: skip
    # What the tile's elements, from (mask_b, mask_h, mask_i, mask_j) on, are broadcast to.
    block = tl.program_id(0)
    mask_j = block % tl.cdiv(mask_cols, BLOCK_KV) * BLOCK_KV
    block //= tl.cdiv(mask_cols, BLOCK_KV)
    mask_i = block % tl.cdiv(mask_rows, BLOCK_Q) * BLOCK_Q
    block //= tl.cdiv(mask_rows, BLOCK_Q)
    mask_h, mask_b = block % mask_heads, block // mask_heads
    end_b = tl.where(mask_batch == 1, batch, mask_b + 1)
    end_h = tl.where(mask_heads == 1, plain(p.heads), mask_h + 1)
    shares_rows, shares_cols = mask_rows == 1, mask_cols == 1

    # A long sum in float32, with what its roundings lost: Kahan 1965.
    total = tl.zeros([BLOCK_Q, BLOCK_KV], tl.float32)
    excess = tl.zeros([BLOCK_Q, BLOCK_KV], tl.float32)
    for b in range(mask_b, end_b):
        s = sequence_of(p, b)
        end_i = tl.where(shares_rows, s.q_len, tl.minimum(s.q_len, mask_i + BLOCK_Q))
        for h in range(mask_h, end_h):
            for i in range(mask_i, end_i, BLOCK_Q):
                query = i + tl.arange(0, BLOCK_Q)
                is_query = query < s.q_len
                queries = queries_at(p, s, h, query, is_query)
                stats = load_stats(p, g, s, h, query, True, False)
                # The keys that some of the queries meet.
                begin = keys_of(p, s, i).begin // BLOCK_KV * BLOCK_KV
                end = keys_of(p, s, tl.minimum(i + BLOCK_Q, s.q_len) - 1).end
                begin = tl.maximum(begin, mask_j)
                end = tl.where(shares_cols, end, tl.minimum(end, mask_j + BLOCK_KV))
                for j in range(begin, end, BLOCK_KV):
                    key = j + tl.arange(0, BLOCK_KV)
                    is_key = key < s.k_len
                    kv_head = h // plain(p.group)
                    # S = Q @ K^T,  dP = dO @ V^T  [BLOCK_Q, BLOCK_KV]
                    products = products_by_steps(
                        p.query, h, s.q_begin + query, is_query,
                        p.key, kv_head, s.k_begin + key, is_key, b, p.head_dim, VECTORIZED,
                    )  # fmt: skip
                    grad_weights = products_by_steps(
                        g.out, h, s.q_begin + query, is_query,
                        p.value, kv_head, s.k_begin + key, is_key, b, p.value_dim, VECTORIZED,
                    )  # fmt: skip
                    is_kept = are_kept(p, s, queries, j, BLOCK_Q, BLOCK_KV)
                    grad_scores = differentiate(
                        p, as_column(queries), stats_as_column(stats, False), key[None, :],
                        products, grad_weights, is_kept, True, False,
                    )[1]  # fmt: skip
                    term = grad_scores - excess
                    next_total = total + term
                    excess = (next_total - total) - term
                    total = next_total

    # Sums over the rows and columns that share an element.
    row, col = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_KV)
    sums = total.to(tl.float64) - excess.to(tl.float64)
    if shares_rows:
        sums = tl.zeros_like(sums) + tl.sum(sums, 0)[None, :]
    if shares_cols:
        sums = tl.zeros_like(sums) + tl.sum(sums, 1)[:, None]
    is_there = (mask_i + row < mask_rows)[:, None] & (mask_j + col < mask_cols)[None, :]
    at = mask_b * wide(grad.batch) + mask_h * wide(grad.head)
    at += ((mask_i + row) * wide(grad.row))[:, None] + (mask_j + col)[None, :]
    sums = sums.to(tl.float32).to(grad.data.dtype.element_ty)
    tl.store(grad.data + at, sums, mask=is_there)


def mask_grad(call: Call, p: Problem, g: Gradients) -> Tensor:
    mask = call.attn_mask
    grad = torch.empty_like(mask, memory_format=torch.contiguous_format)
    if grad.numel() == 0:
        return grad
    B, H, rows, cols = mask.shape
    tile = tuning.lookup("attention_mask", call.query.dtype)
    num_blocks = B * H * triton.cdiv(rows, tile["BLOCK_Q"]) * triton.cdiv(cols, tile["BLOCK_KV"])
    strides = Mask(grad, *map(scaled, grad.stride()), scaled(1))
    E, Ev = call.query.size(-1), call.value_dim
    operands = ((p.query, E), (p.key, E), (p.value, Ev), (g.out, Ev))
    vectorized = all(is_vectorized(x, n) for x, n in operands)
    mask_kernel[(num_blocks,)](
        p, g, strides, B, H, rows, cols, call.batch, VECTORIZED=vectorized, **tile
    )
    return grad
