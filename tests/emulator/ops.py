"""The backend `emulated`: the package's ops, whose CUDA code takes CPU tensors."""

import contextlib
from collections.abc import Iterator
from types import ModuleType

import torch
from cuda_compiler import ROOT

from bigkern import backends
from emulator import build

NAMESPACE = "bigkern_emulated"


def load() -> ModuleType:
    """The library's controls."""
    csrc = ROOT / "csrc"
    headers = sorted([*csrc.rglob("*.h"), *csrc.rglob("*.cuh")])
    prelude = [build.RUNTIME / "ops_namespace.h"]
    kernels = sorted(csrc.glob("cuda/*.cu"))
    return build.load("ops", build.Sources(kernels, [csrc / "ops.cpp"], headers, prelude))


@contextlib.contextmanager
def backend() -> Iterator[None]:
    """Makes ops called inside run emulated, those that have CUDA kernels."""
    ops = getattr(torch.ops, NAMESPACE)
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    backends.NAMESPACES["emulated"] = NAMESPACE
    for op, available in backends._available.items():
        if hasattr(ops, op) and has_kernel(f"{NAMESPACE}::{op}", "CPU"):
            available["emulated"] = ("cpu",)
    try:
        with backends.use("emulated"):
            yield
    finally:
        del backends.NAMESPACES["emulated"]
        for available in backends._available.values():
            available.pop("emulated", None)
