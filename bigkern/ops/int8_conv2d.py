"""2-D convolutions of an int8 weight."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from bigkern import backends
from bigkern.ops.int8_autograd import ACTIVATION_GRADS
from bigkern.ops.int8_mm import check_no_grad, pack_weight, scale_tensor

Pair = int | Sequence[int]


def int8_conv2d(
    x: Tensor,
    weight_q: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    *,
    kernel_size: Pair | None = None,
    activation: str | None = None,
    x_scale: Tensor | float | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """:func:`torch.nn.functional.conv2d` of an int8 weight on inputs that are quantized, each image
    as :func:`quantize_rows` does a row. The sums of products are exact, and what follows is as in
    :func:`int8_linear`, in float32 and rounded once.

    The gradient of x is that of a convolution with the weight that the integers stand for:
    quantizing x counts as the identity. The bias has a gradient too.

    Args:
        x: (N, C, H, W) or (C, H, W), float32, bfloat16 or float16.
        weight_q: int8 (O, C / groups, kH, kW), or what :func:`pack_conv2d_weight` makes of it.
        weight_scale: float32 (O).
        bias: (O), float32, bfloat16 or float16.
        stride, padding, dilation, groups: as of torch's conv2d; padding may be "same" or "valid".
        kernel_size: of a packed weight, which doesn't tell.
        activation, out_dtype: as of int8_linear.
        x_scale: a static scale of x, one or one for each image: values beyond it saturate, and one
            that is none raises an error on a CPU, gives NaN on a GPU.

    Returns:
        (N, O, H', W') or (O, H', W'), channels last where x is. Images with an infinity or NaN give
        NaN.

    Raises:
        ValueError: shapes that don't fit, another dtype or device than stated here, an unknown
            activation, an x_scale that is negative or not finite.
        NotImplementedError: no backend for the device; a weight_scale or x_scale that requires a
            gradient.
    """
    if x.dim() not in (3, 4):
        raise ValueError(f"x must have shape [N, C, H, W] or [C, H, W], got {list(x.shape)}")
    if weight_q.dim() == 4:
        kernel_size = weight_q.shape[2:]
    elif kernel_size is None:
        raise ValueError("kernel_size must be given for a packed weight_q, got None")
    kernel, stride, dilation = (
        _pair(name, value)
        for name, value in (
            ("kernel_size", kernel_size),
            ("stride", stride),
            ("dilation", dilation),
        )
    )
    x_scale = scale_tensor(x_scale, x)
    check_no_grad(weight_scale=weight_scale, x_scale=x_scale)
    images = x if x.dim() == 4 else x.unsqueeze(0)
    is_last = images.is_contiguous(memory_format=torch.channels_last)
    channels_last = is_last and not images.is_contiguous()
    options = {
        "kernel_size": kernel,
        "stride": stride,
        "padding": _four_sides(padding, kernel, stride, dilation),
        "dilation": dilation,
        "groups": groups,
        "activation": activation,
        "out_dtype": out_dtype,
        "channels_last": channels_last,
    }
    tensors = (images if channels_last else images.contiguous(), weight_q, weight_scale, bias)
    needs_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, bias)
    )
    run = _Int8Conv2d.apply if needs_grad else _Int8Conv2d.forward
    y = run(*tensors, x_scale, options)
    return y if x.dim() == 4 else y.squeeze(0)


def pack_conv2d_weight(weight_q: Tensor, groups: int = 1) -> Tensor:
    """The int8 weight (O, C / groups, kH, kW) in the order in which :func:`int8_conv2d` reads it:
    an opaque tensor of one dimension, for this device alone.

    Raises:
        ValueError: another dtype or number of dimensions; groups that don't divide O.
        NotImplementedError: no backend for the device.
    """
    if weight_q.dim() != 4 or weight_q.size(0) % groups:
        shape = list(weight_q.shape)
        raise ValueError(
            f"weight_q must have shape [O, C / groups, kH, kW] with groups, {groups}, that divide "
            f"O, got {shape}"
        )
    outputs, *shape = weight_q.shape
    merged = _merged(outputs // groups, groups)
    if merged > 1:
        dense = weight_q.new_zeros(groups // merged, merged, outputs // groups, merged, *shape)
        diagonal = torch.arange(merged, device=weight_q.device)
        dense[:, diagonal, :, diagonal] = weight_q.view(*dense.shape[:3], *shape).transpose(0, 1)
        weight_q = dense.flatten(3, 4).flatten(0, 2)
    rows = weight_q.permute(0, 2, 3, 1).flatten(1)  # [O, kH * kW * C * merged / groups]
    return torch.cat([pack_weight(dense) for dense in rows.chunk(groups // merged)])


def unpack_conv2d_weight(packed: Tensor, shape: torch.Size, groups: int = 1) -> Tensor:
    """The plain weight of this shape."""
    outputs, C, kH, kW = shape
    merged = _merged(outputs // groups, groups)
    unpack = backends.select("unpack_weight", packed.device.type).unpack_weight.default
    N, K = merged * outputs // groups, kH * kW * C * merged
    rows = torch.cat([unpack(dense, N, K) for dense in packed.chunk(groups // merged)])
    blocks = rows.view(groups // merged, merged, outputs // groups, kH, kW, merged, C)
    diagonal = torch.arange(merged, device=packed.device)
    weight_q = blocks[:, diagonal, :, :, :, diagonal].transpose(
        0, 1
    )  # [..., O / groups, kH, kW, C]
    return weight_q.flatten(0, 2).permute(0, 3, 1, 2).contiguous()


def _merged(group_outputs: int, groups: int) -> int:
    """How many small groups are packed as one, with zeros where they don't meet: the kernels
    multiply 16 outputs at once anyway, and so needn't read the input for each group."""
    most = max(16 // max(group_outputs, 1), 1)
    return max(n for n in range(1, most + 1) if groups % n == 0)


def _pair(name: str, value: Pair) -> list[int]:
    pair = [value, value] if isinstance(value, int) else list(value)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"{name} must be one or two positive integers, got {value}")
    return pair


def _four_sides(
    padding: Pair | str, kernel: list[int], stride: list[int], dilation: list[int]
) -> list[int]:
    """Top, bottom, left, right."""
    if padding == "same":
        if stride != [1, 1]:
            raise ValueError(f"padding 'same' needs stride 1, got {stride}")
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return [side for n in totals for side in (n // 2, n - n // 2)]
    if padding == "valid":
        return [0] * 4
    pair = [padding] * 2 if isinstance(padding, int) else padding
    if isinstance(pair, str) or len(pair) != 2 or min(pair) < 0:
        raise ValueError(
            f"padding must be 'same', 'valid', or one or two integers from 0 on, got {padding!r}"
        )
    return [side for n in pair for side in (n, n)]


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (size + padding - dilation * (kernel - 1) - 1) // stride + 1


def _fake(
    x, weight_q, weight_scale, bias=None, x_scale=None,
    *, kernel_size, stride, padding, dilation, out_dtype=None, channels_last=False, **options,
):  # fmt: skip
    top, bottom, left, right = padding
    size = [
        output_size(*arguments)
        for arguments in zip(
            x.shape[2:], kernel_size, stride, (top + bottom, left + right), dilation, strict=True
        )
    ]
    return torch.empty(
        (x.size(0), weight_scale.size(0), *size),
        dtype=out_dtype or x.dtype,
        device=x.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )


backends.register("int8_conv2d", _fake)


class _Int8Conv2d(torch.autograd.Function):
    """The quantization of x counts as the identity; the weight in the gradient is what its integers
    stand for."""

    @staticmethod
    def forward(*args):
        *tensors, options = args
        ops = backends.select("int8_conv2d", tensors[0].device.type)
        return ops.int8_conv2d.default(*tensors, **options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.options = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad):
        x, weight_q, weight_scale, bias, x_scale = ctx.saved_tensors
        options, grad = ctx.options, grad.float()
        if options["activation"] is not None:
            inner_options = {**options, "activation": None, "out_dtype": torch.float32}
            inner = _Int8Conv2d.forward(x, weight_q, weight_scale, bias, x_scale, inner_options)
            grad = ACTIVATION_GRADS[options["activation"]](grad, inner)
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            N, C, H, W = x.shape
            if weight_q.dim() == 1:
                shape = (len(weight_scale), C // options["groups"], *options["kernel_size"])
                weight_q = unpack_conv2d_weight(weight_q, shape, options["groups"])
            top, bottom, left, right = options["padding"]
            padded = torch.nn.grad.conv2d_input(
                (N, C, H + top + bottom, W + left + right),
                weight_q * weight_scale.view(-1, 1, 1, 1),
                grad,
                options["stride"],
                0,
                options["dilation"],
                options["groups"],
            )
            grad_x = F.pad(padded, (-left, -right, -top, -bottom)).to(x.dtype)
        if ctx.needs_input_grad[3]:
            grad_bias = grad.sum((0, 2, 3)).to(bias.dtype)
        return grad_x, None, None, grad_bias, None, None
