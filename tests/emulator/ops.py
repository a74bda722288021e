"""The backend `emulated`: the package's ops, whose CUDA code takes CPU tensors."""

import contextlib
from collections.abc import Iterator
from types import ModuleType

from cuda_compiler import ROOT

from bigkern import backends
from emulator import build

NAMESPACE = "bigkern_emulated"


def load() -> ModuleType:
    """The library's controls."""
    csrc = ROOT / "csrc"
    prelude = [build.RUNTIME / "ops_namespace.h"]
    kernels = sorted(csrc.glob("cuda/*.cu"))
    return build.load("ops", build.Sources(kernels, [csrc / "ops.cpp"], prelude))


@contextlib.contextmanager
def backend() -> Iterator[None]:
    """Makes ops called inside run emulated."""
    with backends.registered("emulated", NAMESPACE), backends.use("emulated"):
        yield
