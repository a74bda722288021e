"""How tests launch kernels of their own in the emulator."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from cuda_compiler import NoCompilerError
from emulator import build
from torch import Tensor


class Kernels:
    """Those of some `.cu` files, by name. Tensors that a launch gets are known memory in it."""

    def __init__(self, name: str, *sources: Path, **others: Sequence[Path | str]) -> None:
        try:
            self.controls = build.load(name, build.Sources(sources, **others))
        except NoCompilerError as obstacle:
            pytest.skip(str(obstacle))

    def __call__(
        self,
        name: str,
        *arguments: Tensor | int | float | bytes,
        grid: tuple[int, ...] = (1, 1, 1),
        block: tuple[int, ...] = (32, 1, 1),
        smem: int = 0,
        cluster: tuple[int, ...] = (0, 0, 0),
    ) -> None:
        with contextlib.ExitStack() as stack:
            encoded = [self._encode(i, a, stack) for i, a in enumerate(arguments)]
            self.controls.launch(name, grid, block, encoded, smem, cluster)

    def _encode(
        self, i: int, argument: Tensor | int | float | bytes, stack: contextlib.ExitStack
    ) -> bytes:
        if isinstance(argument, bytes):
            return argument
        if isinstance(argument, Tensor):
            address = argument.data_ptr()
            self.controls.add_buffer(address, argument.nbytes, f"argument {i}")
            stack.callback(self.controls.remove_buffer, address)
            return address.to_bytes(8, "little")
        dtype = torch.float32 if isinstance(argument, float) else torch.int32
        return torch.tensor(argument, dtype=dtype).numpy().tobytes()


SCHEDULES = [("asc", 0), ("desc", 0), *(("random", seed) for seed in range(4))]
TYPES = {torch.int8: 0, torch.float16: 6, torch.float32: 7, torch.float64: 8}  # CUtensorMapDataType
SWIZZLES = [0, 32, 64, 128]


def tensor_map(run: Kernels, x: Tensor, box: Sequence[int], swizzle: int = 0) -> bytes:
    """The bytes of a kernel's parameter: boxes of a tensor, outermost dimension first."""
    return run.controls.tensor_map(
        TYPES[x.dtype],
        x.data_ptr(),
        x.shape[::-1],
        [s * x.element_size() for s in x.stride()[-2::-1]],
        box[::-1],
        SWIZZLES.index(swizzle),
    )
