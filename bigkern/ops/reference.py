"""Every op in plain PyTorch, for any dtype and device: the definition of what backends compute."""

import math

import torch
from torch import Tensor


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
