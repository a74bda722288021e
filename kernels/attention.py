"""attention in Triton: the forward, of Dao 2023 (FlashAttention-2, algorithm 1)."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from bigkern.kernels import tuning
from bigkern.kernels.attention_call import (
    Call,
    block_of,
    empty_like_attention,
    is_vectorized,
    scaled,
)
from bigkern.kernels.attention_tile import (
    LOG2E,
    add_product,
    addresses,
    are_kept,
    as_column,
    capped,
    columns_of,
    edge_of,
    keys_of,
    load_tile,
    masked,
    meet,
    plain,
    products_by_steps,
    queries_at,
    rows_on,
    sequence_of,
    stats_at,
    store_tile,
    tiles_of,
)
from torch import Tensor


class Parts(NamedTuple):
    """How the work is shared out; of the keys too, where there are several splits, which leave
    what they found in `out` [splits, rows, value_dim], `row_max` and `row_sum` [splits, rows], with
    rows over [batch, heads, max_q_len]."""

    out: Tensor
    row_max: Tensor
    row_sum: Tensor
    num_splits: int
    num_tiles: int
    heads_at_once: int
    batch: int
    max_q_len: int


@triton.jit
def attention_kernel(
    p, parts, HAS_SPLITS: tl.constexpr, IS_PLAIN: tl.constexpr, VECTORIZED: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_EV: tl.constexpr,
):  # fmt: skip
    """IS_PLAIN: scores are scaled products of keys that causality and window select; the scale is
    positive. VECTORIZED: rows are whole vectors of 16 bytes. WHOLE: a tile has no columns more."""
    # From the last tile on, which has the most keys under a causal mask.
    num_tiles, num_splits = plain(parts.num_tiles), plain(parts.num_splits)
    heads_at_once = plain(parts.heads_at_once)
    block = tl.program_id(0)
    tile = num_tiles - 1 - block % num_tiles
    block //= num_tiles
    split = block % num_splits
    block //= num_splits
    head_groups = plain(p.heads) // heads_at_once
    b, first_head = block // head_groups, block % head_groups * heads_at_once
    s = sequence_of(p, b)
    if tile * BLOCK_Q >= heads_at_once * s.q_len:
        return

    # Row r is query r % q_len of head r / q_len of those that are computed at once.
    row = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    is_row = row < heads_at_once * s.q_len
    h, i = first_head + row // s.q_len, row % s.q_len
    queries = queries_at(p, s, h, i, is_row)

    # The keys that some row meets, those that every row meets; this split's of them.
    last_row = tl.minimum((tile + 1) * BLOCK_Q, heads_at_once * s.q_len) - 1
    is_one_head = tile * BLOCK_Q // s.q_len == last_row // s.q_len
    first = keys_of(p, s, tl.where(is_one_head, tile * BLOCK_Q % s.q_len, 0))
    last = keys_of(p, s, tl.where(is_one_head, last_row % s.q_len, s.q_len - 1))
    of_split = tl.cdiv(tl.cdiv(s.k_len, num_splits), BLOCK_KV) * BLOCK_KV
    begin = tl.maximum(first.begin, split * of_split)
    end = tl.minimum(last.end, (split + 1) * of_split)
    tiles = tiles_of(begin, end, last.begin, first.end, BLOCK_KV, IS_PLAIN)

    cols_e, cols_ev = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_EV)
    is_e = columns_of(p.query, p.head_dim, BLOCK_E, VECTORIZED)
    is_ev = columns_of(p.value, p.value_dim, BLOCK_EV, VECTORIZED)
    kv_head = first_head // plain(p.group)
    key = s.k_begin + tl.arange(0, BLOCK_KV)
    k_at = addresses(p.key, b, kv_head, key, cols_e, VECTORIZED)  # [BLOCK_KV, BLOCK_E]
    v_at = addresses(p.value, b, kv_head, key, cols_ev, VECTORIZED)  # [BLOCK_KV, BLOCK_EV]
    q_at = addresses(p.query, b, h, s.q_begin + i, cols_e, VECTORIZED)
    q = load_tile(q_at, is_row, is_e, False, WHOLE)  # [BLOCK_Q, BLOCK_E]

    row_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_Q], tl.float32)
    out = tl.zeros([BLOCK_Q, BLOCK_EV], tl.float32)
    for j in range(tiles.whole_begin, tiles.whole_end, BLOCK_KV):
        out, row_max, row_sum = attend(
            out, row_max, row_sum, q, k_at, v_at, p, s, queries, is_row, kv_head, j, is_e, is_ev,
            False, IS_PLAIN, VECTORIZED, WHOLE,
        )  # fmt: skip
    for t in range(0, tiles.num_edges):
        j = edge_of(tiles, t, BLOCK_KV)
        out, row_max, row_sum = attend(
            out, row_max, row_sum, q, k_at, v_at, p, s, queries, is_row, kv_head, j, is_e, is_ev,
            True, IS_PLAIN, VECTORIZED, WHOLE,
        )  # fmt: skip

    if IS_PLAIN:
        row_max *= p.scale
    if HAS_SPLITS:
        max_q_len = plain(parts.max_q_len)
        at = ((split * plain(parts.batch) + b) * plain(p.heads) + h).to(tl.int64) * max_q_len + i
        tl.store(parts.row_max + at, row_max, mask=is_row)
        tl.store(parts.row_sum + at, row_sum, mask=is_row)
        part_at = parts.out + (at * plain(p.value_dim))[:, None] + cols_ev[None, :]
        store_tile(part_at, out, is_row, is_ev, WHOLE)
    else:
        at = stats_at(p, b, h, s.q_begin + i)
        tl.store(p.row_max + at, row_max, mask=is_row)
        tl.store(p.row_sum + at, row_sum, mask=is_row)
        out *= tl.where(row_sum == 0, 0, p.keep_scale / row_sum)[:, None]
        out_at = addresses(p.out, b, h, s.q_begin + i, cols_ev, VECTORIZED)
        store_tile(out_at, out, is_row, is_ev, WHOLE)


@triton.jit
def attend(
    out, row_max, row_sum, q, k_at, v_at, p, s, queries, is_row, kv_head, j, is_e, is_ev,
    IS_EDGE: tl.constexpr, IS_PLAIN: tl.constexpr, VECTORIZED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Softmax over tiles of keys, from j on: Milakov and Gimelshein 2018, algorithm 3."""
    BLOCK_Q: tl.constexpr = q.shape[0]
    BLOCK_KV: tl.constexpr = k_at.shape[0]
    is_key = j + tl.arange(0, BLOCK_KV) < s.k_len

    # S = Q @ K^T  [BLOCK_Q, BLOCK_KV]
    if q.dtype == tl.float32:
        scores = products_by_steps(
            p.query, queries.head, s.q_begin + queries.index, is_row,
            p.key, kv_head, s.k_begin + j + tl.arange(0, BLOCK_KV), is_key,
            s.b, p.head_dim, VECTORIZED,
        )  # fmt: skip
    else:
        k = load_tile(k_at + rows_on(p.key, 0, j, VECTORIZED), is_key, is_e, not IS_EDGE, WHOLE)
        scores = tl.dot(q, tl.trans(k))
    keys = (j + tl.arange(0, BLOCK_KV))[None, :]
    if not IS_PLAIN:
        scores = masked(p, as_column(queries), keys, capped(p, scores)[0])
    elif IS_EDGE:
        scores = tl.where(meet(as_column(queries), keys), scores, float("-inf"))

    # P = exp(S - row_max), by exp2. Where scores are products, scaling and shifting is one step;
    # else it would overflow with a mask of the lowest number.
    largest = tl.maximum(row_max, tl.max(scores, 1))
    shift = largest
    if IS_EDGE:
        shift = tl.where(largest == float("-inf"), 0.0, largest)  # no key yet
    if IS_PLAIN:
        scale = p.scale * LOG2E
        weights = tl.exp2(scores * scale - (shift * scale)[:, None])
        correction = tl.exp2((row_max - shift) * scale)
    else:
        weights = tl.exp2((scores - shift[:, None]) * LOG2E)
        correction = tl.exp2((row_max - shift) * LOG2E)
    row_sum = row_sum * correction + tl.sum(weights, 1)
    if not IS_PLAIN:
        weights = tl.where(are_kept(p, s, queries, j, BLOCK_Q, BLOCK_KV), weights, 0.0)

    # O += P @ V  [BLOCK_Q, BLOCK_EV]
    v = load_tile(v_at + rows_on(p.value, 0, j, VECTORIZED), is_key, is_ev, not IS_EDGE, WHOLE)
    out = add_product(out * correction[:, None], weights.to(v.dtype), v)
    return out, largest, row_sum


@triton.jit
def combine_kernel(p, parts, BLOCK_SPLITS: tl.constexpr, BLOCK_EV: tl.constexpr):
    """out = sum over splits of exp(row_max - largest) O / sum of the same row_sum, of a row."""
    row = tl.program_id(0)
    max_q_len, heads, num_splits = plain(parts.max_q_len), plain(p.heads), plain(parts.num_splits)
    i, h, b = row % max_q_len, row // max_q_len % heads, row // max_q_len // heads
    s = sequence_of(p, b)
    if i >= s.q_len:
        return
    col = tl.arange(0, BLOCK_EV)
    is_col = col < plain(p.value_dim)
    num_rows = plain(parts.batch) * heads * max_q_len

    largest = float("-inf")
    total = 0.0
    out = tl.zeros([BLOCK_EV], tl.float32)
    for first in range(0, num_splits, BLOCK_SPLITS):
        split = first + tl.arange(0, BLOCK_SPLITS)
        is_split = split < num_splits
        at = split.to(tl.int64) * num_rows + row
        row_max = tl.load(parts.row_max + at, mask=is_split, other=float("-inf"))
        row_sum = tl.load(parts.row_sum + at, mask=is_split, other=0.0)
        before = largest
        largest = tl.maximum(largest, tl.max(row_max, 0))
        shift = tl.where(largest == float("-inf"), 0.0, largest)
        correction = tl.exp2((before - shift) * LOG2E)
        weight = tl.exp2((row_max - shift) * LOG2E)
        total = total * correction + tl.sum(weight * row_sum, 0)
        part_at = parts.out + (at * plain(p.value_dim))[:, None] + col[None, :]
        part = tl.load(part_at, mask=is_split[:, None] & is_col[None, :], other=0.0)
        out = out * correction + tl.sum(part * weight[:, None], 0)

    at = stats_at(p, b, h, s.q_begin + i)
    tl.store(p.row_max + at, largest)
    tl.store(p.row_sum + at, total)
    out *= tl.where(total == 0, 0, p.keep_scale / total)
    out_at = addresses(p.out, b, h, (s.q_begin + i) + tl.arange(0, 1), col, False)
    store_tile(out_at, out[None, :], tl.full([1], True, tl.int1), is_col, False)


# ---- Host ----

WANTED_BLOCKS = 264  # two for each of an H100's 132 multiprocessors
LEAST_KEYS = 256  # of a split
FEW_ROWS = 64


def splits_of(call: Call, rows: int, heads_at_once: int) -> int:
    """As many parts of the keys on every card, so that the result is the same."""
    num_blocks = triton.cdiv(rows, 16) * call.heads // heads_at_once * call.batch
    most = max(triton.cdiv(call.max_k_len, LEAST_KEYS), 1)
    return min(max(WANTED_BLOCKS // num_blocks, 1), most)


def attention(query: Tensor, key: Tensor, value: Tensor, *tensors, **options):
    """(out, row_max, row_sum), as the schema in ``csrc/ops.cpp`` says."""
    call = Call(query, key, value, *tensors, **options)
    out = empty_like_attention(query, value.size(-1))
    row_max, row_sum = call.empty_stats(), call.empty_stats()
    if call.seqlens_q is not None:  # the rows that aren't there
        out.zero_()
        row_max.fill_(-torch.inf)
        row_sum.zero_()
    if call.batch * call.heads * call.max_q_len == 0:
        return out, row_max, row_sum
    problem = call.problem(row_max, row_sum, out)

    # Few queries of heads that share their keys are rows of one tile, and have the keys split.
    heads_at_once = call.group if call.max_q_len <= FEW_ROWS else 1
    rows = heads_at_once * call.max_q_len
    is_few = rows <= FEW_ROWS
    E, Ev = query.size(-1), call.value_dim
    name = "attention" if call.is_plain else "attention_extras"
    longest = max(block_of(E), block_of(Ev))
    tile = tuning.lookup(name, query.dtype, E=longest, L=1 if is_few else 4096)
    num_tiles = triton.cdiv(rows, tile["BLOCK_Q"])
    num_blocks = num_tiles * call.heads // heads_at_once * call.batch
    num_splits = splits_of(call, rows, heads_at_once) if is_few else 1
    num_rows = call.batch * call.heads * call.max_q_len
    parts_of = [row_max] * 3
    if num_splits > 1:
        parts_of = [
            query.new_empty(num_splits * num_rows * n, dtype=torch.float32)
            for n in (call.value_dim, 1, 1)
        ]
    parts = Parts(
        *parts_of,
        *map(scaled, (num_splits, num_tiles, heads_at_once, call.batch, call.max_q_len)),
    )
    operands = ((problem.query, E), (problem.key, E), (problem.value, Ev), (problem.out, Ev))
    attention_kernel[(num_blocks * num_splits,)](
        problem, parts, HAS_SPLITS=num_splits > 1, IS_PLAIN=call.is_plain,
        VECTORIZED=all(is_vectorized(x, n) for x, n in operands),
        WHOLE=block_of(E) == E and Ev == block_of(Ev),
        BLOCK_E=block_of(E), BLOCK_EV=block_of(Ev), **tile,
    )  # fmt: skip
    if num_splits > 1:
        combine_kernel[(num_rows,)](
            problem, parts, BLOCK_SPLITS=16, BLOCK_EV=block_of(Ev), num_warps=4
        )
    return out, row_max, row_sum
