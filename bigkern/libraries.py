"""Loads the compiled libraries: `_C` (op schemas and CPU kernels) and `_C_cuda` (CUDA kernels)."""

from pathlib import Path

import torch

_FOLDER = Path(__file__).parent

REBUILD = (
    "pip install --no-build-isolation --force-reinstall --no-deps <folder or archive of bigkern>"
)


def path(name: str) -> Path:
    """Where `_C` or `_C_cuda` is, if it is."""
    return _FOLDER / f"{name}.abi3.so"


def _load_native() -> None:
    if not path("_C").exists():
        raise ImportError(f"bigkern isn't compiled: {path('_C')} is missing; run `{REBUILD}`")
    torch.ops.load_library(path("_C"))


def _load_cuda() -> str | None:
    """Loads the CUDA kernels, GPU or not; returns why it didn't, with what to do, or None."""
    if torch.version.cuda is None:
        return "this torch is a CPU build; install a CUDA build of torch to use a GPU"
    if not path("_C_cuda").exists():
        return (
            f"not built: install a CUDA toolkit for torch's CUDA {torch.version.cuda}, "
            f"then `BIGKERN_CUDA=1 {REBUILD}`"
        )
    try:
        torch.ops.load_library(path("_C_cuda"))
    except OSError as error:
        return f"{error}; rebuild for this torch: `BIGKERN_CUDA=1 {REBUILD}`"
    return None


_load_native()

#: Why each library isn't loaded, or None where it is.
problems: dict[str, str | None] = {"_C": None, "_C_cuda": _load_cuda()}
