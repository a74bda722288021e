"""A 2-D convolution with an INT8 weight, for inference."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigkern.nn.int8_layer import (
    Int8Layer,
    check_layer,
    check_range,
    output_dtype,
    static_scale,
)
from bigkern.ops.int8_conv2d import int8_conv2d, pack_conv2d_weight, unpack_conv2d_weight
from bigkern.ops.int8_mm import quantize_rows
from bigkern.ops.reference_int8 import ACTIVATIONS

MODES = ("dynamic", "static")


class Int8Conv2d(Int8Layer):
    """:class:`torch.nn.Conv2d` with an int8 weight; made by :meth:`from_conv`.

    The gradient flows to the input, through the dequantized weight.

    ``state_dict()`` holds ``weight_q`` (int8, of the shape of torch's weight), ``weight_scale``
    (float32 [out_channels]), ``bias``, and in mode static ``x_scale``. It can be loaded into a
    layer that was constructed with the same arguments.

    Args:
        mode: the input is quantized to int8
            ``dynamic``: each image with a scale of its own,
            ``static``: with one scale that calibration has found.
        activation: applied to the output: ``relu``, ``gelu``, ``gelu_tanh`` or ``silu``.
        The others: as of :class:`torch.nn.Conv2d`; dtype is that of the bias.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        mode: str = "dynamic",
        *,
        activation: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {list(ACTIVATIONS)}, got {activation!r}")
        # It checks the arguments, and knows how much a padding mode pads.
        conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups,
            bias=False, padding_mode=padding_mode, device="meta",
        )  # fmt: skip
        for name in (*nn.Conv2d.__constants__, "_reversed_padding_repeated_twice"):
            setattr(self, name, getattr(conv, name))
        self.mode, self.activation, self.weight_shape = mode, activation, conv.weight.shape
        self._register(conv.weight.shape, (out_channels,), bias, mode == "static", device, dtype)
        self._pack()

    @classmethod
    @torch.no_grad()
    def from_conv(
        cls,
        conv: nn.Conv2d,
        mode: str = "dynamic",
        *,
        input_range: Tensor | None = None,
        activation: str | None = None,
    ) -> "Int8Conv2d":
        """A layer with the weight of `conv`, quantized by output channel, and a copy of its bias.

        Args:
            conv: in float32, bfloat16 or float16; it isn't changed.
            mode, activation: see the class.
            input_range: the largest magnitude of each channel of the input [in_channels], as
                :func:`input_ranges` finds it. Mode static needs it.

        Raises:
            TypeError: `conv` is something else, or of another dtype.
            ValueError: weights or ranges that aren't finite.
        """
        check_layer("conv", conv, nn.Conv2d)
        layer = cls(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding,
            conv.dilation, conv.groups, conv.bias is not None, conv.padding_mode, mode,
            activation=activation, device=conv.weight.device, dtype=conv.weight.dtype,
        )  # fmt: skip
        if mode == "static":
            layer.x_scale.copy_(static_scale(check_range(input_range, conv.in_channels, mode)))
        if conv.bias is not None:
            layer.bias.copy_(conv.bias)
        with layer._unpacked():
            weight_q, scale = quantize_rows(conv.weight.flatten(1))
            layer.weight_q.copy_(weight_q.view_as(conv.weight))
            layer.weight_scale.copy_(scale)
        return layer.train(conv.training)

    def _pack_weight(self, weight_q: Tensor) -> Tensor:
        return pack_conv2d_weight(weight_q, self.groups)

    def _unpack_weight(self, packed: Tensor) -> Tensor:
        return unpack_conv2d_weight(packed, self.weight_shape, self.groups)

    def forward(self, input: Tensor) -> Tensor:
        """As torch.nn.Conv2d's, for float32, bfloat16 and float16, and of the input's dtype."""
        self._check_device(input)
        dtype, padding = output_dtype(input), self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, self.padding_mode)
            padding = 0
        return int8_conv2d(
            input,
            self._kernel_weight,
            self.weight_scale,
            self.bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            kernel_size=self.kernel_size,
            activation=self.activation,
            x_scale=self.x_scale,
            out_dtype=dtype,
        )

    def extra_repr(self) -> str:
        parts = [
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}",
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}",
            f"groups={self.groups}, bias={self.bias is not None}",
            f"padding_mode={self.padding_mode}, mode={self.mode}",
        ]
        return ", ".join(parts + ([f"activation={self.activation}"] if self.activation else []))
