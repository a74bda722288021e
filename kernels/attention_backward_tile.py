"""What the backward does with a tile of scores: the weights anew, from the scores and the softmax's
statistics, and their gradient. Dao et al. 2022, algorithm 4:

    P = exp(S - row_max) / row_sum     dP = dO @ V^T     dS = P * (dP - delta)
    delta = rowsum(dO * O) - dlse
"""

from typing import NamedTuple

import triton
import triton.language as tl
from bigkern.kernels.attention_call import Operand
from bigkern.kernels.attention_tile import LOG2E, capped, masked, meet, stats_at
from torch import Tensor


class Gradients(NamedTuple):
    """What the backward has beyond the forward's problem."""

    out: Operand  # its gradient
    lse: Tensor
    has_lse: int
    shift: Tensor  # by row, as `Stats`
    delta: Tensor
    query: Operand
    key: Operand
    value: Operand


class Stats(NamedTuple):
    """What the weights of queries and their gradients need; where there is none, or it meets no
    key, both come out as 0."""

    shift: tl.tensor  # IS_PLAIN: the log-sum-exp in base 2, else row_max
    inverse: tl.tensor  # 1 / row_sum, if not IS_PLAIN
    delta: tl.tensor


@triton.jit
def load_stats(p, g, s, h, i, IS_EDGE: tl.constexpr, IS_PLAIN: tl.constexpr):
    at = stats_at(p, s.b, h, s.q_begin + i)
    is_there = i < s.q_len
    inverse = 1.0
    if IS_EDGE:
        shift = tl.load(g.shift + at, mask=is_there, other=float("inf"))
        delta = tl.load(g.delta + at, mask=is_there, other=0.0)
    else:
        shift = tl.load(g.shift + at)
        delta = tl.load(g.delta + at)
    if not IS_PLAIN:
        row_sum = tl.load(p.row_sum + at, mask=is_there, other=0.0)
        inverse = 1.0 / tl.where(row_sum == 0, 1.0, row_sum)
    return Stats(shift, inverse, delta)


@triton.jit
def differentiate(
    p, queries, stats, j, products, grad_weights, is_kept,
    IS_EDGE: tl.constexpr, IS_PLAIN: tl.constexpr,
):  # fmt: skip
    """From S before its scale, and dP, to the weights as they met the values, but for the factor of
    dropout; the scores' gradients, before the cap; and the cap's derivative."""
    if IS_PLAIN:
        slope = 1.0
        weights = tl.exp2(products * (p.scale * LOG2E) - stats.shift)
        if IS_EDGE:
            weights = tl.where(meet(queries, j), weights, 0.0)
        grad_scores = weights * (grad_weights - stats.delta)
    else:
        score, slope = capped(p, products)
        score = masked(p, queries, j, score)
        weights = tl.exp2((score - stats.shift) * LOG2E) * stats.inverse
        grad_weights = tl.where(is_kept, grad_weights * p.keep_scale, 0.0)
        grad_scores = weights * (grad_weights - stats.delta)
        weights = tl.where(is_kept, weights, 0.0)
    return weights, grad_scores, slope


@triton.jit
def stats_as_column(x, IS_PLAIN: tl.constexpr):
    inverse = 1.0
    if not IS_PLAIN:
        inverse = x.inverse[:, None]
    return Stats(x.shift[:, None], inverse, x.delta[:, None])


@triton.jit
def stats_as_row(x, IS_PLAIN: tl.constexpr):
    inverse = 1.0
    if not IS_PLAIN:
        inverse = x.inverse[None, :]
    return Stats(x.shift[None, :], inverse, x.delta[None, :])
