"""Products of 8-bit integers, and linear layers made of them."""

import torch
from torch import Tensor

from bigkern import backends
from bigkern.ops import int8_autograd


def int8_mm(a: Tensor, b: Tensor) -> Tensor:
    """The product of int8 matrices in int32, exact.

    Every element is the sum modulo 2**32, in two's complement: the sum itself whenever that fits
    int32, as it always does up to K = 131,071 (131,072 products of -128 by -128 are 2**31).

    Args:
        a: (..., M, K), int8, the full range from -128 to 127.
        b: (..., K, N), int8, on the device of a; the leading dimensions broadcast. Of either any
            strides: a transposed b, as weights lie, is read as it lies. On a GPU so is what lies in
            rows (of b: or columns) of whole 16 bytes; anything else is copied first.

    Returns:
        (..., M, N), int32. Any size may be 0; with K = 0 the result is zeros.

    Raises:
        ValueError: another dtype, shapes or devices that don't fit.
        NotImplementedError: no backend for the device.
    """
    for name, x in (("a", a), ("b", b)):
        if x.dim() < 2:
            raise ValueError(f"{name} must have 2 dimensions at least, got shape {list(x.shape)}")
    lead = None
    if a.dim() > 2 or b.dim() > 2:
        try:
            lead = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        except RuntimeError as error:
            raise ValueError(
                "a and b must have leading dimensions that broadcast, "
                f"got shapes {list(a.shape)} and {list(b.shape)}"
            ) from error
        a, b = (x.expand(*lead, *x.shape[-2:]) for x in (a, b))
        if len(lead) > 1:
            a, b = (x.flatten(0, -3) for x in (a, b))
    out = backends.select("int8_mm", a.device.type).int8_mm.default(a, b)
    return out if lead is None or len(lead) == 1 else out.unflatten(0, lead)


def quantize_rows(
    x: Tensor, *, static_scale: Tensor | float | None = None
) -> tuple[Tensor, Tensor]:
    """Symmetric quantisation of each row to int8: of each token, or each output channel of a
    weight.

    ``scale = max|x| / 127`` and ``values = round(x / scale)``, half to even, in float32. A row of
    zeros, or one so small that its scale is 0 in float32, has scale 0 and zeros. A row with an
    infinity or NaN has scale NaN and zeros: whatever is computed with it is NaN.

    Args:
        x: (..., K), float32, bfloat16 or float16.
        static_scale: instead of max|x| / 127, a number for all rows, or a float32 tensor of one
            element or with one for each row (...), from 0 on. Beyond 127 steps values saturate.
            On a GPU one that is negative or not finite isn't an error, which would take waiting for
            the GPU: its rows have scale NaN.

    Returns:
        int8 values (..., K) from -127 to 127 and their float32 scale (...).

    Raises:
        ValueError: another dtype or device than stated, a scale that is negative or not finite.
        NotImplementedError: no backend for the device.
    """
    static_scale = scale_tensor(static_scale, x)
    ops = backends.select("quantize_rows", x.device.type)
    return ops.quantize_rows.default(x.detach(), static_scale)


def pack_weight(weight_q: Tensor) -> Tensor:
    """The int8 weight (N, K) in the order in which :func:`int8_linear` reads it: an opaque tensor
    of one dimension, for this device alone. To keep in files, keep the plain weight.

    On a CPU it has its shape within. On a GPU, where reading that would take waiting, it is the
    plain weight in rows of whole 16 bytes, and its size is all that tells it from another.

    Raises:
        ValueError: another dtype or number of dimensions.
        NotImplementedError: no backend for the device.
    """
    return backends.select("pack_weight", weight_q.device.type).pack_weight.default(weight_q)


def int8_linear(
    x: Tensor,
    weight_q: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    x_scale: Tensor | float | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    r"""A linear layer of int8 weights on inputs that are quantised as :func:`quantize_rows` does:

    .. math::
        y_{ij} = \mathrm{act}\Big(s_i\,t_j \sum_k q_{ik} w_{jk} + \mathrm{bias}_j\Big)

    with the integers :math:`q` and scales :math:`s` of x, :math:`w` and :math:`t` of the weight.
    The sum is exact, what follows is in float32, rounded once; of what is in between, a GPU stores
    the integers of x, a CPU nothing. (Jacob et al. 2018, https://arxiv.org/abs/1712.05877, section
    2.2; the scales of rows as in Dettmers et al. 2022, https://arxiv.org/abs/2208.07339, equation
    3.)

    The gradient of x is that of a linear layer with the weight that the integers stand for:
    quantising x counts as the identity. The bias has a gradient too.

    Args:
        x: (..., K), float32, bfloat16 or float16.
        weight_q: int8 (N, K), or what :func:`pack_weight` makes of it, which saves its packing in
            each call.
        weight_scale: float32 (N).
        bias: (N), float32, bfloat16 or float16.
        activation: "relu", "gelu" (exact), "gelu_tanh" (its approximation), "silu" or None.
        x_scale: a static scale of x, as quantize_rows's static_scale: values beyond it saturate,
            and one that is none raises an error on a CPU, gives NaN on a GPU.
        out_dtype: float32, bfloat16 or float16; x's by default.

    Returns:
        (..., N); rows of x with an infinity or NaN give NaN.

    Raises:
        ValueError: shapes that don't fit, another dtype or device than stated here, an unknown
            activation, an x_scale that is negative or not finite; K over 132,104, whose sums might
            not fit int32.
        NotImplementedError: no backend for the device; a weight_scale or x_scale that requires a
            gradient.
    """
    x_scale = scale_tensor(x_scale, x)
    check_no_grad(weight_scale=weight_scale, x_scale=x_scale)
    return int8_autograd.int8_linear(
        x, weight_q, weight_scale, bias, x_scale, activation, out_dtype
    )


def weight_only_linear(
    x: Tensor,
    weight_q: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    group_size: int = 0,
) -> Tensor:
    r"""A linear layer of int8 weights on inputs as they are: :math:`y_{ij} = \sum_k x_{ik}\,
    t_{jg}\, w_{jk} + \mathrm{bias}_j` with the scale :math:`t` of k's group g, in float32, rounded
    once. For few rows of x, where reading the weight takes the time.

    Differentiable by x and bias.

    Args:
        x: (..., K), float32, bfloat16 or float16.
        weight_q: int8 (N, K).
        weight_scale: float32 (N), or with a group_size (N, ceil(K / group_size)).
        bias: (N), float32, bfloat16 or float16.
        group_size: so many neighbours along K share a scale; 0: the whole row does.

    Returns:
        (..., N), of the dtype of x.

    Raises:
        ValueError: shapes that don't fit, another dtype or device than stated here.
        NotImplementedError: no backend for the device; a weight_scale that requires a gradient.
    """
    check_no_grad(weight_scale=weight_scale)
    return int8_autograd.weight_only_linear(x, weight_q, weight_scale, bias, group_size)


def scale_tensor(scale: Tensor | float | None, x: Tensor) -> Tensor | None:
    if scale is None or isinstance(scale, Tensor):
        return scale
    return torch.full((), scale, dtype=torch.float32, device=x.device)


def check_no_grad(**scales: Tensor | None) -> None:
    for name, scale in scales.items():
        if scale is not None and scale.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(f"{name} can't have a gradient: detach() it")
