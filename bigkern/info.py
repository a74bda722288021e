"""``bigkern info``: what is installed, what runs where, and what to do about what doesn't."""

import importlib.metadata
import platform
from typing import Any

import torch

from bigkern import __version__, backends, libraries
from bigkern.kernels import tuning


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _library(name: str) -> str:
    problem = libraries.problems[name]
    return "loaded" if problem is None else f"not loaded: {problem}"


def _gpus() -> list[str]:
    if torch.version.cuda is None or not torch.cuda.is_available():
        return ["none"]
    gpus = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [
        f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory >> 20} MiB{_note(gpu)}"
        for gpu in gpus
    ]


def _note(gpu: Any) -> str:
    if gpu.major < 8:
        instead = "use torch's, or BIGKERN_BACKEND=triton"
        return f"; older than sm_80, which the CUDA kernels need: {instead}"
    architecture = f"sm_{gpu.major}{gpu.minor}"
    table = tuning.table_for(architecture)
    return "" if table == architecture else f"; Triton's kernels have the tile sizes of {table}"


def _facts() -> list[tuple[str, str]]:
    has_cuda = libraries.problems["_C_cuda"] is None
    isa, best = torch.ops.bigkern.cpu_isa(), torch.ops.bigkern.best_cpu_isa()
    return [
        ("bigkern", __version__),
        ("Python", platform.python_version()),
        ("torch", f"{torch.__version__} (CUDA: {torch.version.cuda or 'none'})"),
        ("triton", _version("triton")),
        ("CUDA toolkit of the build", torch.ops.bigkern.cuda_toolkit() if has_cuda else "none"),
        ("_C (schemas, CPU)", _library("_C")),
        ("_C_cuda (CUDA)", _library("_C_cuda")),
        *((("tile sizes, Triton", users),) if (users := tuning.users_table()) else ()),
        ("CPU instruction set", f"{isa} (best available: {best})"),
        ("threads", str(torch.get_num_threads())),
        *(("GPU", gpu) for gpu in _gpus()),
    ]


def op_table() -> str:
    """Op x backend x device as a table in Markdown."""
    columns = [(backend, device) for backend in backends.NAMESPACES for device in ("cpu", "cuda")]
    lines = [
        "| op | " + " | ".join(f"{backend}, {device}" for backend, device in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for op, by_backend in backends.table().items():
        cells = ["yes" if device in by_backend.get(b, ()) else "-" for b, device in columns]
        lines.append(f"| {op} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report() -> str:
    """The whole report, of several lines."""
    facts = [f"{name + ':':27}{value}" for name, value in _facts()]
    return "\n".join([*facts, "", op_table()])
