"""A linear layer with an INT8 weight, for inference."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigkern import backends
from bigkern.nn.int8_calibration import column_range, outlier_columns, smoothing_scales
from bigkern.nn.int8_layer import (
    Int8Layer,
    check_layer,
    check_range,
    output_dtype,
    static_scale,
)
from bigkern.ops.int8_mm import int8_linear, pack_weight, quantize_rows, weight_only_linear
from bigkern.ops.reference_int8 import ACTIVATIONS

MODES = ("dynamic", "static", "weight_only")


class Int8Linear(Int8Layer):
    """:class:`torch.nn.Linear` with an int8 weight; made by :meth:`from_linear`.

    The gradient flows to the input, through the dequantized weight; nothing here is trained (see
    :class:`Int8TrainingLinear`).

    ``state_dict()`` holds ``weight_q`` (int8 [N, K]), ``weight_scale`` (float32 [N], or
    [N, K / group_size]), ``bias``, and where the options ask for it ``x_scale``, ``input_factor``,
    ``outlier_columns`` and ``outlier_weight``. It can be loaded into a layer that was constructed
    with the same arguments.

    Args:
        in_features, out_features, bias, device, dtype: as of :class:`torch.nn.Linear`; dtype is
            that of the bias and of the outliers' weight.
        mode: how the input enters the product.
            ``dynamic``: in int8, each row with a scale of its own.
            ``static``: in int8, with one scale that calibration has found.
            ``weight_only``: as it is.
        group_size: weight_only: so many columns of the weight share a scale; 0: all do.
        activation: applied to the output: ``relu``, ``gelu``, ``gelu_tanh`` or ``silu``.
        has_input_factor: the input's columns are multiplied by ``input_factor`` first.
        num_outliers: so many columns are multiplied in floating point.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        mode: str = "dynamic",
        *,
        group_size: int = 0,
        activation: str | None = None,
        has_input_factor: bool = False,
        num_outliers: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        is_weight_only = mode == "weight_only"
        if is_weight_only and (has_input_factor or num_outliers):
            raise ValueError("alpha and outlier_threshold are of no use to mode weight_only")
        if group_size and not is_weight_only:
            raise ValueError(f"group_size is an option of mode weight_only, got mode {mode!r}")
        if group_size < 0:
            raise ValueError(f"group_size must be 0 or positive, got {group_size}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {list(ACTIVATIONS)}, got {activation!r}")
        self.in_features, self.out_features = in_features, out_features
        self.mode, self.group_size, self.activation = mode, group_size, activation
        self.packs = not is_weight_only
        groups = [-(-in_features // group_size)] if group_size else []
        self._register(
            weight_shape=(out_features, in_features),
            scale_shape=(out_features, *groups),
            has_bias=bias,
            is_static=mode == "static",
            device=device,
            dtype=dtype,
        )
        factor = columns = outlier_weight = None
        if has_input_factor:
            factor = torch.ones(in_features, dtype=torch.float32, device=device)
        if num_outliers:
            columns = torch.arange(num_outliers, device=device)
            outlier_weight = torch.zeros(out_features, num_outliers, dtype=dtype, device=device)
        self._add_buffer("input_factor", factor)
        self._add_buffer("outlier_columns", columns)
        self._add_buffer("outlier_weight", outlier_weight)
        self._pack()

    @classmethod
    @torch.no_grad()
    def from_linear(
        cls,
        linear: nn.Linear,
        mode: str = "dynamic",
        *,
        input_range: Tensor | None = None,
        alpha: float | None = None,
        outlier_threshold: float | None = None,
        group_size: int = 0,
        activation: str | None = None,
    ) -> "Int8Linear":
        """A layer with the weight of `linear`, quantized by row, and a copy of its bias.

        Args:
            linear: in float32, bfloat16 or float16; it isn't changed.
            mode, group_size, activation: see the class.
            input_range: the largest magnitude of each column of the input [in_features], as
                :func:`input_ranges` finds it. Mode static, alpha and outlier_threshold need it.
            alpha: from 0 to 1: smooth the input (see :func:`smooth_`, which costs nothing where
                there is a layer before this one), by a factor for each column.
            outlier_threshold: multiply the columns that reach this in floating point, as LLM.int8
                does (Dettmers et al. 2022, https://arxiv.org/abs/2208.07339); which ones is fixed
                here.

        Raises:
            TypeError: `linear` is something else, or of another dtype.
            ValueError: weights or ranges that aren't finite; options that don't go together.
        """
        check_layer("linear", linear, nn.Linear)
        weight = linear.weight.detach().float()  # [N, K]
        N, K = weight.shape
        needs_range = {
            "mode static": mode == "static",
            "alpha": alpha is not None,
            "outlier_threshold": outlier_threshold is not None,
        }
        for what, needs in needs_range.items():
            if needs:
                input_range = check_range(input_range, K, what).to(weight.device)
                break
        columns = None
        if outlier_threshold is not None:
            columns = outlier_columns(input_range, outlier_threshold)
        layer = cls(
            K,
            N,
            linear.bias is not None,
            mode,
            group_size=group_size,
            activation=activation,
            has_input_factor=alpha is not None,
            num_outliers=0 if columns is None else len(columns),
            device=weight.device,
            dtype=linear.weight.dtype,
        )
        if layer.outlier_columns is not None:
            layer.outlier_columns.copy_(columns)
            layer.outlier_weight.copy_(linear.weight.detach()[:, columns])
            weight = weight.index_fill(1, columns, 0.0)
            input_range = input_range.index_fill(0, columns, 0.0)
        if alpha is not None:
            scales = smoothing_scales(input_range, column_range(weight), alpha)
            layer.input_factor.copy_(1 / scales)
            weight, input_range = weight * scales, input_range / scales
        if mode == "static":
            layer.x_scale.copy_(static_scale(input_range))
        if linear.bias is not None:
            layer.bias.copy_(linear.bias)
        with layer._unpacked():
            if group_size:
                weight = F.pad(weight, (0, -K % group_size)).unflatten(1, (-1, group_size))
            weight_q, scale = quantize_rows(weight)
            layer.weight_q.copy_(weight_q.flatten(1)[:, :K] if group_size else weight_q)
            layer.weight_scale.copy_(scale)
        return layer.train(linear.training)

    def _pack_weight(self, weight_q: Tensor) -> Tensor:
        return pack_weight(weight_q)

    def _unpack_weight(self, packed: Tensor) -> Tensor:
        ops = backends.select("unpack_weight", packed.device.type)
        return ops.unpack_weight.default(packed, self.out_features, self.in_features)

    def forward(self, input: Tensor) -> Tensor:
        """[..., out_features] for [..., in_features], of its dtype: float32, bfloat16, float16."""
        self._check_device(input)
        dtype, columns = output_dtype(input), self.outlier_columns
        if self.mode == "weight_only":
            y = weight_only_linear(
                input.to(dtype),
                self.weight_q,
                self.weight_scale,
                self.bias,
                group_size=self.group_size,
            )
            return ACTIVATIONS[self.activation](y)
        inliers = input if columns is None else input.index_fill(-1, columns, 0.0)
        if self.input_factor is not None:
            inliers = inliers * self.input_factor
        y = int8_linear(
            inliers,
            self._kernel_weight,
            self.weight_scale,
            self.bias,
            activation=self.activation if columns is None else None,
            x_scale=self.x_scale,
            out_dtype=dtype,
        )
        if columns is None:
            return y
        y = y + F.linear(input[..., columns].to(dtype), self.outlier_weight.to(dtype))
        return ACTIVATIONS[self.activation](y)

    def extra_repr(self) -> str:
        parts = [
            f"in_features={self.in_features}, out_features={self.out_features}",
            f"bias={self.bias is not None}, mode={self.mode}",
        ]
        if self.group_size:
            parts.append(f"group_size={self.group_size}")
        if self.outlier_columns is not None:
            parts.append(f"num_outliers={len(self.outlier_columns)}")
        if self.input_factor is not None:
            parts.append("has_input_factor=True")
        if self.activation is not None:
            parts.append(f"activation={self.activation}")
        return ", ".join(parts)
