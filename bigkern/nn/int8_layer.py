"""What the INT8 layers for inference share: an int8 weight, its scales, and how both are kept."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bigkern.backends import has
from bigkern.ops.autocast import autocast_dtype

SCALES = {"weight_scale", "x_scale", "input_factor"}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Int8Layer(nn.Module):
    """Holds the weight once: packed, where the kernels read it so and the backend packs. It is
    plain in ``state_dict()``, in pickles, and on its way to another device.

    The scales stay in float32, whatever the model is cast to. A subclass says how its weight is
    packed, in `_pack_weight` and `_unpack_weight`.
    """

    packs = True  # whether the kernels read a packed weight
    weight_packed: Tensor | None
    weight_scale: Tensor
    x_scale: Tensor | None

    def _register(
        self,
        weight_shape: tuple[int, ...],
        scale_shape: tuple[int, ...],
        has_bias: bool,
        is_static: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Adds the tensors, of zeros; the weight plain."""
        check_float("dtype", dtype or torch.get_default_dtype())
        self._buffers["weight_q"] = torch.zeros(weight_shape, dtype=torch.int8, device=device)
        if self.packs:
            self.register_buffer("weight_packed", None, persistent=False)
        else:
            self.weight_packed = None
        self.register_buffer("weight_scale", _zeros(scale_shape, device))
        self._add_buffer("x_scale", _zeros((), device) if is_static else None)
        self.bias = None
        if has_bias:
            bias = torch.zeros(weight_shape[0], dtype=dtype, device=device)
            self.bias = nn.Parameter(bias, requires_grad=False)

    def _add_buffer(self, name: str, x: Tensor | None) -> None:
        """None isn't made a buffer: torch.export (2.14) miscounts those."""
        if x is None:
            setattr(self, name, None)
        else:
            self.register_buffer(name, x)

    @property
    def weight_q(self) -> Tensor:
        """The plain int8 weight: a copy where it is packed."""
        if self.weight_packed is None:
            return self._buffers["weight_q"]
        return self._unpack_weight(self.weight_packed)

    @property
    def _kernel_weight(self) -> Tensor:
        """As the kernels read it."""
        return self.weight_q if self.weight_packed is None else self.weight_packed

    def _pack(self) -> None:
        weight_q = self._buffers["weight_q"]
        if self.packs and not weight_q.is_meta and has("pack_weight", weight_q.device.type):
            self.weight_packed = self._pack_weight(self._buffers.pop("weight_q"))

    @contextmanager
    def _unpacked(self) -> Iterator[None]:
        """With the plain weight for a buffer, which may be changed or replaced."""
        self._buffers["weight_q"] = self.weight_q
        self.weight_packed = None
        try:
            yield
        finally:
            self._pack()

    def _check_device(self, input: Tensor) -> None:
        device = self.weight_scale.device
        if input.device != device:
            raise ValueError(f"input must be on {device}, like the weight, got {input.device}")

    def _apply(self, fn, recurse=True):
        with self._unpacked():
            before = self._buffers.copy()
            super()._apply(fn, recurse)
            for name in SCALES & before.keys():
                if self._buffers[name].dtype != torch.float32:
                    self._buffers[name] = before[name].to(self._buffers[name].device)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight_q"] = self.weight_q

    def _load_from_state_dict(self, *args) -> None:
        with self._unpacked():
            super()._load_from_state_dict(*args)

    def __getstate__(self):
        buffers = {**self._buffers, "weight_packed": None, "weight_q": self.weight_q}
        return {**self.__dict__, "_buffers": buffers}

    def __setstate__(self, state) -> None:
        super().__setstate__(state)
        self._pack()


def _zeros(shape: tuple[int, ...], device: torch.device | str | None) -> Tensor:
    return torch.zeros(shape, dtype=torch.float32, device=device)


def check_float(name: str, dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        wanted = " or ".join(map(str, FLOATS))
        raise TypeError(f"{name} must be {wanted}, got {dtype}")


def check_layer(name: str, layer: nn.Module, wanted: type[nn.Module]) -> None:
    """Raises where `layer` isn't a layer of the type `wanted` that can be quantized."""
    if not isinstance(layer, wanted):
        raise TypeError(f"{name} must be a torch.nn.{wanted.__name__}, got {type(layer)}")
    check_float(f"{name}.weight", layer.weight.dtype)
    if not layer.weight.isfinite().all():
        raise ValueError(f"{name}.weight must be finite, got inf or NaN")


def check_range(input_range: Tensor | None, features: int, user: str) -> Tensor:
    """The range in float32. `user` is the option that needs it."""
    if input_range is None:
        raise ValueError(f"{user} needs input_range: see bigkern.nn.input_ranges")
    if input_range.shape != (features,):
        shape = list(input_range.shape)
        raise ValueError(f"input_range must have shape [{features}], got {shape}")
    input_range = input_range.detach().float()
    if not ((input_range >= 0) & (input_range < math.inf)).all():
        raise ValueError(f"input_range must be finite and not negative, got {input_range}")
    return input_range


def static_scale(input_range: Tensor) -> Tensor:
    """The scale by which inputs in this range, and no larger ones, fit int8."""
    return input_range.max() / 127 if len(input_range) else input_range.new_zeros(())


def output_dtype(x: Tensor) -> torch.dtype:
    """That of a torch.nn layer's output: x's, or autocast's where it is on."""
    return autocast_dtype(x.device.type) or x.dtype
