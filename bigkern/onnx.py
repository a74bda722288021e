"""Export to ONNX: the same results from standard operators, which every runtime has."""

import contextlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigkern.backends import NAMESPACES
from bigkern.nn.int8_layer import Int8Layer
from bigkern.ops import reference, reference_int8, reference_int8_conv2d
from bigkern.ops.int8_conv2d import output_size

OPSET = 21  # the first whose DequantizeLinear knows groups


def export(
    model: nn.Module,
    args: tuple[Any, ...],
    path: str | Path | None = None,
    *,
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
    **options: Any,
) -> "torch.onnx.ONNXProgram":
    """Write `model` as an ONNX graph for inference, with what defines bigkern's ops in their place.

    INT8 layers multiply the same integers, quantized as they come, by ``MatMulInteger`` and
    ``ConvInteger``: the results are bigkern's to the rounding of float32. ``weight_only`` keeps
    its weight in int8, with ``DequantizeLinear``. Attention is spelled out, and stores its scores.

    Args:
        model: one that :func:`torch.export.export` takes, evaluated: ``model.eval()``.
        args, kwargs: an example of its inputs.
        path: the file to write; None: only return the program.
        dynamic_shapes: as of :func:`torch.export.export`.
        options: more of :func:`torch.onnx.export`'s, such as ``input_names``.

    Raises:
        ImportError: onnxscript isn't installed: ``pip install 'bigkern[onnx]'``.
        NotImplementedError: attention with dropout or packed sequences.
    """
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, Int8Layer):
                stack.enter_context(module._unpacked())
        stack.enter_context(torch.no_grad())
        program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    definitions = {
        packet.default: definition
        for namespace in NAMESPACES.values()
        for op, definition in DEFINITIONS.items()
        if (packet := getattr(getattr(torch.ops, namespace), op, None))
    }
    program = program.run_decompositions(definitions)
    return torch.onnx.export(program, f=path, opset_version=OPSET, dynamo=True, **options)


def _attention(*args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    _check_tensors(*args[3:])
    return reference.attention(*args, **options)


def _attention_weights(*args: Any, **options: Any) -> Tensor:
    _check_tensors(*args[4:])
    return reference.attention_weights(*args, **options)


def _check_tensors(attn_mask=None, alibi_slopes=None, philox=None, cu_seqlens_q=None, *_) -> None:
    if philox is not None:
        raise NotImplementedError("attention with dropout can't be exported: call model.eval()")
    if cu_seqlens_q is not None:
        raise NotImplementedError("packed sequences can't be exported: pad them, and give a mask")


def _int8_mm(a: Tensor, b: Tensor) -> Tensor:
    shape = (*a.shape[:-1], b.shape[-1])
    return torch.onnx.ops.symbolic("MatMulInteger", (a, b), dtype=torch.int32, shape=shape)


def _int8_linear(
    x: Tensor,
    weight_q: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    x_scale: Tensor | None = None,
    *,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """As the reference has it, but for the order of the scales: where a product is multiplied by
    that of both, onnxruntime 1.32 fuses it and takes the first row's scale for all."""
    values, scale = reference_int8.quantize_rows(x, x_scale)
    out = _int8_mm(values, weight_q.T).float() * scale[..., None] * weight_scale
    if bias is not None:
        out = out + bias.float()
    return reference_int8.ACTIVATIONS[activation](out).to(out_dtype or x.dtype)


def _weight_only_linear(
    x: Tensor,
    weight_q: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    group_size: int = 0,
) -> Tensor:
    weight = torch.onnx.ops.symbolic(
        "DequantizeLinear",
        (weight_q, weight_scale),
        {"axis": 1, "block_size": group_size} if group_size else {"axis": 0},
        dtype=torch.float32,
        shape=weight_q.shape,
    )
    return F.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)


def _int8_conv2d(
    *tensors: Any,
    kernel_size: list[int],
    groups: int = 1,
    channels_last: bool = False,
    **options: Any,
) -> Tensor:
    options |= {"groups": groups, "conv2d": _conv2d}
    return reference_int8_conv2d.int8_conv2d(*tensors, **options)


def _conv2d(
    values: Tensor,
    weight_q: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """In uint8, with 128 for 0: onnxruntime lacks ConvInteger of int8, and without VNNI its
    products of uint8 by int8 saturate."""
    top, bottom, left, right = padding
    sizes = zip(
        values.shape[2:],
        weight_q.shape[2:],
        stride,
        (top + bottom, left + right),
        dilation,
        strict=True,
    )
    zero = torch.full((), 128, dtype=torch.uint8, device=values.device)
    operands = ((x.to(torch.int32) + 128).to(torch.uint8) for x in (values, weight_q))
    return torch.onnx.ops.symbolic(
        "ConvInteger",
        (*operands, zero, zero),
        {
            "strides": stride,
            "pads": [top, left, bottom, right],
            "dilations": dilation,
            "group": groups,
        },
        dtype=torch.int32,
        shape=(values.shape[0], weight_q.shape[0], *(output_size(*size) for size in sizes)),
    )


DEFINITIONS = {
    "attention": _attention,
    "attention_weights": _attention_weights,
    "int8_mm": _int8_mm,
    "quantize_rows": reference_int8.quantize_rows,
    "int8_linear": _int8_linear,
    "int8_conv2d": _int8_conv2d,
    "weight_only_linear": _weight_only_linear,
}
