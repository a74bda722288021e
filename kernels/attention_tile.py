"""What the attention kernels share: sequences, tiles of rows, and the way from products of queries
and keys to the softmax's argument. `p` is an `attention_call.Problem` everywhere."""

from typing import NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


class Sequence(NamedTuple):
    """One entry of the batch. Packed, its rows begin somewhere in the common tensor."""

    b: tl.tensor
    q_begin: tl.tensor
    q_len: tl.tensor
    k_begin: tl.tensor
    k_len: tl.tensor


class Range(NamedTuple):
    begin: tl.tensor
    end: tl.tensor


class Tiles(NamedTuple):
    """Of a range, in whole_begin - whole_end those that have nothing to be masked, and num_edges
    others: those before, from begin on, then those after."""

    begin: tl.tensor
    whole_begin: tl.tensor
    whole_end: tl.tensor
    num_edges: tl.tensor


class Queries(NamedTuple):
    """Some queries, each with the keys that it meets, and what its scores get besides products."""

    head: tl.tensor
    index: tl.tensor
    diagonal: tl.tensor  # its position among the keys
    begin: tl.tensor
    end: tl.tensor
    slope: tl.tensor  # of ALiBi
    mask_offset: tl.tensor  # of the mask's row


@triton.jit
def plain(n):
    """The integer that `attention_call.scaled` took."""
    return n >> 4


@triton.jit
def wide(stride):
    """The same, to be multiplied."""
    return tl.cast(plain(stride), tl.int64)


@triton.jit
def head_at(x, b, h):
    """Where entry b's head h, or each of its own, begins: an offset."""
    return b * wide(x.batch) + h * wide(x.head)


# ---- Sequences: which rows and columns meet ----


@triton.jit
def _rows_of(lengths, b):
    """Where an entry's rows begin, and how many they are."""
    kind = plain(lengths.kind)
    begin = tl.load(lengths.data + b, mask=kind == 2, other=0)
    end = lengths.data + b + (kind == 2).to(tl.int32)
    return begin, tl.load(end, mask=kind > 0, other=plain(lengths.rows)) - begin


@triton.jit
def sequence_of(p, b):
    q_begin, q_len = _rows_of(p.queries, b)
    k_begin, k_len = _rows_of(p.keys, b)
    return Sequence(b, q_begin, q_len, k_begin, k_len)


@triton.jit
def keys_of(p, s, i):
    """The keys that query i may meet, by causality and window."""
    diagonal = i + (s.k_len - s.q_len)
    end = tl.minimum(i + plain(p.ahead), diagonal + plain(p.right)) + 1
    end = tl.maximum(tl.minimum(end, s.k_len), 0)
    begin = tl.maximum(diagonal - plain(p.left), 0)
    return Range(tl.minimum(begin, end), end)


@triton.jit
def queries_of(p, s, j_begin, j_end):
    """The queries that may meet a key of [j_begin, j_end)."""
    shift = s.k_len - s.q_len  # query i is at i + shift among the keys
    begin = tl.maximum(j_begin - shift - plain(p.right), j_begin - plain(p.ahead))
    begin = tl.maximum(begin, 0)
    end = tl.maximum(tl.minimum(s.q_len, j_end - shift + plain(p.left)), 0)
    return Range(tl.minimum(begin, end), end)


@triton.jit
def tiles_of(begin, end, whole_begin, whole_end, BLOCK: tl.constexpr, HAS_WHOLE: tl.constexpr):
    begin = begin // BLOCK * BLOCK
    end_of_tiles = tl.maximum(tl.cdiv(end, BLOCK) * BLOCK, begin)
    if HAS_WHOLE:
        whole_begin = tl.maximum(tl.cdiv(whole_begin, BLOCK) * BLOCK, begin)
        whole_begin = tl.minimum(whole_begin, end_of_tiles)
        whole_end = tl.maximum(tl.minimum(whole_end, end) // BLOCK * BLOCK, whole_begin)
    else:
        whole_begin, whole_end = begin, begin
    num_edges = (whole_begin - begin + end_of_tiles - whole_end) // BLOCK
    return Tiles(begin, whole_begin, whole_end, num_edges)


@triton.jit
def edge_of(tiles, t, BLOCK: tl.constexpr):
    at = tiles.begin + t * BLOCK
    return tl.where(at < tiles.whole_begin, at, at - tiles.whole_begin + tiles.whole_end)


@triton.jit
def queries_at(p, s, h, i, is_there):
    """The queries i of head h, or each of its own."""
    keys = keys_of(p, s, i)
    h += tl.zeros_like(i)
    slope_at = p.slopes.data + head_at(p.slopes, s.b, h)
    slope = tl.load(slope_at, mask=is_there & (plain(p.slopes.are_there) > 0), other=0.0)
    mask_offset = head_at(p.mask, s.b, h) + i * wide(p.mask.row)
    return Queries(
        h,
        i,
        i + (s.k_len - s.q_len),
        tl.where(is_there, keys.begin, 0),
        tl.where(is_there, keys.end, 0),
        slope,
        mask_offset,
    )


@triton.jit
def as_column(q):
    """Along the rows of a tile of scores."""
    return Queries(
        q.head[:, None], q.index[:, None], q.diagonal[:, None], q.begin[:, None], q.end[:, None],
        q.slope[:, None], q.mask_offset[:, None],
    )  # fmt: skip


@triton.jit
def as_row(q):
    """Along the columns of a tile of transposed scores."""
    return Queries(
        q.head[None, :], q.index[None, :], q.diagonal[None, :], q.begin[None, :], q.end[None, :],
        q.slope[None, :], q.mask_offset[None, :],
    )  # fmt: skip


# ---- Tiles of rows ----


@triton.jit
def addresses(x, b, h, rows, cols, VECTORIZED: tl.constexpr):
    """Of rows of entry b and head h, or each of its own, [rows, cols]."""
    offsets = head_at(x, b, h) + rows * wide(x.row)
    if VECTORIZED:
        offsets = tl.multiple_of(offsets, 128 // x.data.dtype.element_ty.primitive_bitwidth)
    return (x.data + offsets)[:, None] + cols[None, :]


@triton.jit
def rows_on(x, heads, rows, VECTORIZED: tl.constexpr):
    """How far away the rows are that come so many heads and rows later."""
    offset = heads * wide(x.head) + rows * wide(x.row)
    if VECTORIZED:
        offset = tl.multiple_of(offset, 128 // x.data.dtype.element_ty.primitive_bitwidth)
    return offset


@triton.jit
def columns_of(x, num_cols, BLOCK: tl.constexpr, VECTORIZED: tl.constexpr):
    """The columns of a tile that there are."""
    n = plain(num_cols)
    if VECTORIZED:
        n = tl.multiple_of(n, 128 // x.data.dtype.element_ty.primitive_bitwidth)
    return tl.arange(0, BLOCK) < n


@triton.jit
def load_tile(pointers, is_row, is_col, ALL_ROWS: tl.constexpr, WHOLE: tl.constexpr):
    """[rows, cols], zeros where there is none. ALL_ROWS, WHOLE: all rows, all columns are there."""
    if ALL_ROWS and WHOLE:
        x = tl.load(pointers)
    elif ALL_ROWS:
        x = tl.load(pointers, mask=is_col[None, :], other=0.0)
    elif WHOLE:
        x = tl.load(pointers, mask=is_row[:, None], other=0.0)
    else:
        x = tl.load(pointers, mask=is_row[:, None] & is_col[None, :], other=0.0)
    return x


@triton.jit
def store_tile(pointers, x, is_row, is_col, WHOLE: tl.constexpr):
    is_there = is_row[:, None]
    if not WHOLE:
        is_there = is_there & is_col[None, :]
    tl.store(pointers, x.to(pointers.dtype.element_ty), mask=is_there)


@triton.jit
def stats_at(p, b, h, rows):
    """Where what there is by row lies: offsets."""
    return head_at(p.stats, b, h) + rows * wide(p.stats.row)


@triton.jit
def add_product(acc, a, b):
    """acc + a @ b, in full precision of float32."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def products_by_steps(
    x, x_head, x_rows, is_x, y, y_head, y_rows, is_y, b, num_cols, VECTORIZED: tl.constexpr
):
    """x @ y^T of rows of entry b, by some columns at a time. Of float32, which tensor cores don't
    multiply in full precision, more wouldn't fit registers."""
    STEP: tl.constexpr = 16 if x.data.dtype.element_ty == tl.float32 else 64
    products = tl.zeros([x_rows.shape[0], y_rows.shape[0]], tl.float32)
    for first in range(0, plain(num_cols), STEP):
        col = first + tl.arange(0, STEP)
        is_col = col < plain(num_cols)
        x_at = addresses(x, b, x_head, x_rows, col, VECTORIZED)
        y_at = addresses(y, b, y_head, y_rows, col, VECTORIZED)
        left = load_tile(x_at, is_x, is_col, False, False)
        right = load_tile(y_at, is_y, is_col, False, False)
        products = add_product(products, left, tl.trans(right))
    return products


# ---- From products to the softmax's arguments: queries and keys j lie along either dimension ----


@triton.jit
def meet(queries, j):
    return (j >= queries.begin) & (j < queries.end)


@triton.jit
def tanh(x):
    """To some 2 ulp: a polynomial in x^2 where 1 - 2 / (exp(2 x) + 1) would cancel."""
    square = x * x
    small = square * -0.0058951578 + 0.020795971
    small = small * square - 0.053783830
    small = small * square + 0.13331924
    small = small * square - 0.33333299
    small *= square
    large = 1.0 - 2.0 / (tl.exp2(tl.abs(x) * (2 * LOG2E)) + 1.0)
    return tl.where(tl.abs(x) < 0.6, x + x * small, tl.where(x < 0, -large, large))


@triton.jit
def capped(p, products):
    """Scores before masks, and the derivative of the cap."""
    score = products * p.scale
    slope = tl.full(score.shape, 1.0, tl.float32)
    if p.softcap > 0:
        t = tanh(score / p.softcap)
        score = t * p.softcap
        slope = 1.0 - t * t
    return score, slope


@triton.jit
def masked(p, queries, j, score):
    """Scores with all that is added to them; -inf where query and key don't meet."""
    is_met = meet(queries, j)
    if plain(p.mask.is_there) > 0:
        element = tl.load(p.mask.data + (queries.mask_offset + j * wide(p.mask.col)), is_met, 0)
        if p.mask.data.dtype.element_ty == tl.uint8:
            score = tl.where(element != 0, score, float("-inf"))
        else:
            score += element.to(tl.float32)
    if plain(p.slopes.are_there) > 0:
        score -= queries.slope * tl.abs(queries.diagonal - j).to(tl.float32)
    return tl.where(is_met, score, float("-inf"))


@triton.jit
def keeps(p, s, queries, j, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr):
    """Whether dropout keeps the weights of queries, a column, and the keys from j, a multiple of
    32, on: [BLOCK_Q, BLOCK_KV]. A call of Philox serves 8 keys: words 0 to 3 hold those of
    2 (c mod 4) + 8 word, and, in the upper half, the next."""
    seed = tl.load(p.dropout.philox)
    offset = tl.load(p.dropout.philox + plain(p.dropout.stride))
    counter = (j >> 3) + tl.arange(0, BLOCK_KV // 8)[None, :]
    bh = s.b * plain(p.heads) + queries.head
    words = tl.philox(
        seed, counter.to(tl.uint32), queries.index.to(tl.uint32), bh.to(tl.uint32),
        offset.to(tl.uint32),
    )  # fmt: skip
    bits = tl.join(tl.join(words[0], words[2]), tl.join(words[1], words[3]))  # [.., 2, 2]
    bits = tl.reshape(bits, (BLOCK_Q, BLOCK_KV // 32, 4, 4)).permute(0, 1, 3, 2)
    bits = tl.join(bits & 0xFFFF, bits >> 16)
    is_kept = bits >= plain(p.dropout.threshold).to(tl.uint32)
    return tl.reshape(is_kept, (BLOCK_Q, BLOCK_KV))


@triton.jit
def are_kept(p, s, queries, j, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr):
    is_kept = tl.full([BLOCK_Q, BLOCK_KV], True, tl.int1)
    if plain(p.dropout.threshold) > 0:
        is_kept = keeps(p, s, as_column(queries), j, BLOCK_Q, BLOCK_KV)
    return is_kept
