"""Every op in plain PyTorch, for any dtype and device: the definition of what backends compute."""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence


def grad_norm(grads: list[Tensor], grad_scale: Tensor | None = None) -> Tensor:
    total = sum((g.double().square().sum() for g in grads), torch.zeros((), dtype=torch.float64))
    return total.sqrt() if grad_scale is None else total.sqrt() / grad_scale


_norm = grad_norm  # adam_ has an argument of that name


def adam_(
    params,
    grads,
    exp_avgs,
    exp_avg_sqs,
    max_exp_avg_sqs,
    state_steps,
    master_params=(),
    *,
    lr,
    beta1,
    beta2,
    weight_decay,
    eps,
    amsgrad=False,
    maximize=False,
    decoupled_weight_decay=False,
    grad_scale=None,
    found_inf=None,
    check_inf=False,
    max_grad_norm=None,
    grad_norm=None,
) -> None:
    norm = _norm(grads, grad_scale) if grad_norm is None else grad_norm
    if check_inf and not norm.isfinite():
        found_inf.fill_(1.0)
    if found_inf is not None and found_inf != 0:
        return

    for i, (weight, grad) in enumerate(zip(params, grads, strict=True)):
        p = master_params[i] if master_params else weight
        g = grad.to(p.dtype)
        if grad_scale is not None:
            g = g / grad_scale.to(g.dtype)
        if max_grad_norm is not None:
            g = g * (max_grad_norm / (norm + 1e-6)).clamp(max=1.0).to(g.dtype)
        if maximize:
            g = -g
        if decoupled_weight_decay:
            p.mul_(1 - lr * weight_decay)
        elif weight_decay:
            g = g + weight_decay * p

        state_steps[i] += 1
        step = float(state_steps[i])
        exp_avgs[i].mul_(beta1).add_(((1 - beta1) * g).to(exp_avgs[i].dtype))
        exp_avg_sqs[i].mul_(beta2).add_(((1 - beta2) * g * g).to(exp_avg_sqs[i].dtype))
        v = exp_avg_sqs[i]
        if amsgrad:
            v = torch.maximum(max_exp_avg_sqs[i], v, out=max_exp_avg_sqs[i])
        denominator = v.to(p.dtype).sqrt() / math.sqrt(1 - beta2**step) + eps
        p.sub_(lr / (1 - beta1**step) * exp_avgs[i].to(p.dtype) / denominator)
        if p is not weight:
            weight.copy_(p)


def philox(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Philox 4x32-10: four random words of 32 bits for each counter, all in int64."""
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # modulo 2**64
        c0, c1, c2, c3 = (p1 >> 32 & low) ^ c1 ^ k0, p1 & low, (p0 >> 32 & low) ^ c3 ^ k1, p0 & low
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    return [c0, c1, c2, c3]


def dropout_factors(seed_offset: Tensor, shape: tuple[int, ...], p: float) -> Tensor:
    """What the weights [B, H, L, S] are multiplied by: 0, or 1 / (1 - p)."""
    b, h, i, j = (torch.arange(n, device=seed_offset.device) for n in shape)
    seed, offset = seed_offset.unbind()
    head = (b[:, None] * shape[1] + h)[:, :, None, None]
    quads = torch.arange(-(-shape[3] // 32) * 4, device=seed_offset.device)
    counter = torch.broadcast_tensors(quads, i[:, None], head, offset & 0xFFFFFFFF)
    words = torch.stack(philox(list(counter), [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]), -1)
    words = words[..., j // 32 * 4 + j % 8 // 2, j % 32 // 8]  # [B, H, L, S]
    bits = torch.where(j % 2 == 0, words, words >> 16) & 0xFFFF
    threshold = math.floor(p * 65536 + 0.5)
    return (bits >= threshold).double() * (65536 / max(65536 - threshold, 1))


def _scores(
    query, key, attn_mask, alibi_slopes, seqlens_q, seqlens_k,
    *, scale, is_causal=False, window_left=-1, window_right=-1, softcap=0.0,
):  # fmt: skip
    """Scores [B, H, L, S]: -inf where a query and a key don't meet."""
    B, H, L, S = *query.shape[:3], key.size(2)
    score = scale * query @ key.repeat_interleave(H // max(key.size(1), 1), 1).mT
    if softcap > 0:
        score = softcap * torch.tanh(score / softcap)

    i = torch.arange(L, device=query.device)[:, None]
    j = torch.arange(S, device=query.device)
    lengths_q = torch.full((B,), L, device=query.device) if seqlens_q is None else seqlens_q
    lengths_k = torch.full((B,), S, device=query.device) if seqlens_k is None else seqlens_k
    shift = (lengths_k - lengths_q).view(B, 1, 1, 1)
    distance = j - i - shift
    meet = (i < lengths_q.view(B, 1, 1, 1)) & (j < lengths_k.view(B, 1, 1, 1))
    if is_causal:
        meet = meet & (j <= i)
    if window_left >= 0:
        meet = meet & (distance >= -window_left)
    if window_right >= 0:
        meet = meet & (distance <= window_right)

    if alibi_slopes is not None:
        score = score - alibi_slopes.to(score.dtype)[..., None, None] * distance.abs()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        meet = meet & attn_mask
    elif attn_mask is not None:
        meet = meet & (attn_mask != -math.inf)
        score = score + attn_mask.to(score.dtype)
    return score.masked_fill(~meet, -math.inf)


def _exp(scores, row_max):
    """exp(scores - row_max), zeros in rows without a key, whose maximum is -inf."""
    return torch.exp(scores - torch.where(row_max == -math.inf, 0, row_max)[..., None])


def _softmax(scores, row_max, row_sum):
    return _exp(scores, row_max) / torch.where(row_sum == 0, 1, row_sum)[..., None]


def _wide(*tensors):
    """Halves in float32, which is what every backend accumulates in."""
    return [t.float() if t.dtype.itemsize == 2 else t for t in tensors]


def _padded(packed, lengths):
    """[B, H, L, E] of [total, H, E]."""
    return pad_sequence(packed.split(lengths.tolist()), batch_first=True).transpose(1, 2)


def _packed(padded, lengths):
    """[H, total, E] of [B, H, L, E]."""
    return torch.cat([x[:, :n] for x, n in zip(padded, lengths.tolist(), strict=True)], 1)


def attention(
    query, key, value, attn_mask=None, alibi_slopes=None, philox=None,
    cu_seqlens_q=None, cu_seqlens_k=None, seqlens_q=None, seqlens_k=None,
    *, max_seqlen_q=0, max_seqlen_k=0, dropout_p=0.0, **options,
):  # fmt: skip
    """(out, row_max, row_sum), differentiable, row_max as a constant."""
    if cu_seqlens_q is not None:
        len_q, len_k = cu_seqlens_q.diff(), cu_seqlens_k.diff()
        out, row_max, row_sum = attention(
            _padded(query, len_q), _padded(key, len_k), _padded(value, len_k), None, alibi_slopes,
            philox, None, None, len_q, len_k, dropout_p=dropout_p, **options,
        )  # fmt: skip
        stats = (_packed(x, len_q) for x in (row_max, row_sum))
        return _packed(out, len_q).transpose(0, 1), *stats

    q, k, v = _wide(query, key, value)
    scores = _scores(q, k, attn_mask, alibi_slopes, seqlens_q, seqlens_k, **options)
    row_max = pad(scores.detach(), (0, 1), value=-math.inf).amax(-1)  # there may be no keys
    row_sum = _exp(scores, row_max).sum(-1)
    weights = _softmax(scores, row_max, row_sum)
    if philox is not None:
        weights = weights * dropout_factors(philox, weights.shape, dropout_p).to(weights.dtype)
    out = weights @ v.repeat_interleave(q.size(1) // max(v.size(1), 1), 1)
    return out.to(query.dtype), row_max, row_sum


@torch.no_grad()
def attention_backward(
    grad_out, grad_lse, query, key, value, out, row_max, row_sum,
    attn_mask=None, alibi_slopes=None, philox=None,
    cu_seqlens_q=None, cu_seqlens_k=None, seqlens_q=None, seqlens_k=None,
    *, max_seqlen_q=0, max_seqlen_k=0, dropout_p=0.0, needs_mask_grad=False, deterministic=False,
    **options,
):  # fmt: skip
    """Gradients of query, key, value and mask, from what the forward returned, as Dao 2023 does."""
    if cu_seqlens_q is not None:
        len_q, len_k = cu_seqlens_q.diff(), cu_seqlens_k.diff()
        grad_q, grad_k, grad_v, grad_mask = attention_backward(
            _padded(grad_out, len_q), grad_lse if grad_lse is None else _padded(grad_lse.T, len_q),
            _padded(query, len_q), _padded(key, len_k), _padded(value, len_k), _padded(out, len_q),
            _padded(row_max.T, len_q), _padded(row_sum.T, len_q), None, alibi_slopes, philox,
            None, None, len_q, len_k, dropout_p=dropout_p, **options,
        )  # fmt: skip
        grads = ((grad_q, len_q), (grad_k, len_k), (grad_v, len_k))
        return *(_packed(g, n).transpose(0, 1) for g, n in grads), grad_mask

    q, k, v, o, do = _wide(query, key, value, out, grad_out)
    leaves = [q, k, *([attn_mask] if needs_mask_grad else [])]
    leaves = [x.detach().requires_grad_() for x in leaves]
    mask = leaves[2] if needs_mask_grad else attn_mask
    with torch.enable_grad():
        scores = _scores(*leaves[:2], mask, alibi_slopes, seqlens_q, seqlens_k, **options)
    p = _softmax(scores, row_max, row_sum)
    factors = 1.0 if philox is None else dropout_factors(philox, p.shape, dropout_p).to(p.dtype)
    groups = q.size(1) // max(v.size(1), 1)
    dp = do @ v.repeat_interleave(groups, 1).mT * factors
    d = (do * o).sum(-1) - (0 if grad_lse is None else grad_lse)
    ds = p * (dp - d[..., None])
    grad_q, grad_k, *grad_mask = torch.autograd.grad(scores, leaves, ds)
    grad_v = ((p * factors).mT @ do).unflatten(1, (-1, groups)).sum(2)
    grads = zip((grad_q, grad_k, grad_v), (query, key, value), strict=True)
    return *(g.to(x.dtype) for g, x in grads), *(grad_mask or [query.new_empty(0)])


def attention_weights(
    query, key, row_max, row_sum, attn_mask=None, alibi_slopes=None, philox=None,
    cu_seqlens_q=None, cu_seqlens_k=None, seqlens_q=None, seqlens_k=None,
    *, max_seqlen_q=0, max_seqlen_k=0, dropout_p=0.0, average_heads=False, **options,
):  # fmt: skip
    """The softmax, [B, H, L, S] or its mean over the heads; not differentiable, since row_max and
    row_sum are functions of query and key."""
    q, k = _wide(query, key)
    scores = _scores(q, k, attn_mask, alibi_slopes, seqlens_q, seqlens_k, **options)
    weights = _softmax(scores, row_max, row_sum)
    if philox is not None:
        weights = weights * dropout_factors(philox, weights.shape, dropout_p).to(weights.dtype)
    return (weights.mean(1) if average_heads else weights).to(query.dtype)
