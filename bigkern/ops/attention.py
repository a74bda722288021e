"""Exact softmax attention that never stores the score matrix."""

import math
import operator
from typing import Any

import torch
from torch import Generator, Tensor

from bigkern.ops.attention_autograd import attention, attention_weights
from bigkern.ops.autocast import autocast_dtype


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
    generator: Generator | None = None,
    deterministic: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attention of L queries to S keys: :func:`torch.nn.functional.scaled_dot_product_attention`,
    whose arguments come first, and more.

    Vaswani et al. 2017 (https://arxiv.org/abs/1706.03762, equation 1), computed in tiles as Dao
    et al. 2022 (https://arxiv.org/abs/2205.14135, algorithms 1 and 4) and Dao 2023
    (https://arxiv.org/abs/2307.08691): for query :math:`i` and key :math:`j` of a head

    .. math::
        s_{ij} = \mathrm{cap}(\mathrm{scale} \cdot q_i^\top k_j) + \mathrm{mask}_{ij}
            - \mathrm{slope}\,|i + S - L - j|, \qquad
        p_{ij} = \frac{e^{s_{ij}}}{\sum_j e^{s_{ij}}}, \qquad
        o_i = \sum_j d_{ij}\, p_{ij}\, v_j

    with :math:`\mathrm{cap}(x) = \mathrm{softcap} \tanh(x / \mathrm{softcap})` and the factors
    :math:`d` of dropout. A query that meets no key gets zeros, and gives zero gradients.

    float32, bfloat16 and float16 are accumulated in float32, float64 in float64, and rounded once.
    The result is the same, bit for bit, whatever the number of threads. It can be differentiated
    by query, key, value and an additive mask, once.

    Args:
        query: (..., H, L, E), as in torch: 2-D at least, and the leading dimensions of query, key
            and value broadcast. float32, bfloat16, float16 or float64; any strides (no copy is made
            where the last one is 1). Under autocast all are cast, as torch does.
        key: (..., H, S, E), of the dtype and on the device of query.
        value: (..., H, S, Ev); the same.
        attn_mask: broadcastable to (..., H, L, S). Bool: query and key meet where True. float32 or
            of query's dtype: is added to the score; -inf keeps them apart. Its gradient has its
            own shape. Or a :class:`torch.nn.attention.bias.CausalBias`.
        dropout_p: the probability that a weight is dropped, whatever the mode of a module; see
            below.
        is_causal: query i meets the keys j <= i: aligned to the top left. Not with attn_mask, as
            in torch; ``window=(-1, 0)`` is.
        scale: 1 / sqrt(E) by default.
        enable_gqa: key and value may have fewer heads than query, a divisor of H: query head h
            meets head h // (H / Hkv).
        window: (left, right): query i meets the keys from i + S - L - left to i + S - L + right,
            where -1 is without bound: aligned to the bottom right, as in FlashAttention from 2.1
            on; (-1, 0) is causal.
        softcap: bounds the scores as Gemma 2 does; None or 0: doesn't.
        alibi_slopes: float32 of shape (H) or (B, H), where B is the product of the leading
            dimensions before H (Press et al. 2022, https://arxiv.org/abs/2108.12409). Gets no
            gradient.
        return_lse: return the log-sum-exp :math:`\log \sum_j e^{s_{ij}}` too, -inf where a query
            meets no key: (..., H, L) in float32 (float64 for float64), differentiable.
        generator: draws the seed of dropout; by default torch's, of query's device.
        deterministic: by default what :func:`torch.use_deterministic_algorithms` says. The CPU
            always is; a GPU otherwise sums up query's gradient in any order, which is faster.

    Returns:
        (..., H, L, Ev) in query's dtype and, where the last dimensions allow, its order in memory
        (of the heads and queries); with ``return_lse`` the pair of it and the log-sum-exp.

    **Dropout.** The weight of (b, h, i, j) is kept where its 16 random bits are at least
    t = floor(65536 dropout_p + 1/2), and then multiplied by 65536 / (65536 - t). The bits are those
    of Philox 4x32-10 (Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405), whose
    multipliers are 0xD2511F53 and 0xCD9E8D57, and whose keys are raised by 0x9E3779B9 and
    0xBB67AE85 each round. Drawn are two int64, seed and offset. Of the four words of

    - key (seed mod 2^32, floor(seed / 2^32) mod 2^32),
    - counter (4 floor(j / 32) + floor((j mod 8) / 2), i, b H + h, offset mod 2^32)

    word floor((j mod 32) / 8) holds the bits of key j: the lower 16 if j is even, else the upper.
    b counts the sequences, h the heads of query, i and j start at 0 in each sequence: the mask
    depends neither on tiles, threads and backend, nor on L, S and packing. The row sums, and so
    the log-sum-exp, are of all weights.

    Raises:
        ValueError: shapes that don't fit, another dtype or device than stated here, dropout_p
            outside [0, 1], a negative softcap, a window below -1; on a GPU, float64 or more than
            256 features.
        RuntimeError: attn_mask together with is_causal; a second derivative.
        NotImplementedError: no backend for the device; nested tensors (see
            :func:`varlen_attention`); alibi_slopes that require a gradient.
    """
    inputs, tensors, options, lead = _prepare(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
        window, softcap, alibi_slopes, generator,
    )  # fmt: skip
    out, _, _, *lse = attention(inputs, tensors, options, return_lse, deterministic)
    if len(lead) != 2:
        out = out.reshape(*lead, *out.shape[2:])
        lse = [x.reshape(*lead, x.size(2)) for x in lse]
    return (out, *lse) if return_lse else out


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    scale: float | None = None,
    is_causal: bool = False,
    *,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
    generator: Generator | None = None,
    deterministic: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`scaled_dot_product_attention` of B sequences of different lengths, packed one after
    another as in FlashAttention's ``flash_attn_varlen_func``; any may be empty.

    All options mean the same for each sequence, with L and S its own lengths.

    Args:
        q: (total_q, H, E).
        k: (total_k, Hkv, E), where Hkv divides H.
        v: (total_k, Hkv, Ev).
        cu_seqlens_q, cu_seqlens_k: int32 of shape (B + 1), on the device of q: where each sequence
            starts, and the total. Their values are checked on the CPU; a GPU relies on them.
        max_seqlen_q, max_seqlen_k: no sequence is longer.
        alibi_slopes: float32 of shape (H) or (B, H).

    Returns:
        (total_q, H, Ev); with ``return_lse`` also the log-sum-exp, (H, total_q).

    Raises:
        As :func:`scaled_dot_product_attention`.
    """
    q, k, v = _autocast(q.device.type, q, k, v)
    _check_alike(("q", q), ("k", k), ("v", v))
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3:
            raise ValueError(
                f"{name} must have 3 dimensions (total, heads, features), got {list(x.shape)}"
            )
    (_, H, E), (total, Hkv, _) = q.shape, k.shape
    if k.size(2) != E:
        raise ValueError(f"k must have a last dimension of {E} like q, got {list(k.shape)}")
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(f"v must have shape [{total}, {Hkv}, any], got {list(v.shape)}")
    if H % max(Hkv, 1):
        raise ValueError(f"k must have heads that divide the {H} of q, got {list(k.shape)}")
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        _check_kind(name, x, torch.int32, q.device)
        if x.dim() != 1 or x.shape != cu_seqlens_q.shape:
            shapes = f"{list(cu_seqlens_q.shape)} and {list(cu_seqlens_k.shape)}"
            raise ValueError(f"cu_seqlens_q and cu_seqlens_k must both be [B + 1], got {shapes}")
    options = _options(E, dropout_p, is_causal, scale, _bounds(window), softcap)
    options["max_seqlen_q"], options["max_seqlen_k"] = max_seqlen_q, max_seqlen_k
    _check_slopes(alibi_slopes, q.device, cu_seqlens_q.size(0) - 1, H)
    philox = _draw_philox(q, generator) if dropout_p else None
    tensors = (None, alibi_slopes, philox, cu_seqlens_q, cu_seqlens_k, None, None)
    out, _, _, *lse = attention((q, k, v), tensors, options, return_lse, deterministic)
    return (out, *lse) if return_lse else out


def attention_with_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    average_heads: bool = False,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    generator: Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`scaled_dot_product_attention` and the weights that it gave the values, dropped ones
    zero: (..., H, L, S), or their mean over the heads (..., L, S). Both can be differentiated."""
    inputs, tensors, options, lead = _prepare(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
        window, softcap, None, generator,
    )  # fmt: skip
    out, *stats = attention(inputs, tensors, options)
    weights = attention_weights(*inputs[:2], *stats, tensors, options, average_heads)
    if len(lead) != 2:
        out = out.reshape(*lead, *out.shape[2:])
        rows = lead[:-1] if average_heads else lead
        weights = weights.reshape(*rows, *weights.shape[-2:])
    return out, weights


def _prepare(
    query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
    window, softcap, alibi_slopes, generator,
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...], dict[str, Any], torch.Size]:  # fmt: skip
    """The raw op's arguments, and the leading dimensions of the result."""
    if query.is_nested or key.is_nested or value.is_nested:
        raise NotImplementedError(
            "nested tensors aren't supported: pass their values and offsets to varlen_attention"
        )
    bounds = _bounds(window)
    # By its name: to import the class takes seconds, and Triton.
    if type(attn_mask).__name__ == "CausalBias":
        is_causal, bounds = _understand(attn_mask, query, key, is_causal, bounds)
        attn_mask = None
    elif attn_mask is not None and is_causal:
        raise RuntimeError(
            "attn_mask must be None where is_causal, as in torch; window=(-1, 0) may be given"
        )
    query, key, value, attn_mask = _autocast(query.device.type, query, key, value, attn_mask)
    _check_alike(("query", query), ("key", key), ("value", value))
    query, key, value, lead = _fold(query, key, value, enable_gqa)
    if attn_mask is not None:
        attn_mask = _fold_mask(attn_mask, query, lead, key.size(2))
    _check_slopes(alibi_slopes, query.device, *query.shape[:2])
    options = _options(query.size(3), dropout_p, is_causal, scale, bounds, softcap)
    philox = _draw_philox(query, generator) if dropout_p else None
    tensors = (attn_mask, alibi_slopes, philox, None, None, None, None)
    return (query, key, value), tensors, options, lead


def _check_kind(name: str, x: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    if x.dtype != dtype or x.device != device:
        raise ValueError(f"{name} must be {dtype} on {device}, got {x.dtype} on {x.device}")


def _check_alike(first: tuple[str, Tensor], *others: tuple[str, Tensor]) -> None:
    for name, x in others:
        if x.dtype != first[1].dtype or x.device != first[1].device:
            _check_kind(f"{name}, like {first[0]},", x, first[1].dtype, first[1].device)


def _check_slopes(slopes: Tensor | None, device: torch.device, B: int, H: int) -> None:
    if slopes is None:
        return
    _check_kind("alibi_slopes", slopes, torch.float32, device)
    if slopes.shape not in ((H,), (B, H)):
        raise ValueError(
            f"alibi_slopes must have shape [{H}] or [{B}, {H}], got {list(slopes.shape)}"
        )
    if slopes.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError("alibi_slopes can't have a gradient: detach() it")


def _bounds(window: tuple[int, int] | None) -> tuple[int, int]:
    if window is None:
        return -1, -1
    try:
        left, right = (operator.index(n) for n in window)
    except (TypeError, ValueError):
        left = right = -2
    if min(left, right) < -1:
        raise ValueError(f"window must be two integers from -1 on, got {window}")
    return left, right


def _options(E, dropout_p, is_causal, scale, bounds, softcap) -> dict[str, Any]:
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must be from 0 to 1, got {dropout_p}")
    softcap = softcap or 0.0
    if not 0.0 <= softcap < math.inf:
        raise ValueError(f"softcap must be positive, or None, got {softcap}")
    return {
        "scale": 1.0 / math.sqrt(max(E, 1)) if scale is None else scale,
        "is_causal": is_causal,
        "window_left": bounds[0],
        "window_right": bounds[1],
        "softcap": softcap,
        "dropout_p": dropout_p,
    }


def _understand(bias, query, key, is_causal, bounds) -> tuple[bool, tuple[int, int]]:
    """is_causal and the bounds of the window that a CausalBias stands for."""
    if is_causal:
        raise ValueError("attn_mask must not be a CausalBias where is_causal, as in torch")
    if bias.variant.name == "UPPER_LEFT":
        return True, bounds
    wanted = (*query.shape[-2:-1], *key.shape[-2:-1])
    got = (bias.seq_len_q, bias.seq_len_kv)
    if got != wanted:
        raise ValueError(f"attn_mask must be a CausalBias of {wanted}, got {got}")
    return False, (bounds[0], 0)


def _autocast(device_type: str, *tensors: Tensor | None) -> list[Tensor | None]:
    dtype = autocast_dtype(device_type)
    if dtype is None:
        return tensors
    return [
        x.to(dtype) if x is not None and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in tensors
    ]


def _draw_philox(query: Tensor, generator: Generator | None) -> Tensor:
    """(seed, offset) of the mask of dropout."""
    return torch.randint(
        -(2**63), 2**63 - 1, (2,), generator=generator, dtype=torch.int64, device=query.device
    )


def _fold(query, key, value, enable_gqa) -> tuple[Tensor, Tensor, Tensor, torch.Size]:
    """Query, key and value in 4-D, and the leading dimensions of the result."""
    q, k, v = query.shape, key.shape, value.shape
    if len(q) == len(k) == len(v) == 4 and q[0] == k[0] == v[0] and k[:3] == v[:3] and q[3] == k[3]:
        H, Hkv = q[1], k[1]
        if Hkv == H or Hkv == 1 or (enable_gqa and Hkv and H % Hkv == 0):
            return query, key, value, q[:2]

    shapes = f"query {list(q)}, key {list(k)}, value {list(v)}"
    least = 3 if enable_gqa else 2
    if min(len(q), len(k), len(v)) < least:
        raise ValueError(
            f"query, key and value must have at least {least} dimensions, got {shapes}"
        )
    if k[-1] != q[-1]:
        raise ValueError(f"key must have a last dimension of {q[-1]} like query, got {list(k)}")
    if v[-2] != k[-2]:
        raise ValueError(f"value must have {k[-2]} rows, one for each key, got {list(v)}")
    H, Hk, Hv = (s[-3] if len(s) > 2 else 1 for s in (q, k, v))
    if enable_gqa and (H % max(Hk, 1) or H % max(Hv, 1)):
        raise ValueError(
            f"key and value must have heads that divide the {H} of query, got {shapes}"
        )
    try:
        batch = torch.broadcast_shapes(q[:-3], k[:-3], v[:-3])
        heads = (H,) if enable_gqa else torch.broadcast_shapes((H,), (Hk,), (Hv,))
    except RuntimeError:
        hint = "" if enable_gqa or H % max(Hk, 1) else "; fewer heads of keys need enable_gqa=True"
        raise ValueError(f"leading dimensions must broadcast, got {shapes}{hint}") from None
    if Hk != Hv:  # the kernels know one number of heads
        if enable_gqa:
            key, value = (x.repeat_interleave(H // x.size(-3), -3) for x in (key, value))
        Hk = Hv = heads[0]
    N = math.prod(batch)
    query, key, value = (
        x.expand(*batch, h, *x.shape[-2:]).reshape(N, h, *x.shape[-2:])
        for x, h in ((query, heads[0]), (key, Hk), (value, Hv))
    )
    lead = batch + heads
    return query, key, value, lead[len(lead) + 2 - max(len(q), len(k), len(v)) :]


def _fold_mask(mask: Tensor, query: Tensor, lead: torch.Size, S: int) -> Tensor:
    """The mask in 4-D: a view, unless it varies along some of the dimensions folded to one."""
    wanted = (torch.bool, torch.float32, query.dtype)
    if mask.dtype not in wanted or mask.device != query.device:
        wanted = " or ".join(map(str, dict.fromkeys(wanted)))
        raise ValueError(
            f"attn_mask must be {wanted} on {query.device}, got {mask.dtype} on {mask.device}"
        )
    full = (*lead, query.size(2), S)
    shape = mask.shape
    if len(shape) > len(full) or any(
        m not in (1, n) for m, n in zip(reversed(shape), reversed(full), strict=False)
    ):
        raise ValueError(f"attn_mask must broadcast to {list(full)}, got {list(shape)}")
    if len(shape) < 4:
        return mask.view((1,) * (4 - len(shape)) + shape)
    if len(shape) == 4 == len(full):
        return mask
    batch, rest = shape[:-3], shape[-3:]
    if math.prod(batch) == 1:
        return mask.reshape(1, *rest)
    return mask.expand(*lead[:-1], *rest).reshape(query.size(0), *rest)
