"""attention in Triton: the backward, of Dao 2023 (FlashAttention-2, algorithm 2), in one kernel for
dK and dV and one for dQ: what a sum has is added in one order, and so to the same bits each time.

    dV = P^T @ dO     dK = dS^T @ Q     dQ = dS @ K
"""

import torch
import triton
import triton.language as tl
from bigkern.kernels import tuning
from bigkern.kernels.attention_arguments import require
from bigkern.kernels.attention_backward_tile import (
    Gradients,
    differentiate,
    load_stats,
    stats_as_column,
    stats_as_row,
)
from bigkern.kernels.attention_call import (
    Call,
    Problem,
    block_of,
    empty_like_attention,
    is_vectorized,
    operand,
    scaled,
)
from bigkern.kernels.attention_mask_grad import mask_grad
from bigkern.kernels.attention_tile import (
    LOG2E,
    add_product,
    addresses,
    are_kept,
    as_column,
    as_row,
    columns_of,
    edge_of,
    keys_of,
    load_tile,
    plain,
    products_by_steps,
    queries_at,
    queries_of,
    rows_on,
    sequence_of,
    stats_at,
    store_tile,
    tiles_of,
)
from torch import Tensor


@triton.jit(do_not_specialize=["num_tiles"])
def rows_kernel(
    p, g, num_tiles, IS_PLAIN: tl.constexpr, VECTORIZED: tl.constexpr, BLOCK: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dO * O) - dlse, and the shift of the softmax's argument, of each query."""
    block = tl.program_id(0)
    h, b = block // num_tiles % plain(p.heads), block // num_tiles // plain(p.heads)
    s = sequence_of(p, b)
    i = block % num_tiles * BLOCK + tl.arange(0, BLOCK)
    is_row, is_col = i < s.q_len, columns_of(p.out, p.value_dim, COLS, VECTORIZED)
    col = tl.arange(0, COLS)
    grad_at = addresses(g.out, b, h, s.q_begin + i, col, VECTORIZED)
    out_at = addresses(p.out, b, h, s.q_begin + i, col, VECTORIZED)
    grad = load_tile(grad_at, is_row, is_col, False, False)
    out = load_tile(out_at, is_row, is_col, False, False)
    # For a query with one key dP - delta cancels, but for the rounding errors of both.
    SUM: tl.constexpr = tl.float64 if out.dtype == tl.float32 else tl.float32
    delta = tl.sum(grad.to(SUM) * out.to(SUM), 1)
    at = stats_at(p, b, h, s.q_begin + i)
    if plain(g.has_lse) > 0:
        delta -= tl.load(g.lse + at, mask=is_row, other=0.0).to(SUM)
    row_sum = tl.load(p.row_sum + at, mask=is_row, other=0.0)
    row_max = tl.load(p.row_max + at, mask=is_row, other=0.0)
    shift = row_max
    if IS_PLAIN:
        shift = row_max * LOG2E + tl.log2(row_sum)
    # Of a query that meets no key, weights come out as 0, and so must gradients.
    tl.store(g.shift + at, tl.where(row_sum == 0, float("inf"), shift), mask=is_row)
    tl.store(g.delta + at, tl.where(row_sum == 0, 0.0, delta.to(tl.float32)), mask=is_row)


# ---- dK, dV: a block has a tile of keys, and goes over the queries that meet them ----


@triton.jit(do_not_specialize=["num_tiles", "num_heads"])
def keys_kernel(
    p, g, num_tiles, num_heads, IS_PLAIN: tl.constexpr, VECTORIZED: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_EV: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    kv_head, b = block // num_tiles % num_heads, block // num_tiles // num_heads
    s = sequence_of(p, b)
    j = block % num_tiles * BLOCK_KV
    if j >= s.k_len:
        return

    # The queries that meet some of the keys, those that meet all.
    j_end = tl.minimum(j + BLOCK_KV, s.k_len)
    shift = s.k_len - s.q_len
    some = queries_of(p, s, j, j_end)
    whole_begin = j_end - 1 - tl.minimum(plain(p.ahead), plain(p.right) + shift)
    whole_end = j - shift + plain(p.left) + 1
    tiles = tiles_of(some.begin, some.end, tl.maximum(whole_begin, 0), whole_end, BLOCK_Q, IS_PLAIN)

    cols_e, cols_ev = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_EV)
    is_e = columns_of(p.key, p.head_dim, BLOCK_E, VECTORIZED)
    is_ev = columns_of(p.value, p.value_dim, BLOCK_EV, VECTORIZED)
    key = j + tl.arange(0, BLOCK_KV)
    is_key = key < s.k_len
    k_at = addresses(p.key, b, kv_head, s.k_begin + key, cols_e, VECTORIZED)
    v_at = addresses(p.value, b, kv_head, s.k_begin + key, cols_ev, VECTORIZED)
    k = load_tile(k_at, is_key, is_e, False, WHOLE)  # [BLOCK_KV, BLOCK_E]
    v = load_tile(v_at, is_key, is_ev, False, WHOLE)  # [BLOCK_KV, BLOCK_EV]

    grad_k = tl.zeros([BLOCK_KV, BLOCK_E], tl.float32)
    grad_v = tl.zeros([BLOCK_KV, BLOCK_EV], tl.float32)
    # All heads of queries that share the keys, in one loop.
    query = s.q_begin + tl.arange(0, BLOCK_Q)
    first_head, group = kv_head * plain(p.group), plain(p.group)
    q_at = addresses(p.query, b, first_head, query, cols_e, VECTORIZED)  # [BLOCK_Q, BLOCK_E]
    do_at = addresses(g.out, b, first_head, query, cols_ev, VECTORIZED)  # [BLOCK_Q, BLOCK_EV]
    num_whole = (tiles.whole_end - tiles.whole_begin) // BLOCK_Q
    for t in range(0, group * num_whole):
        h, i = t // num_whole, tiles.whole_begin + t % num_whole * BLOCK_Q
        grad_k, grad_v = add_queries(
            grad_k, grad_v, k, v, q_at, do_at, p, g, s, h, i, kv_head, j, is_e, is_ev,
            False, IS_PLAIN, VECTORIZED, WHOLE,
        )  # fmt: skip
    for t in range(0, group * tiles.num_edges):
        h, i = t // tiles.num_edges, edge_of(tiles, t % tiles.num_edges, BLOCK_Q)
        grad_k, grad_v = add_queries(
            grad_k, grad_v, k, v, q_at, do_at, p, g, s, h, i, kv_head, j, is_e, is_ev,
            True, IS_PLAIN, VECTORIZED, WHOLE,
        )  # fmt: skip

    grad_k_at = addresses(g.key, b, kv_head, s.k_begin + key, cols_e, VECTORIZED)
    grad_v_at = addresses(g.value, b, kv_head, s.k_begin + key, cols_ev, VECTORIZED)
    store_tile(grad_k_at, grad_k * p.scale, is_key, is_e, WHOLE)
    store_tile(grad_v_at, grad_v * p.keep_scale, is_key, is_ev, WHOLE)


@triton.jit
def add_queries(
    grad_k, grad_v, k, v, q_at, do_at, p, g, s, h, i, kv_head, j, is_e, is_ev,
    IS_EDGE: tl.constexpr, IS_PLAIN: tl.constexpr, VECTORIZED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    BLOCK_Q: tl.constexpr = q_at.shape[0]
    BLOCK_KV: tl.constexpr = k.shape[0]
    query = i + tl.arange(0, BLOCK_Q)
    is_query = query < s.q_len
    key = j + tl.arange(0, BLOCK_KV)
    q_at += rows_on(p.query, h, i, VECTORIZED)
    do_at += rows_on(g.out, h, i, VECTORIZED)
    q = load_tile(q_at, is_query, is_e, not IS_EDGE, WHOLE)
    do = load_tile(do_at, is_query, is_ev, not IS_EDGE, WHOLE)
    h += kv_head * plain(p.group)

    # S^T = K @ Q^T,  dP^T = V @ dO^T  [BLOCK_KV, BLOCK_Q]
    if k.dtype == tl.float32:
        products = products_by_steps(
            p.key, kv_head, s.k_begin + key, key < s.k_len,
            p.query, h, s.q_begin + query, is_query, s.b, p.head_dim, VECTORIZED,
        )  # fmt: skip
        grad_weights = products_by_steps(
            p.value, kv_head, s.k_begin + key, key < s.k_len,
            g.out, h, s.q_begin + query, is_query, s.b, p.value_dim, VECTORIZED,
        )  # fmt: skip
    else:
        products = tl.dot(k, tl.trans(q))
        grad_weights = tl.dot(v, tl.trans(do))

    queries = queries_at(p, s, h, query, is_query)
    stats = load_stats(p, g, s, h, query, IS_EDGE, IS_PLAIN)
    is_kept = 0
    if not IS_PLAIN:
        is_kept = tl.trans(are_kept(p, s, queries, j, BLOCK_Q, BLOCK_KV))
    weights, grad_scores, slope = differentiate(
        p, as_row(queries), stats_as_row(stats, IS_PLAIN), key[:, None], products, grad_weights,
        is_kept, IS_EDGE, IS_PLAIN,
    )  # fmt: skip

    # dV += P^T @ dO  [BLOCK_KV, BLOCK_EV],  dK += dS^T @ Q  [BLOCK_KV, BLOCK_E]
    grad_v = add_product(grad_v, weights.to(do.dtype), do)
    grad_k = add_product(grad_k, (grad_scores * slope).to(q.dtype), q)
    return grad_k, grad_v


# ---- dQ: a block has a tile of queries, and goes over the keys that they meet ----


@triton.jit(do_not_specialize=["num_tiles"])
def queries_kernel(
    p, g, num_tiles, IS_PLAIN: tl.constexpr, VECTORIZED: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_EV: tl.constexpr,
):  # fmt: skip
    # From the last tile on, which has the most keys under a causal mask.
    block = tl.program_id(0)
    h, b = block // num_tiles % plain(p.heads), block // num_tiles // plain(p.heads)
    s = sequence_of(p, b)
    i = (num_tiles - 1 - block % num_tiles) * BLOCK_Q
    if i >= s.q_len:
        return

    # The keys that some query meets, those that every one meets.
    first = keys_of(p, s, i)
    last = keys_of(p, s, tl.minimum(i + BLOCK_Q, s.q_len) - 1)
    tiles = tiles_of(first.begin, last.end, last.begin, first.end, BLOCK_KV, IS_PLAIN)

    cols_e, cols_ev = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_EV)
    is_e = columns_of(p.query, p.head_dim, BLOCK_E, VECTORIZED)
    is_ev = columns_of(p.value, p.value_dim, BLOCK_EV, VECTORIZED)
    kv_head = h // plain(p.group)
    query = i + tl.arange(0, BLOCK_Q)
    is_query = query < s.q_len
    q_at = addresses(p.query, b, h, s.q_begin + query, cols_e, VECTORIZED)
    do_at = addresses(g.out, b, h, s.q_begin + query, cols_ev, VECTORIZED)
    q = load_tile(q_at, is_query, is_e, False, WHOLE)  # [BLOCK_Q, BLOCK_E]
    do = load_tile(do_at, is_query, is_ev, False, WHOLE)  # [BLOCK_Q, BLOCK_EV]
    queries = queries_at(p, s, h, query, is_query)
    stats = load_stats(p, g, s, h, query, True, IS_PLAIN)
    key = s.k_begin + tl.arange(0, BLOCK_KV)
    k_at = addresses(p.key, b, kv_head, key, cols_e, VECTORIZED)  # [BLOCK_KV, BLOCK_E]
    v_at = addresses(p.value, b, kv_head, key, cols_ev, VECTORIZED)  # [BLOCK_KV, BLOCK_EV]

    grad_q = tl.zeros([BLOCK_Q, BLOCK_E], tl.float32)
    for j in range(tiles.whole_begin, tiles.whole_end, BLOCK_KV):
        grad_q = add_keys(
            grad_q, q, do, k_at, v_at, p, g, s, queries, stats, is_query, kv_head, j, is_e, is_ev,
            False, IS_PLAIN, VECTORIZED, WHOLE,
        )  # fmt: skip
    for t in range(0, tiles.num_edges):
        j = edge_of(tiles, t, BLOCK_KV)
        grad_q = add_keys(
            grad_q, q, do, k_at, v_at, p, g, s, queries, stats, is_query, kv_head, j, is_e, is_ev,
            True, IS_PLAIN, VECTORIZED, WHOLE,
        )  # fmt: skip
    grad_q_at = addresses(g.query, b, h, s.q_begin + query, cols_e, VECTORIZED)
    store_tile(grad_q_at, grad_q * p.scale, is_query, is_e, WHOLE)


@triton.jit
def add_keys(
    grad_q, q, do, k_at, v_at, p, g, s, queries, stats, is_query, kv_head, j, is_e, is_ev,
    IS_EDGE: tl.constexpr, IS_PLAIN: tl.constexpr, VECTORIZED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    BLOCK_Q: tl.constexpr = q.shape[0]
    BLOCK_KV: tl.constexpr = k_at.shape[0]
    key = j + tl.arange(0, BLOCK_KV)
    is_key = key < s.k_len
    k = load_tile(k_at + rows_on(p.key, 0, j, VECTORIZED), is_key, is_e, not IS_EDGE, WHOLE)

    # S = Q @ K^T,  dP = dO @ V^T  [BLOCK_Q, BLOCK_KV]
    if q.dtype == tl.float32:
        query = s.q_begin + queries.index
        products = products_by_steps(
            p.query, queries.head, query, is_query,
            p.key, kv_head, s.k_begin + key, is_key, s.b, p.head_dim, VECTORIZED,
        )  # fmt: skip
        grad_weights = products_by_steps(
            g.out, queries.head, query, is_query,
            p.value, kv_head, s.k_begin + key, is_key, s.b, p.value_dim, VECTORIZED,
        )  # fmt: skip
    else:
        v = load_tile(v_at + rows_on(p.value, 0, j, VECTORIZED), is_key, is_ev, not IS_EDGE, WHOLE)
        products = tl.dot(q, tl.trans(k))
        grad_weights = tl.dot(do, tl.trans(v))

    is_kept = 0
    if not IS_PLAIN:
        is_kept = are_kept(p, s, queries, j, BLOCK_Q, BLOCK_KV)
    _, grad_scores, slope = differentiate(
        p, as_column(queries), stats_as_column(stats, IS_PLAIN), key[None, :], products,
        grad_weights, is_kept, IS_EDGE, IS_PLAIN,
    )  # fmt: skip

    # dQ += dS @ K  [BLOCK_Q, BLOCK_E]
    return add_product(grad_q, (grad_scores * slope).to(k.dtype), k)


# ---- Host ----


def attention_backward(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor,
    out: Tensor, row_max: Tensor, row_sum: Tensor, *tensors: Tensor | None,
    needs_mask_grad: bool = False, deterministic: bool = False, **options,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of query, key, value and attn_mask, as the schema in ``csrc/ops.cpp`` says."""
    call = Call(query, key, value, *tensors, **options)
    call.check_stats(("row_max", row_max), ("row_sum", row_sum))
    call.check_out("out", out)
    call.check_out("grad_out", grad_out)
    if grad_lse is not None:
        require(
            grad_lse.shape == row_max.shape,
            "grad_lse must have the shape of row_max, ", [*row_max.shape], ", got ",
            [*grad_lse.shape],
        )  # fmt: skip
        call.check_dtype("grad_lse", grad_lse, torch.float32)
    mask = call.attn_mask
    require(
        not needs_mask_grad or (mask is not None and mask.dtype != torch.bool),
        "needs_mask_grad needs an additive attn_mask, got ",
        "none" if mask is None else "a bool one",
    )  # fmt: skip

    row_max, row_sum = row_max.contiguous(), row_sum.contiguous()
    E, Ev = query.size(-1), value.size(-1)
    grads = [empty_like_attention(x, x.size(-1)) for x in (query, key, value)]
    if call.seqlens_q is not None:  # rows that aren't there
        grads[0].zero_()
    if call.seqlens_k is not None:
        grads[1].zero_()
        grads[2].zero_()
    problem = call.problem(row_max, row_sum, out)
    of_lse = row_max if grad_lse is None else grad_lse.contiguous()
    gradients = Gradients(
        operand(grad_out, call.is_packed),
        of_lse,
        scaled(grad_lse is not None),
        call.empty_stats(),
        call.empty_stats(),
        *(operand(x, call.is_packed) for x in grads),
    )
    _launch(call, problem, gradients, E, Ev)
    return *grads, mask_grad(call, problem, gradients) if needs_mask_grad else query.new_empty(0)


def _launch(call: Call, p: Problem, g: Gradients, E: int, Ev: int) -> None:
    reads_vectors = is_vectorized(g.out, Ev) and is_vectorized(p.out, Ev)
    operands = [(x, E) for x in (p.query, p.key, g.query, g.key)]
    operands += [(x, Ev) for x in (p.value, g.out, g.value)]
    block_e, block_ev = block_of(E), block_of(Ev)
    common = {
        "IS_PLAIN": call.is_plain,
        "VECTORIZED": all(is_vectorized(x, n) for x, n in operands),
        "WHOLE": block_e == E and block_ev == Ev,
        "BLOCK_E": block_e,
        "BLOCK_EV": block_ev,
    }
    name = "" if call.is_plain else "_extras"
    num_queries = call.batch * call.heads if call.max_q_len else 0
    if num_queries:
        num_tiles = triton.cdiv(call.max_q_len, 16)
        rows_kernel[(num_queries * num_tiles,)](
            p,
            g,
            num_tiles,
            IS_PLAIN=call.is_plain,
            VECTORIZED=reads_vectors,
            BLOCK=16,
            COLS=block_ev,
            num_warps=4,
        )
    if call.batch * call.kv_heads * call.max_k_len:
        tile = tuning.lookup(f"attention_keys{name}", call.query.dtype, E=max(block_e, block_ev))
        num_tiles = triton.cdiv(call.max_k_len, tile["BLOCK_KV"])
        keys_kernel[(num_tiles * call.kv_heads * call.batch,)](
            p, g, num_tiles, call.kv_heads, **common, **tile
        )
    if num_queries:
        tile = tuning.lookup(f"attention_queries{name}", call.query.dtype, E=max(block_e, block_ev))
        num_tiles = triton.cdiv(call.max_q_len, tile["BLOCK_Q"])
        queries_kernel[(num_tiles * num_queries,)](p, g, num_tiles, **common, **tile)
