"""Which implementation of an op runs.

A backend is a namespace of ``torch.ops`` with the schemas of ``csrc/ops.cpp``: ``native`` is the
compiled C++ (CPU) and CUDA code, ``triton`` the Triton kernels.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from types import ModuleType

import torch

from bigkern import libraries, triton_ops

NAMESPACES = {"native": "bigkern", "triton": triton_ops.NAMESPACE}  # in order of preference

# op -> backend -> device types. A dict, since asking the dispatcher in the call path would break
# torch.compile's graphs.
_available: dict[str, dict[str, tuple[str, ...]]] = {}
_fakes: dict[str, Callable] = {}


def _check_name(name: str | None, where: str) -> str | None:
    if name is not None and name not in NAMESPACES:
        raise ValueError(f"{where} must be one of {list(NAMESPACES)}, got {name!r}")
    return name


_forced = _check_name(os.environ.get("BIGKERN_BACKEND") or None, "BIGKERN_BACKEND")


def register(op: str, fake: Callable) -> None:
    """Makes `op` known: who implements it for which device, and how its outputs look (`fake`)."""
    _available[op], _fakes[op] = {}, fake
    for backend in NAMESPACES:
        _add(op, backend)


@contextlib.contextmanager
def registered(backend: str, namespace: str) -> Iterator[None]:
    """Makes those of `torch.ops.<namespace>`, with the same schemas, the last choice for each op.

    For backends that aren't the package's own.
    """
    NAMESPACES[backend] = namespace
    try:
        for op in _available:
            _add(op, backend)
        yield
    finally:
        del NAMESPACES[backend]
        for by_backend in _available.values():
            by_backend.pop(backend, None)


def _add(op: str, backend: str) -> None:
    namespace = NAMESPACES[backend]
    if not hasattr(getattr(torch.ops, namespace), op):
        return
    torch.library.register_fake(f"{namespace}::{op}", _fakes[op], allow_override=True)
    _look_up(op, backend)


def _look_up(op: str, backend: str) -> None:
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    _available[op][backend] = tuple(
        device
        for device, key in (("cpu", "CPU"), ("cuda", "CUDA"))
        if has_kernel(f"{NAMESPACES[backend]}::{op}", key)
    )


def refresh(backend: str) -> None:
    """Looks up anew which devices the ops of `backend` have kernels for."""
    for op, by_backend in _available.items():
        if backend in by_backend:
            _look_up(op, backend)


def available(op: str, device_type: str) -> list[str]:
    """The backends that have `op` for a type of device, best first."""
    return [backend for backend, devices in _available[op].items() if device_type in devices]


def has(op: str, device_type: str) -> bool:
    """Whether `select` finds a backend."""
    return any(_forced in (None, backend) for backend in available(op, device_type))


def table() -> dict[str, dict[str, tuple[str, ...]]]:
    """op -> backend -> device types that it runs on."""
    return {op: dict(backends) for op, backends in _available.items()}


def select(op: str, device_type: str) -> ModuleType:
    """The namespace whose `op` runs: the forced backend's, else the best available.

    Raises NotImplementedError, naming what is available, where the forced backend, or any, lacks
    the op.
    """
    for backend, devices in _available[op].items():
        if device_type in devices and (_forced is None or _forced == backend):
            return getattr(torch.ops, NAMESPACES[backend])
    candidates = available(op, device_type)
    wanted = f"{_forced} backend" if _forced else "backend"
    hint = "; see `bigkern info`" if device_type == "cuda" and libraries.problems["_C_cuda"] else ""
    raise NotImplementedError(
        f"{op} has no {wanted} on {device_type}; available: {candidates}{hint}"
    )


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Forces a backend for the ops called inside, as ``BIGKERN_BACKEND`` does for the process.

    >>> with bigkern.backends.use("native"):
    ...     optimizer.step()
    """
    global _forced
    previous, _forced = _forced, _check_name(name, "name")
    try:
        yield
    finally:
        _forced = previous
