"""The raw int8 ops: how their outputs look, and their gradients."""

import torch
from torch import Tensor

from bigkern import backends
from bigkern.ops.reference_int8 import dequantize


def packed_size(N: int, K: int, device_type: str) -> int:
    """Bytes of a packed weight, see csrc/int8_mm.h and csrc/cuda/int8_operand.cuh."""
    if device_type == "cuda":
        return (N * (K + 15 & -16) + 63 & -64) + 32
    panels, blocks, groups = (N + 15) // 16, (K + 511) // 512, (K + 3) // 4
    return 64 + 64 * panels * (blocks + groups)


def fake_quantize_rows(x, static_scale=None):
    return (
        torch.empty(x.shape, dtype=torch.int8, device=x.device),
        torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device),
    )


def _fake_int8_mm(a, b):
    return a.new_empty((*a.shape[:-1], b.size(-1)), dtype=torch.int32)


def _fake_linear(x, weight_q, weight_scale, *tensors, out_dtype=None, **options):
    return x.new_empty((*x.shape[:-1], weight_scale.size(0)), dtype=out_dtype or x.dtype)


backends.register("int8_mm", _fake_int8_mm)
backends.register("quantize_rows", fake_quantize_rows)
backends.register(
    "pack_weight", lambda w: w.new_empty(packed_size(w.size(0), w.size(1), w.device.type))
)
backends.register("unpack_weight", lambda packed, N, K: packed.new_empty(N, K))
backends.register("int8_linear", _fake_linear)
backends.register("weight_only_linear", _fake_linear)


def _grad_input(grad: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """grad [..., N] @ weight [N, K], in float32."""
    return (grad.float() @ weight).to(dtype)


def _grad_bias(grad: Tensor, bias: Tensor) -> Tensor:
    return grad.float().reshape(-1, grad.size(-1)).sum(0).to(bias.dtype)


class Int8Linear(torch.autograd.Function):
    """The quantisation of x counts as the identity; the weight in the gradient is what its integers
    stand for."""

    @staticmethod
    def forward(*args):
        x, weight_q, weight_scale, bias, x_scale, activation, out_dtype = args
        return backends.select("int8_linear", x.device.type).int8_linear.default(
            x, weight_q, weight_scale, bias, x_scale, activation=activation, out_dtype=out_dtype
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.activation, _ = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad):
        x, weight_q, weight_scale, bias, x_scale = ctx.saved_tensors
        if ctx.activation is not None:
            inner = int8_linear(x, weight_q, weight_scale, bias, x_scale, None, torch.float32)
            grad = ACTIVATION_GRADS[ctx.activation](grad.float(), inner)
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            if weight_q.dim() == 1:
                ops = backends.select("unpack_weight", x.device.type)
                N, K = weight_scale.size(0), x.size(-1)
                weight_q = ops.unpack_weight.default(weight_q, N, K)
            grad_x = _grad_input(grad, dequantize(weight_q, weight_scale), x.dtype)
        if ctx.needs_input_grad[3]:
            grad_bias = _grad_bias(grad, bias)
        return grad_x, None, None, grad_bias, None, None, None


def _silu_grad(grad: Tensor, x: Tensor) -> Tensor:
    sigmoid = x.sigmoid()  # torch's silu_backward can't be differentiated
    return grad * sigmoid * (1 + x * (1 - sigmoid))


ACTIVATION_GRADS = {
    "relu": lambda grad, x: torch.ops.aten.threshold_backward(grad, x, 0),
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": lambda grad, x: torch.ops.aten.gelu_backward(grad, x, approximate="tanh"),
    "silu": _silu_grad,
}


class WeightOnlyLinear(torch.autograd.Function):
    @staticmethod
    def forward(*args):
        x, weight_q, weight_scale, bias, group_size = args
        return backends.select("weight_only_linear", x.device.type).weight_only_linear.default(
            x, weight_q, weight_scale, bias, group_size=group_size
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight_q, weight_scale, bias, ctx.group_size = inputs
        ctx.dtype = x.dtype
        ctx.save_for_backward(weight_q, weight_scale, bias)

    @staticmethod
    def backward(ctx, grad):
        weight_q, weight_scale, bias = ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            weight = dequantize(weight_q, weight_scale, ctx.group_size)
            grad_x = _grad_input(grad, weight, ctx.dtype)
        if ctx.needs_input_grad[3]:
            grad_bias = _grad_bias(grad, bias)
        return grad_x, None, None, grad_bias, None


def _run(function, tensors: tuple[Tensor | None, ...], *options) -> Tensor:
    """Without the cost of autograd where nothing needs a gradient."""
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return (function.apply if needs_grad else function.forward)(*tensors, *options)


def int8_linear(x, weight_q, weight_scale, bias, x_scale, activation, out_dtype) -> Tensor:
    """The raw op, differentiable by x and bias."""
    tensors = (x, weight_q, weight_scale, bias, x_scale)
    return _run(Int8Linear, tensors, activation, out_dtype)


def weight_only_linear(x, weight_q, weight_scale, bias, group_size) -> Tensor:
    """The raw op, differentiable by x and bias."""
    return _run(WeightOnlyLinear, (x, weight_q, weight_scale, bias), group_size)
