"""attention_weights in Triton: the softmax itself, or its mean over the heads."""

import triton
import triton.language as tl
from bigkern.kernels import tuning
from bigkern.kernels.attention_arguments import require
from bigkern.kernels.attention_call import Call, is_vectorized
from bigkern.kernels.attention_tile import (
    LOG2E,
    are_kept,
    as_column,
    capped,
    masked,
    plain,
    products_by_steps,
    queries_at,
    sequence_of,
    stats_at,
)
from torch import Tensor


@triton.jit(do_not_specialize=["L", "S", "heads_at_once"])
def weights_kernel(
    p, weights, L, S, heads_at_once, VECTORIZED: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):  # fmt: skip
    """A block has a tile of queries and one of keys: of one head, or of all, whose mean it
    writes."""
    block = tl.program_id(0)
    j = block % tl.cdiv(S, BLOCK_KV) * BLOCK_KV
    block //= tl.cdiv(S, BLOCK_KV)
    i = block % tl.cdiv(L, BLOCK_Q) * BLOCK_Q
    block //= tl.cdiv(L, BLOCK_Q)
    num_groups = plain(p.heads) // heads_at_once
    b, first_head = block // num_groups, block % num_groups * heads_at_once
    s = sequence_of(p, b)
    query, key = i + tl.arange(0, BLOCK_Q), j + tl.arange(0, BLOCK_KV)
    is_query, is_key = query < s.q_len, key < s.k_len

    mean = tl.zeros([BLOCK_Q, BLOCK_KV], tl.float32)
    for h in range(first_head, first_head + heads_at_once):
        # S = Q @ K^T  [BLOCK_Q, BLOCK_KV]
        products = products_by_steps(
            p.query, h, s.q_begin + query, is_query,
            p.key, h // plain(p.group), s.k_begin + key, is_key, b, p.head_dim, VECTORIZED,
        )  # fmt: skip

        # P = exp(S - row_max) / row_sum
        queries = queries_at(p, s, h, query, is_query)
        at = stats_at(p, b, h, s.q_begin + query)
        row_max = tl.load(p.row_max + at, mask=is_query, other=0.0)
        row_sum = tl.load(p.row_sum + at, mask=is_query, other=0.0)
        row_max = tl.where(row_sum == 0, float("inf"), row_max)
        factor = p.keep_scale / heads_at_once / tl.where(row_sum == 0, 1.0, row_sum)
        scores = masked(p, as_column(queries), key[None, :], capped(p, products)[0])
        weight = tl.exp2((scores - row_max[:, None]) * LOG2E) * factor[:, None]
        mean += tl.where(are_kept(p, s, queries, j, BLOCK_Q, BLOCK_KV), weight, 0.0)

    row = (b * num_groups + first_head // heads_at_once).to(tl.int64) * L + query
    at = weights + (row * S)[:, None] + key[None, :]
    is_there = (query < L)[:, None] & (key < S)[None, :]
    tl.store(at, mean.to(weights.dtype.element_ty), mask=is_there)


def attention_weights(
    query: Tensor, key: Tensor, row_max: Tensor, row_sum: Tensor, *tensors: Tensor | None,
    average_heads: bool = False, **options,
) -> Tensor:  # fmt: skip
    """[B, H, L, S], or with average_heads [B, L, S], as the schema in ``csrc/ops.cpp`` says."""
    require(
        options.get("cu_seqlens_q") is None and (len(tensors) < 4 or tensors[3] is None),
        "attention_weights is for the padded layout: cu_seqlens can't be given",
    )
    call = Call(query, key, None, *tensors, **options)
    call.check_stats(("row_max", row_max), ("row_sum", row_sum))
    (B, H, L, E), S = query.shape, key.size(2)
    weights = query.new_empty((B, L, S) if average_heads else (B, H, L, S))
    if weights.numel() == 0 or H == 0:
        return weights.zero_()
    p = call.problem(row_max.contiguous(), row_sum.contiguous())
    heads_at_once = H if average_heads else 1
    tile = tuning.lookup("attention_mask", query.dtype)
    num_blocks = B * H // heads_at_once
    num_blocks *= triton.cdiv(L, tile["BLOCK_Q"]) * triton.cdiv(S, tile["BLOCK_KV"])
    weights_kernel[(num_blocks,)](
        p, weights, L, S, heads_at_once,
        VECTORIZED=is_vectorized(p.query, E) and is_vectorized(p.key, E), **tile,
    )  # fmt: skip
    return weights
