"""A Triton driver without a GPU: `kernel[grid](...)` on CPU tensors compiles for a real card, and
the PTX runs in the emulator.

Each PTX is translated, compiled and linked to the emulator's runtime once, by its content. What a
card refuses is refused: too much shared memory is Triton's OutOfResources. Memory that a kernel may
touch are the tensors of its launch, and those whose address was asked for in the op that launches.
"""

import contextlib
import hashlib
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import triton
from cuda_compiler import NoCompilerError
from emulator import build
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from bigkern import backends, triton_ops

MODELS = {80: "a100", 90: "h100"}
PROPERTIES = {
    80: {"max_shared_mem": 163 << 10, "multiprocessor_count": 108},
    90: {"max_shared_mem": 227 << 10, "multiprocessor_count": 132},
}
FORMATS = {"i1": "?", "i8": "b", "i16": "h", "i32": "i", "i64": "q"}
FORMATS |= {"u1": "?", "u8": "B", "u16": "H", "u32": "I", "u64": "Q"}
FORMATS |= {"fp16": "e", "fp32": "f", "f32": "f", "fp64": "d"}
# The host's numbers of element types differ from those in Triton's metadata.
TENSOR_MAP_TYPES = {8: 10, 9: 8, 10: 9}


MOST_WITH_STACKS = 32  # programs; a process can't have as many memory mappings as hundreds take


class Memory(NamedTuple):
    begin: int
    size: int
    name: str


class Driver(DriverBase):
    """Of one architecture: 80 or 90."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture
        self.set_schedule("asc")
        self.find_races(False)
        self._launches: list[dict] = []
        self.known: dict[int, Memory] = {}
        self._runs_op = False
        self.utils = self
        self.launcher_cls = lambda source, metadata: Launcher(self, source, metadata)
        self._files: dict[str, dict[str, Path]] = {}

    # ---- What Triton asks ----

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(self.architecture, 10)

    def get_current_device(self) -> int:
        return self.architecture  # kernels are kept by device, and so by architecture

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int) -> dict[str, int]:
        return PROPERTIES[device] | {"max_num_regs": 64 << 10, "warpSize": 32}

    def get_benchmarker(self) -> Callable:
        raise RuntimeError("the emulator's time says nothing of a card's")

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind

    def load_binary(self, name: str, cubin: bytes, smem: int, device: int) -> tuple:
        ptx = self._files[name]["ptx"].read_text()
        try:
            controls = _program(name, ptx)
        except NoCompilerError as obstacle:
            pytest.skip(str(obstacle))
        if smem > 48 << 10:  # what a kernel gets without asking
            controls.set_device(MODELS[self.architecture])
            controls.allow_dynamic_smem(name, smem)
        return controls, controls, 0, 0, 1024  # module, function, registers, spills, most threads

    def unload_module(self, module: ModuleType) -> None:
        pass

    # ---- The emulator's controls ----

    def set_schedule(self, order: str, seed: int = 0) -> None:
        self._schedule = order, seed

    def find_races(self, yes: bool) -> None:
        """Where several threads hold the same element, Triton lets each of them write it."""
        self._finds_races = yes

    def take_launches(self) -> list[dict]:
        """What was launched since the last call, with statistics."""
        taken, self._launches = self._launches, []
        return taken

    # ---- What it does for a time ----

    @contextlib.contextmanager
    def active(self) -> Iterator["Driver"]:
        """Triton's launches go to the emulator."""

        def remember_files(module, function, name, files, hash):
            self._files[name] = {Path(file).suffix[1:]: Path(path) for file, path in files.items()}

        drivers = triton.runtime.driver
        previous = drivers._active
        with _ask_for_addresses(self), knobs.cache.scope():
            knobs.cache.dir = str(build.CACHE / "triton")
            knobs.runtime.kernel_load_start_hook.add(remember_files)
            drivers.set_active(self)
            try:
                yield self
            finally:
                drivers.set_active(previous)
                knobs.runtime.kernel_load_start_hook.remove(remember_files)

    @contextlib.contextmanager
    def op(self) -> Iterator[None]:
        """What is asked for inside is known to all launches inside."""
        self.known.clear()
        self._runs_op = True
        try:
            yield
        finally:
            self._runs_op = False
            self.known.clear()

    def know(self, tensor: Tensor, address: int) -> None:
        size = _extent(tensor)
        if address not in self.known or self.known[address].size < size:
            self.known[address] = Memory(address, size, f"a tensor of shape {[*tensor.shape]}")

    def launch(
        self, controls: ModuleType, name: str, grid: tuple[int, ...], threads: int, smem: int,
        arguments: list[bytes],
    ) -> None:  # fmt: skip
        controls.set_schedule(*self._schedule)
        controls.find_races(self._finds_races, allow_equal_writes=True)
        controls.set_device(MODELS[self.architecture])
        known = [*self.known.values()]
        for memory in known:
            controls.add_buffer(*memory)
        try:
            controls.launch(name, grid, (threads, 1, 1), arguments, smem)
        finally:
            for memory in known:
                controls.remove_buffer(memory.begin)
            self._launches += controls.take_launches()
            _keep_stacks(controls)
            if not self._runs_op:
                self.known.clear()


_drivers: dict[int, Driver] = {}


@contextlib.contextmanager
def backend(architecture: int) -> Iterator[Driver]:
    """Makes ops called inside on CPU tensors run by Triton's kernels, in the emulator."""
    driver = _drivers.setdefault(architecture, Driver(architecture))
    driver.set_schedule("random", seed=0)
    driver.find_races(False)
    driver.take_launches()
    with backend_of(driver):
        yield driver


@contextlib.contextmanager
def backend_of(driver: Driver) -> Iterator[None]:
    library = triton_ops.implement("CPU", lambda args: driver.op())
    try:
        backends.refresh("triton")
        with driver.active(), backends.use("triton"):
            yield
    finally:
        library._destroy()
        backends.refresh("triton")


class Launcher:
    """Of a compiled kernel: encodes the arguments of a launch."""

    def __init__(self, driver: Driver, source: Any, metadata: Any) -> None:
        self.driver, self.metadata = driver, metadata
        self.kinds = [*source.signature.values()]
        self.tensor_maps = list(getattr(metadata, "tensordesc_meta", None) or [])
        self.blocks = getattr(metadata, "num_ctas", 1)  # of a program: the kernel says that too

    def __call__(self, x, y, z, stream, controls, packed, launch_metadata, enter, leave, *args):
        if x * y * z == 0:
            return
        encoded = self._encode_all(self.kinds, args, iter(self.tensor_maps))
        grid = (x * self.blocks, y, z)
        size = math.prod(grid) * self.metadata.global_scratch_size
        scratch = torch.empty(size, dtype=torch.int8)
        encoded += [self._encode("*i8", scratch), bytes(8)]  # the profiler has none
        threads = 32 * self.metadata.num_warps
        self.driver.launch(
            controls, self.metadata.name, grid, threads, self.metadata.shared, encoded
        )

    def _encode_all(self, kinds: Sequence, args: Sequence, maps: Iterator) -> list[bytes]:
        encoded = []
        for kind, arg in zip(kinds, args, strict=True):
            if isinstance(kind, tuple):
                encoded += self._encode_all(kind, arg, maps)
            elif kind.startswith("tensordesc"):
                encoded += self._encode_descriptor(arg, next(maps, None))
            elif kind != "constexpr":
                encoded.append(self._encode(kind, arg))
        return encoded

    def _encode(self, kind: str, arg: Any) -> bytes:
        if kind.startswith("*"):
            return struct.pack("<Q", self._address(arg))
        if kind == "bf16":
            return struct.pack("<f", arg)[2:]
        return struct.pack(f"<{FORMATS[kind]}", arg)

    def _address(self, tensor: Any) -> int:
        address = tensor if isinstance(tensor, int) else tensor.data_ptr()
        if isinstance(tensor, Tensor):
            self.driver.know(tensor, address)
        return address

    def _encode_descriptor(self, arg: Any, meta: dict | None) -> list[bytes]:
        """Of bulk copies: the tensor map, then sizes and strides."""
        if meta is None:
            raise NotImplementedError("descriptors are emulated for sm_90, which has bulk copies")
        address = self._address(arg.base)
        width = arg.base.element_size()
        kind = TENSOR_MAP_TYPES.get(meta["elem_type"], meta["elem_type"])
        tensor_map = next(iter(_loaded.values())).tensor_map(
            kind,
            address,
            [*reversed(arg.shape)],
            [stride * width for stride in reversed(arg.strides[:-1])],
            [*reversed(meta["block_size"])],
            meta["swizzle"],
        )
        sizes = [struct.pack("<i", size) for size in arg.shape]
        return [tensor_map, *sizes, *(struct.pack("<q", stride) for stride in arg.strides)]


_loaded: dict[str, ModuleType] = {}  # by digest of the PTX
_with_stacks: dict[ModuleType, None] = {}  # the last launched comes last


def _keep_stacks(controls: ModuleType) -> None:
    """Those of the programs that were launched last."""
    _with_stacks.pop(controls, None)
    _with_stacks[controls] = None
    while len(_with_stacks) > MOST_WITH_STACKS:
        oldest = next(iter(_with_stacks))
        del _with_stacks[oldest]
        oldest.release_stacks()


def _program(name: str, ptx: str) -> ModuleType:
    """The emulator's controls of a PTX."""
    digest = hashlib.sha256(ptx.encode()).hexdigest()[:16]
    if digest not in _loaded:
        path = build.keep_source(f"triton_{name}_{digest}.ptx", ptx)
        _loaded[digest] = build.load(path.stem, build.Sources(ptx=[path]))
    return _loaded[digest]


def _extent(tensor: Tensor) -> int:
    """The bytes from the first to the last element."""
    if tensor.numel() == 0:
        return 0
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


@contextlib.contextmanager
def _ask_for_addresses(driver: Driver) -> Iterator[None]:
    """Tensors whose address is asked for are known memory."""
    own = torch.Tensor.data_ptr

    def data_ptr(self: Tensor) -> int:
        address = own(self)
        driver.know(self, address)
        return address

    torch.Tensor.data_ptr = data_ptr
    try:
        yield
    finally:
        del torch.Tensor.data_ptr
