"""The door of the int8 ops: checks their arguments, as csrc/int8_mm_call.h does."""

import math

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = {None: 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
# So many products of a quantized x, from -127 to 127, with a weight, from -128 on, fit int32.
MAX_TERMS = (2**31 - 1) // (127 * 128)


def check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check_int8(name: str, t: Tensor) -> None:
    check(t.dtype == torch.int8, f"{name} must be torch.int8, got {t.dtype}")


def check_float(name: str, dtype: torch.dtype) -> None:
    check(dtype in FLOATS, f"{name} must be float32, bfloat16 or float16, got {dtype}")


def check_float32(name: str, t: Tensor) -> None:
    check(t.dtype == torch.float32, f"{name} must be torch.float32, got {t.dtype}")


def check_same_device(name: str, t: Tensor, other: str, like: Tensor) -> None:
    wanted, got = like.device, t.device
    check(got == wanted, f"{name} must be on the device of {other}, {wanted}, got {got}")


def as_rows(name: str, x: Tensor) -> Tensor:
    """x [..., K] as [rows, K]: copied where they aren't apart by one stride or their elements not
    adjacent."""
    check_float(name, x.dtype)
    check(x.dim() > 0, f"{name} must have shape [..., K], got []")
    if x.dim() == 2 and (x.size(1) < 2 or x.stride(1) == 1):
        return x
    return x.contiguous().view(math.prod(x.shape[:-1]), x.size(-1))


def read_static_scale(name: str, scale: Tensor | None, x: Tensor) -> Tensor | None:
    """One scale for all rows, or one for each, without gaps."""
    if scale is None:
        return None
    check(
        scale.numel() == 1 or scale.shape == x.shape[:-1],
        f"{name} must have one element, or one for each row of x {list(x.shape)}, got shape "
        f"{list(scale.shape)}",
    )
    check_float32(name, scale)
    check_same_device(name, scale, "x", x)
    return scale.contiguous()


def read_weight_scale(scale: Tensor, x: Tensor) -> Tensor:
    check_float32("weight_scale", scale)
    check_same_device("weight_scale", scale, "x", x)
    return scale.contiguous()


def read_bias(bias: Tensor | None, x: Tensor, N: int) -> Tensor | None:
    if bias is None:
        return None
    check_float("bias", bias.dtype)
    check(bias.shape == (N,), f"bias must have shape [{N}], got {list(bias.shape)}")
    check_same_device("bias", bias, "x", x)
    return bias.contiguous()


def read_activation(activation: str | None) -> int:
    """Its number in the kernels."""
    check(
        activation in ACTIVATIONS,
        f"activation must be relu, gelu, gelu_tanh, silu or None, got {activation}",
    )
    return ACTIVATIONS[activation]


def check_mm(a: Tensor, b: Tensor) -> None:
    check_int8("a", a)
    check_int8("b", b)
    check_same_device("b", b, "a", a)
    shapes = f"{list(a.shape)} and {list(b.shape)}"
    check(
        a.dim() in (2, 3) and b.dim() == a.dim(),
        f"a and b must both have 2 dimensions, or 3, got shapes {shapes}",
    )
    check(
        a.shape[:-2] == b.shape[:-2],
        f"b must have the batch size of a, {a.size(0)}, got shape {list(b.shape)}",
    )
    check(
        a.size(-1) == b.size(-2),
        f"b must have as many rows as a has columns, {a.size(-1)}, got shape {list(b.shape)}",
    )


def check_scaled_mm(
    a: Tensor, b: Tensor, row_scale: Tensor, out_dtype: torch.dtype | None
) -> torch.dtype:
    """The dtype of the result."""
    check_int8("a", a)
    check_int8("b", b)
    check_same_device("b", b, "a", a)
    check(
        a.dim() == 2 and b.dim() == 2 and a.size(1) == b.size(0),
        f"a and b must have shapes [M, K] and [K, N], got {list(a.shape)} and {list(b.shape)}",
    )
    check(
        row_scale.dtype == torch.float32 and row_scale.shape == a.shape[:1],
        f"row_scale must be torch.float32 of shape [{a.size(0)}], got {row_scale.dtype} of shape "
        f"{list(row_scale.shape)}",
    )
    check_same_device("row_scale", row_scale, "a", a)
    dtype = out_dtype or torch.float32
    check_float("out_dtype", dtype)
    return dtype


def check_linear_weight(weight_q: Tensor, weight_scale: Tensor, x: Tensor) -> None:
    check(
        weight_scale.dim() == 1, f"weight_scale must have shape [N], got {list(weight_scale.shape)}"
    )
    check_int8("weight_q", weight_q)
    check_same_device("weight_q", weight_q, "x", x)
    check_terms("K", x.size(-1))
    check(
        weight_q.dim() != 1,
        f"weight_q must be the plain weight [N, K]: the backend triton reads no packed one, got "
        f"{list(weight_q.shape)}",
    )
    check(
        weight_q.dim() == 2,
        f"weight_q must have shape [N, K] or be packed, got {list(weight_q.shape)}",
    )
    check(
        weight_q.size(1) == x.size(-1),
        f"x must have the K of weight_q {list(weight_q.shape)} as its last size, got "
        f"{list(x.shape)}",
    )
    N = weight_q.size(0)
    check(
        weight_scale.size(0) == N,
        f"weight_scale must have shape [{N}], got {list(weight_scale.shape)}",
    )


def check_terms(what: str, terms: int) -> None:
    check(
        terms <= MAX_TERMS,
        f"{what} must be at most {MAX_TERMS}, or sums might not fit int32, got {terms}",
    )


def check_weight_only(x: Tensor, weight_q: Tensor, weight_scale: Tensor, group_size: int) -> None:
    check_float("x", x.dtype)
    check_int8("weight_q", weight_q)
    check(x.dim() > 0, "x must have shape [..., K], got []")
    check(
        weight_q.dim() == 2 and weight_q.size(1) == x.size(-1),
        f"weight_q must have shape [N, K] with the last size of x {list(x.shape)} as K, got "
        f"{list(weight_q.shape)}",
    )
    check_same_device("weight_q", weight_q, "x", x)
    check(group_size >= 0, f"group_size must be 0 (whole rows) or positive, got {group_size}")
    N, K = weight_q.shape
    wanted = [N, -(-K // group_size)] if group_size else [N]
    hint = f" for group_size {group_size}" if group_size else ""
    got = list(weight_scale.shape)
    check(got == wanted, f"weight_scale must have shape {wanted}{hint}, got {got}")


def check_stochastic(x: Tensor, philox: Tensor, factor: Tensor | None) -> None:
    wanted = "torch.float32, torch.bfloat16 or torch.float16"
    check(x.dtype in FLOATS, f"x must be {wanted}, got {x.dtype}")
    check(x.dim() == 2, f"x must have 2 dimensions, got shape {list(x.shape)}")
    check(
        philox.dtype == torch.int64 and philox.shape == (2,),
        f"philox must be torch.int64 of shape [2], got {philox.dtype} of shape "
        f"{list(philox.shape)}",
    )
    if factor is not None:
        check(
            factor.dtype == torch.float32 and factor.shape == x.shape[1:],
            f"factor must be torch.float32 of shape [{x.size(1)}], got {factor.dtype} of shape "
            f"{list(factor.shape)}",
        )
    for t in (philox, philox if factor is None else factor):
        check(t.device == x.device, f"philox and factor must be on {x.device}, got {t.device}")
