"""Builds a library that runs CUDA sources on the CPU, and loads it.

    x.cu --nvcc--> x.ptx --translate--> x.cpp --g++--> x.device.o  \
         `-------> x.host.o                                         +--> x.so
                                        runtime/*.cpp --g++--> *.o /

What was built is kept in build/emulator, by the content of everything that went into it; processes
that want the same wait for the one that builds it.
"""

import hashlib
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from cuda_compiler import ROOT, nvcc_command
from filelock import FileLock

from emulator.translate import translate

CACHE = ROOT / "build/emulator"
SECONDS_KEPT = 24 * 3600  # of what the same name had before: other processes may use it
HERE = Path(__file__).parent
RUNTIME = HERE / "runtime"
RUNTIME_FILES = sorted(RUNTIME.iterdir())
TRANSLATOR = [*sorted(HERE.glob("*.py")), *sorted(RUNTIME.glob("*.h"))]
TORCH = Path(torch.__file__).parent
# x86-64-v3: AVX2, and instructions for std::fma and float16.
COMMON = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-march=x86-64-v3"]
# A wrong access of host code is an exception: runtime/faults.cpp.
HOST = [*COMMON, "-O1", "-fnon-call-exceptions"]
# Products and sums stay apart, as in PTX; an access may have any type.
DEVICE = [*COMMON, "-O1", "-w", "-ffp-contract=off", "-fno-strict-aliasing", f"-I{RUNTIME}"]
# Calls of torch that mean something else here: runtime/torch_hooks.cpp.
WRAPPED = [
    "aoti_torch_get_data_ptr",
    "torch_get_mutable_data_ptr",
    "torch_get_const_data_ptr",
    "aoti_torch_delete_tensor_object",
    "aoti_torch_get_current_cuda_stream",
    "aoti_torch_create_device_guard",
    "aoti_torch_delete_device_guard",
    "torch_c10_cuda_check_msg",
    "torch_c10_cuda_free_error_msg",
]


class Sources(NamedTuple):
    kernels: Sequence[Path] = ()  # .cu
    host: Sequence[Path] = ()  # .cpp
    prelude: Sequence[Path] = ()  # included before each source
    ptx: Sequence[Path] = ()  # of other compilers, without host code
    architectures: Sequence[str] = ("80",)  # as many translations: "90a" too for Hopper's own code


def load(name: str, sources: Sources) -> ModuleType:
    """The controls (runtime/controls.cpp) of the library of these sources.

    Raises:
        cuda_compiler.NoCompilerError: nothing is cached, and there is no nvcc.
    """
    files = [*sources.kernels, *sources.host, *sources.prelude, *sources.ptx]
    inputs = [*files, *TRANSLATOR, *RUNTIME_FILES]
    path = _cached(name, ".so", inputs, lambda out: _link(out, sources), sources.architectures)
    full_name = f"{name}.emulated"  # one of each name in a process
    loader = ExtensionFileLoader(full_name, str(path))
    module = module_from_spec(spec_from_file_location(full_name, path, loader=loader))
    loader.exec_module(module)
    return module


def keep_source(name: str, text: str) -> Path:
    """A generated file, of which no other process sees a part."""
    CACHE.mkdir(parents=True, exist_ok=True)
    path = CACHE / name
    with tempfile.NamedTemporaryFile("w", dir=CACHE, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)
    return path


def _with_headers(files: Iterable[Path]) -> list[Path]:
    """And what they include with quotes, one through the other."""
    found, waiting = [], [file.resolve() for file in files]
    while waiting:
        file = waiting.pop(0)
        if file in found or not file.is_file():  # one of the toolkit or of torch
            continue
        found.append(file)
        names = re.findall(r'^\s*#\s*include\s+"([^"]+)"', file.read_text(), re.MULTILINE)
        waiting += [(file.parent / name).resolve() for name in names]
    return found


def _cached(
    name: str,
    suffix: str,
    inputs: Sequence[Path],
    make: Callable[[Path], object],
    options: Sequence[str] = (),
) -> Path:
    digest = hashlib.sha256(f"{torch.__version__} {sys.version} {options}".encode())
    for file in (ROOT / "setup.py", Path(__file__), *_with_headers(inputs)):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode() + file.read_bytes())
    path = CACHE / f"{name}-{digest.hexdigest()[:16]}{suffix}"
    if path.exists():
        return path
    locks = CACHE / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / f"{name}{suffix}"):
        if path.exists():
            return path
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            made = Path(folder) / path.name
            make(made)
            os.replace(made, path)
        for file in CACHE.glob(f"{name}-{'?' * 16}{suffix}"):
            if file.stat().st_mtime < time.time() - SECONDS_KEPT:
                file.unlink(missing_ok=True)
    return path


def _run(*command: str | Path) -> str:
    run = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{run.stderr}")
    return run.stdout


def _link(out: Path, sources: Sources) -> None:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(_kernel_object, file, sources) for file in sources.kernels]
        jobs += [pool.submit(_ptx_object, file) for file in sources.ptx]
        jobs += [pool.submit(_host_object, file, sources) for file in sources.host]
        jobs += [pool.submit(_runtime_object, file) for file in sorted(RUNTIME.glob("*.cpp"))]
        objects = [job.result() for job in jobs]
    wraps = [f"-Wl,--wrap={name}" for name in WRAPPED]
    libraries = [f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    _run("g++", "-shared", "-Wl,-Bsymbolic", *wraps, *objects, *libraries, "-o", out)
    # torch has brought the real one into the process.
    missing = re.findall(r"\bU (\w*cuda[A-Z]\w*)", _run("nm", "-D", "--undefined-only", out))
    if missing:
        raise RuntimeError(f"not emulated: {', '.join(missing)}")


def _runtime_object(source: Path) -> Path:
    includes = [f"-I{TORCH / 'include'}", f"-I{sysconfig.get_path('include')}"]
    flags = [*includes, "-isystem", _toolkit() / "include"]
    return _cached(
        f"runtime-{source.stem}",
        ".o",
        [source],
        lambda out: _run("g++", *COMMON, "-O3", *flags, "-c", source, "-o", out),
    )


def _host_object(source: Path, sources: Sources) -> Path:
    flags = [*_definitions(), f"-I{TORCH / 'include'}", *_includes(sources)]
    return _cached(
        source.stem,
        ".o",
        [source, *sources.prelude],
        lambda out: _run("g++", *HOST, *flags, "-c", source, "-o", out),
    )


def _kernel_object(source: Path, sources: Sources) -> Path:
    inputs = [source, *sources.prelude, *TRANSLATOR]
    make = lambda out: _compile(source, sources, out)  # noqa: E731
    return _cached(source.stem, ".cu.o", inputs, make, sources.architectures)


def _ptx_object(source: Path) -> Path:
    register = f"emulator_register_{source.stem}"

    def make(out: Path) -> None:
        cpp = out.with_suffix(".cpp")
        known = f"static const int known_ = (register_module({register}(nullptr)), 0);\n"
        cpp.write_text(translate([source.read_text()], register) + known)
        _run("g++", *DEVICE, "-c", cpp, "-o", out)

    return _cached(source.stem, ".ptx.o", [source, *TRANSLATOR], make)


def _includes(sources: Sources) -> list[str | Path]:
    return [part for file in sources.prelude for part in ("-include", file)]


def _compile(source: Path, sources: Sources, out: Path) -> None:
    folder = out.parent
    host, cpp, device = (folder / f"{source.stem}{end}" for end in (".host.o", ".cpp", ".device.o"))
    # Under this name the host object asks for its own translation, whatever its kernels are called.
    register = f"emulator_register_{source.stem}"
    _run(
        *nvcc_command(),
        *(f"-gencode=arch=compute_{a},code=compute_{a}" for a in sources.architectures),
        *("--cudart", "none", "--keep", "--keep-dir", folder),
        f"-Xcompiler={','.join(HOST)},-D__cudaRegisterFatBinary={register}",
        *(*_includes(sources), "-c", source, "-o", host),
    )
    ptx = [file.read_text() for file in sorted(folder.glob(f"{source.stem}*.ptx"))]
    cpp.write_text(translate(ptx, register))
    _run("g++", *DEVICE, "-c", cpp, "-o", device)
    _run("ld", "-r", host, device, "-o", out)


def _definitions() -> list[str]:
    return [flag for flag in nvcc_command() if flag.startswith("-D")]


def _toolkit() -> Path:
    return Path(nvcc_command()[0]).parents[1]
