"""A linear layer of float weights whose products are of INT8, forward and backward."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bigkern import backends
from bigkern.ops.int8_autograd import fake_quantize_rows
from bigkern.ops.int8_mm import int8_linear, quantize_rows
from bigkern.ops.reference_int8 import dequantize

GRADS = ("int8", "float")
# So many products of values from -127 to 127 fit int32.
MAX_TERMS = (2**31 - 1) // 127**2


def _fake_scaled_mm(a, b, row_scale, out_dtype=None):
    return a.new_empty((a.size(0), b.size(1)), dtype=out_dtype or torch.float32)


backends.register("quantize_rows_stochastic", lambda x, philox, factor=None: fake_quantize_rows(x))
backends.register("int8_scaled_mm", _fake_scaled_mm)


def quantize_rows_stochastic(
    x: Tensor, philox: Tensor, factor: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""Quantization of each row to int8 as by :func:`quantize_rows`, but with stochastic rounding:
    ``values = floor(x * factor / scale + u)`` with uniform random u from 0 to below 1, so that
    ``scale * values`` is ``x * factor`` on average (Gupta et al. 2015,
    https://arxiv.org/abs/1502.02551, section 3).

    Args:
        x: (M, K), float32, bfloat16 or float16.
        philox: (seed, offset), int64. u of row i and column j is made of the upper 24 bits of a
            word of Philox 4x32-10 with the key seed: of the counter
            (16 floor(j / 64) + j mod 16, i, 0, offset mod 2^32) word floor((j mod 64) / 16).
        factor: float32 (K).

    Returns:
        int8 values (M, K) from -127 to 127 and their float32 scale (M), as quantize_rows does; a
        row with an infinity or NaN has scale NaN and zeros.

    Raises:
        ValueError: another dtype, shape or device than stated.
        NotImplementedError: no backend for the device.
    """
    ops = backends.select("quantize_rows_stochastic", x.device.type)
    return ops.quantize_rows_stochastic.default(x, philox, factor)


def int8_scaled_mm(
    a: Tensor, b: Tensor, row_scale: Tensor, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    """``int8_mm(a, b) * row_scale[:, None]`` in one pass.

    Args:
        a, b: int8 (M, K) and (K, N), of any strides.
        row_scale: float32 (M).
        out_dtype: float32, bfloat16 or float16; float32 by default.

    Returns:
        (M, N): the product, exact as of :func:`int8_mm`, in float32 and rounded once.

    Raises:
        ValueError: another dtype, shape or device than stated.
        NotImplementedError: no backend for the device.
    """
    ops = backends.select("int8_scaled_mm", a.device.type)
    return ops.int8_scaled_mm.default(a, b, row_scale, out_dtype=out_dtype)


def _stochastic_mm(
    a: Tensor, factor: Tensor, b: Tensor, philox: Tensor, dtype: torch.dtype
) -> Tensor:
    """(a * factor) @ b on average, for a [M, K], factor [K] and b int8 [K, N]."""
    if a.size(1) > MAX_TERMS:
        parts = zip(*(x.split(MAX_TERMS) for x in (a.T, factor, b)), strict=True)
        products = [
            _stochastic_mm(a_part.T, factor_part, b_part, philox + i, torch.float32)
            for i, (a_part, factor_part, b_part) in enumerate(parts)
        ]
        return torch.stack(products).sum(0).to(dtype)
    values, scale = quantize_rows_stochastic(a, philox, factor)
    return int8_scaled_mm(values, b, scale, out_dtype=dtype)


class _TrainingLinear(torch.autograd.Function):
    """y = Q(x) Q(W)^T + b, where Q rounds to int8 by row; in the gradients Q counts as the identity
    (straight-through: Bengio et al. 2013, https://arxiv.org/abs/1308.3432)."""

    @staticmethod
    def forward(x, weight, bias, weight_q, weight_scale, philox, out_dtype):
        return int8_linear(x, weight_q, weight_scale, bias, out_dtype=out_dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, weight_q, weight_scale, philox, _ = inputs
        ctx.weight_dtype = weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x, weight_q, weight_scale, philox)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight_q, weight_scale, philox = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        # What is summed over are the rows of Q(W) and Q(x): their scales go to the other factor.
        if needs_x and philox is None:
            grad_x = (grad.float() @ dequantize(weight_q, weight_scale)).to(x.dtype)
        elif needs_x:  # dY Q(W)  [M, K]
            grad_x = _stochastic_mm(grad, weight_scale, weight_q, philox[0], x.dtype)
        if needs_weight:
            x_q, x_scale = quantize_rows(x)
            dtype = ctx.weight_dtype
            if philox is None:
                grad_weight = (grad.T.float() @ dequantize(x_q, x_scale)).to(dtype)
            else:  # dY^T Q(x)  [N, K]
                grad_weight = _stochastic_mm(grad.T, x_scale, x_q, philox[1], dtype)
        if needs_bias:
            grad_bias = grad.float().sum(0).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, *[None] * 4


def int8_training_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    grad: str = "int8",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """:func:`torch.nn.functional.linear` with int8 products: x and weight are quantized by row, as
    :func:`quantize_rows` does, and multiplied as by :func:`int8_linear`.

    In the gradients quantization counts as the identity (straight-through): they are the products
    of the output's gradient with the quantized weight and input. Differentiable once.

    Args:
        x: (..., K), float32, bfloat16 or float16.
        weight: (N, K), of any of these dtypes.
        bias: (N), of any of these dtypes.
        grad: "float": the products of the gradients are of float32. "int8": they are of int8, and
            the output's gradient is rounded stochastically (see :func:`quantize_rows_stochastic`),
            so that they are the same on average; torch's generator of x's device draws the seeds,
            under :class:`torch.no_grad` too, where x, weight or bias require a gradient: what a
            checkpoint recomputes draws what its first pass drew.
        out_dtype: x's by default.

    Returns:
        (..., N); a row of x or of weight with an infinity or NaN makes NaN what it enters.

    Raises:
        ValueError: shapes that don't fit, another dtype or device than stated, an unknown grad.
        NotImplementedError: no backend for the device.
    """
    if grad not in GRADS:
        raise ValueError(f"grad must be one of {', '.join(GRADS)}, got {grad!r}")
    weight_q, weight_scale = quantize_rows(weight)
    out_dtype = out_dtype or x.dtype
    requires_grad = any(t is not None and t.requires_grad for t in (x, weight, bias))
    philox = None
    if requires_grad and grad == "int8":
        philox = torch.randint(-(2**63), 2**63 - 1, (2, 2), dtype=torch.int64, device=x.device)
    if not (requires_grad and torch.is_grad_enabled()):
        return int8_linear(x, weight_q, weight_scale, bias, out_dtype=out_dtype)
    rows = x.reshape(-1, x.size(-1))
    y = _TrainingLinear.apply(rows, weight, bias, weight_q, weight_scale, philox, out_dtype)
    return y.view(*x.shape[:-1], y.size(-1))
