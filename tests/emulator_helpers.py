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
    ) -> None:
        with contextlib.ExitStack() as stack:
            encoded = [self._encode(i, a, stack) for i, a in enumerate(arguments)]
            self.controls.launch(name, grid, block, encoded, smem)

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
