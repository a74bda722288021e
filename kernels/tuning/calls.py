"""Calls that take a row of a table: what is measured, and what is compiled to see that it fits."""

import functools
from collections.abc import Callable

import torch
from bigkern.kernels.tuning import Row
from torch import Tensor

import bigkern
from bigkern.ops import adam_
from bigkern.ops.int8_conv2d import int8_conv2d


def call_of(row: Row, device: str, is_large: bool) -> Callable[[], object]:
    """A call of the row's op, as large as is worth measuring, or as small as has the same kernels.

    Raises:
        KeyError: no such op.
    """
    return _CALLS[row["op"]](getattr(torch, row["dtype"]), device, is_large, **row["shape"])


def _adam(dtype: torch.dtype, device: str, is_large: bool) -> Callable[[], object]:
    params = [torch.zeros(2**26 if is_large else 128, dtype=dtype, device=device)]
    grads, exp_avgs, exp_avg_sqs = ([torch.zeros_like(params[0])] for _ in range(3))
    lists = (params, grads, exp_avgs, exp_avg_sqs, [], [torch.zeros((), device=device)])
    options = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    return lambda: adam_(*lists, **options, max_grad_norm=1.0)


def _attention_inputs(
    dtype: torch.dtype, device: str, is_large: bool, E: int, L: int
) -> list[Tensor]:
    """Query, key, value; few queries have a long cache of keys."""
    S = L if L >= 128 else 8192
    heads = max(1, (2**15 if L >= 128 else 2**18) // S) if is_large else 1
    return [torch.randn(1, heads, n, E, device=device).to(dtype) for n in (L, S, S)]


def _attention(
    dtype: torch.dtype, device: str, is_large: bool, E: int, L: int = 4096, softcap: float = 0.0
) -> Callable[[], object]:
    inputs = _attention_inputs(dtype, device, is_large, E, L)
    return lambda: bigkern.scaled_dot_product_attention(*inputs, softcap=softcap)


def _attention_backward(
    dtype: torch.dtype, device: str, is_large: bool, E: int = 128, softcap: float = 0.0,
    has_mask: bool = False,
) -> Callable[[], object]:  # fmt: skip
    inputs = _attention_inputs(dtype, device, is_large, E, 4096)
    inputs += [torch.zeros(4096, 4096, dtype=dtype, device=device)] if has_mask else []
    inputs = [x.requires_grad_() for x in inputs]
    out = None

    def call() -> object:
        nonlocal out
        if out is None:
            out = bigkern.scaled_dot_product_attention(*inputs, softcap=softcap)
        return torch.autograd.grad(out, inputs, out, retain_graph=True)

    return call


def _int8(rows: int, columns: int, device: str) -> Tensor:
    return torch.randint(-128, 128, (rows, columns), dtype=torch.int8, device=device)


def _int8_mm(
    dtype: torch.dtype, device: str, is_large: bool, M: int, N: int | None = None
) -> Callable[[], object]:
    N, K = N or 4096, 4096 if is_large else 512
    a, b = _int8(M, K, device), _int8(N, K, device)
    return lambda: bigkern.int8_mm(a, b.T)


def _int8_conv2d(dtype: torch.dtype, device: str, is_large: bool) -> Callable[[], object]:
    batch, side = (32, 56) if is_large else (2, 8)
    x = torch.randn(batch, 64, side, side, device=device).to(dtype)
    weight_q, scale = _int8(64, 64 * 9, device).view(64, 64, 3, 3), torch.rand(64, device=device)
    return lambda: int8_conv2d(x, weight_q, scale, padding=1)


def _quantize_rows(dtype: torch.dtype, device: str, is_large: bool, K: int) -> Callable[[], object]:
    x = torch.randn(8192 if is_large else 16, K, device=device).to(dtype)
    return lambda: bigkern.quantize_rows(x)


def _weight_only_linear(
    dtype: torch.dtype, device: str, is_large: bool, M: int
) -> Callable[[], object]:
    side = 8192 if is_large else 512
    x, weight_q = torch.randn(M, side, device=device).to(dtype), _int8(side, side, device)
    scale = torch.rand(side, device=device)
    return lambda: bigkern.weight_only_linear(x, weight_q, scale)


_CALLS = {
    "adam_": _adam,
    "attention": _attention,
    "attention_extras": functools.partial(_attention, softcap=30.0),
    "attention_keys": _attention_backward,
    "attention_keys_extras": functools.partial(_attention_backward, softcap=30.0),
    "attention_queries": _attention_backward,
    "attention_queries_extras": functools.partial(_attention_backward, softcap=30.0),
    "attention_mask": functools.partial(_attention_backward, has_mask=True),
    "int8_conv2d": _int8_conv2d,
    "int8_mm": _int8_mm,
    "quantize_rows": _quantize_rows,
    "weight_only_linear": _weight_only_linear,
}
