"""The raw attention ops: how their outputs look, their gradients, their rules under vmap.

Everywhere `tensors` are the seven optional ones, from attn_mask to seqlens_k, and `options` the
keywords, in the words of ``csrc/ops.cpp``.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from bigkern import backends


def _empty_like(x: Tensor, *shape: int) -> Tensor:
    """[B, H, L, E], or [B, L, H, E] transposed where `x` is so in memory."""
    if len(shape) == 4 and x.stride(1) < x.stride(2):
        B, H, L, E = shape
        return x.new_empty(B, L, H, E).transpose(1, 2)
    return x.new_empty(shape)


def _fake_attention(query, key, value, *tensors, **options):
    stats_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    out = _empty_like(query, *query.shape[:-1], value.size(-1))
    rows = query.shape[:-1] if query.dim() == 4 else (query.size(1), query.size(0))
    return out, *(query.new_empty(rows, dtype=stats_dtype) for _ in range(2))


def _fake_backward(
    grad_out, grad_lse, query, key, value, out, row_max, row_sum, attn_mask=None, *tensors,
    needs_mask_grad=False, **options,
):  # fmt: skip
    grads = (_empty_like(x, *x.shape) for x in (query, key, value))
    grad_mask = attn_mask.new_empty(attn_mask.shape) if needs_mask_grad else query.new_empty(0)
    return *grads, grad_mask


def _fake_weights(query, key, row_max, row_sum, *tensors, average_heads=False, **options):
    B, H, L, _ = query.shape
    return query.new_empty((B, L, key.size(2)) if average_heads else (B, H, L, key.size(2)))


backends.register("attention", _fake_attention)
backends.register("attention_backward", _fake_backward)
backends.register("attention_weights", _fake_weights)


def _vmap_rule(op, num_first: int):
    """The rule of `op`: vmap's dimension is folded into the batch. `num_first` tensors come before
    the seven."""

    def fold(x, is_batched, V, B):
        """[V * B, ...]; a view where x doesn't vary along both."""
        x = x if is_batched else x[None]
        x = x.expand(V, B, *x.shape[2:]).flatten(0, 1)
        return x if x.dim() > 1 else x.contiguous()  # lengths must be

    def rule(info, in_dims, *args, **options):
        V = info.batch_size
        is_batched = [dim is not None for dim in in_dims] + [False] * (num_first + 7 - len(args))
        args = [x.movedim(d, 0) if d is not None else x for x, d in zip(args, in_dims, strict=True)]
        args += [None] * (num_first + 7 - len(args))
        slopes, philox, cu_seqlens = num_first + 1, num_first + 2, num_first + 3

        # The mask of dropout depends on the place in the batch, packed sequences are no batch, and
        # each sample has a gradient of the attn_mask: one by one.
        if (
            args[philox] is not None
            or args[cu_seqlens] is not None
            or options.get("needs_mask_grad", False)
        ):
            samples = [
                op(*(x[v] if b else x for x, b in zip(args, is_batched, strict=True)), **options)
                for v in range(V)
            ]
            if isinstance(samples[0], Tensor):
                return torch.stack(samples), 0
            outs = tuple(torch.stack(xs) for xs in zip(*samples, strict=True))
            return outs, (0,) * len(outs)

        if args[slopes] is not None and args[slopes].dim() == 1 + is_batched[slopes]:
            args[slopes] = args[slopes].unsqueeze(-2)  # [1, H]: the same for each sequence
        B = args[0].size(int(is_batched[0]))
        outs = op(
            *(x if x is None else fold(x, b, V, B) for x, b in zip(args, is_batched, strict=True)),
            **options,
        )
        if isinstance(outs, Tensor):
            return outs.unflatten(0, (V, B)), 0
        # A gradient of the mask that wasn't asked for is empty.
        outs = tuple(x.unflatten(0, (V, B)) if x.dim() > 1 else x.expand(V, 0) for x in outs)
        return outs, (0,) * len(outs)

    return rule


for op, num_first in (("attention", 3), ("attention_backward", 8), ("attention_weights", 4)):
    for backend in backends.table()[op]:
        name = f"{backends.NAMESPACES[backend]}::{op}"
        packet = getattr(getattr(torch.ops, backends.NAMESPACES[backend]), op)
        torch.library.register_vmap(name, _vmap_rule(packet.default, num_first))


class _Once(torch.autograd.Function):
    """function(*tensors), whose derivative is an error."""

    generate_vmap_rule = True

    @staticmethod
    def forward(function, *tensors):
        return function(*tensors)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "bigkern's attention can be differentiated once, not twice: for a double backward use "
            "torch.nn.functional.scaled_dot_product_attention inside "
            "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)"
        )


def _once(function, *tensors):
    return _Once.apply(function, *tensors) if torch.is_grad_enabled() else function(*tensors)


def _takes_part_in_autograd(*tensors: Tensor | None) -> bool:
    """torch.compile fails to trace a function none of whose inputs requires a gradient. Otherwise
    only autograd knows: in forward mode, say, nothing requires one."""
    if not torch.is_grad_enabled() or not torch.compiler.is_compiling():
        return torch.is_grad_enabled()
    return any(x is not None and x.requires_grad for x in tensors)


class Attention(torch.autograd.Function):
    """(out, row_max, row_sum), and the log-sum-exp if `return_lse`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args):  # named ones would be bound by inspect.signature, for 30 us a call
        *tensors, options, return_lse, _ = args
        ops = backends.select("attention", tensors[0].device.type)
        out, row_max, row_sum = ops.attention.default(*tensors, **options)
        if return_lse:
            return out, row_max, row_sum, row_max + row_sum.log()
        return out, row_max, row_sum

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.options, _, ctx.deterministic = inputs
        out, row_max, row_sum = output[:3]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(row_max, row_sum)
        ctx.save_for_backward(*tensors[:3], out, row_max, row_sum, *tensors[3:])

    @staticmethod
    def backward(ctx, grad_out, _row_max, _row_sum, grad_lse=None):
        if grad_out is None and grad_lse is None:
            return (None,) * 13
        query, key, value, out, row_max, row_sum, attn_mask, *tensors = ctx.saved_tensors
        needs_mask_grad = ctx.needs_input_grad[3]
        if needs_mask_grad:
            attn_mask = attn_mask.contiguous()  # an expanded one has a gradient for each element
        ops = backends.select("attention_backward", query.device.type)
        function = functools.partial(
            ops.attention_backward.default,
            **ctx.options,
            needs_mask_grad=needs_mask_grad,
            deterministic=ctx.deterministic,
        )
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        grads = _once(
            function, grad_out, grad_lse, query, key, value, out, row_max, row_sum, attn_mask,
            *tensors,
        )  # fmt: skip
        return *grads[:3], grads[3] if needs_mask_grad else None, *[None] * 9


def attention(
    inputs: tuple[Tensor, Tensor, Tensor],
    tensors: tuple[Tensor | None, ...],
    options: dict[str, Any],
    return_lse: bool = False,
    deterministic: bool | None = None,
) -> tuple[Tensor, ...]:
    """(out, row_max, row_sum), and the log-sum-exp if `return_lse`, of the raw op's arguments."""
    if not _takes_part_in_autograd(*inputs, *tensors):
        return Attention.forward(*inputs, *tensors, options, return_lse, False)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    return Attention.apply(*inputs, *tensors, options, return_lse, deterministic)


class AttentionWeights(torch.autograd.Function):
    """The softmax that belongs to row_max and row_sum, in full or as the mean over the heads."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args):
        *tensors, options, average_heads = args
        ops = backends.select("attention_weights", tensors[0].device.type)
        return ops.attention_weights.default(*tensors, **options, average_heads=average_heads)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.options, ctx.average_heads = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad):
        needs_mask_grad = ctx.needs_input_grad[4]
        function = functools.partial(_weights_backward, ctx.options, needs_mask_grad)
        if ctx.average_heads:
            query = ctx.saved_tensors[0]
            grad = (grad[:, None] / query.size(1)).expand(-1, query.size(1), -1, -1)
        grad_query, grad_key, *grad_mask = _once(function, grad, *ctx.saved_tensors)
        return grad_query, grad_key, None, None, *(grad_mask or [None]), *[None] * 8


def _weights_backward(
    options, needs_mask_grad, grad, query, key, row_max, row_sum, attn_mask, slopes, philox,
    *lengths,
):  # fmt: skip
    """In plain PyTorch: whoever asks for the weights has the memory for them."""
    q, k, grad, mask = (
        x.float() if x is not None and x.dtype.itemsize == 2 else x
        for x in (query, key, grad, attn_mask)
    )
    # dS = P * (dP - rowsum(P * dP)), where P * dP = W * grad with W = P after dropout.
    weights = backends.select("attention_weights", query.device.type).attention_weights.default
    stats = (row_max, row_sum, mask, slopes)
    p = w = weights(q, k, *stats, None, *lengths, **options | {"dropout_p": 0.0})  # [B, H, L, S]
    if philox is not None:
        w = weights(q, k, *stats, philox, *lengths, **options)
    grad_p = w * grad
    grad_score = grad_p - p * grad_p.sum(-1, keepdim=True)
    grad_mask = []
    if needs_mask_grad:
        grad_mask = [grad_score.sum_to_size(attn_mask.shape).to(attn_mask.dtype)]

    groups = (key.size(1), query.size(1) // max(key.size(1), 1))
    q = q.unflatten(1, groups)  # [B, Hkv, H / Hkv, L, E]
    k = k[:, :, None]  # [B, Hkv, 1, S, E]
    grad_score = options["scale"] * grad_score.unflatten(1, groups)
    if options["softcap"] > 0:
        score = options["scale"] * q @ k.mT
        grad_score = grad_score * (1 - (score / options["softcap"]).tanh().square())
    grad_query = (grad_score @ k).flatten(1, 2).to(query.dtype)
    grad_key = (grad_score.mT @ q).sum(2).to(key.dtype)
    return grad_query, grad_key, *grad_mask


def attention_weights(
    query: Tensor,
    key: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    tensors: tuple[Tensor | None, ...],
    options: dict[str, Any],
    average_heads: bool,
) -> Tensor:
    """The softmax [B, H, L, S], or its mean over the heads [B, L, S], of the raw op's arguments."""
    takes_part = _takes_part_in_autograd(query, key, *tensors)
    run = AttentionWeights.apply if takes_part else AttentionWeights.forward
    return run(query, key, row_max, row_sum, *tensors, options, average_heads)
