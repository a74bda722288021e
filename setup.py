"""Builds `_C` (op schemas, CPU kernels), and where toolkit and torch allow it `_C_cuda` (CUDA)."""

import os
import re
import subprocess
from glob import glob
from pathlib import Path

import torch
from setuptools import find_packages, setup

STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # runs with torch 2.10 and every later one
# Binaries for Ampere and Hopper; PTX, for later cards, of the older one: that of 9.0a runs on
# Hopper alone.
ARCHITECTURES = "8.0+PTX;9.0a"


def find_toolkit() -> Path | None:
    """The CUDA toolkit's folder; torch might take that of a wrapper of nvcc."""
    candidates = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    for folder in (Path(c) for c in candidates if c):
        if (folder / "bin/nvcc").exists() and (folder / "include/cuda_runtime.h").exists():
            return folder
    return None


def cuda_obstacle(toolkit: Path | None) -> str | None:
    """Why CUDA kernels can't be built, and what to do; None if they can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU build; install a CUDA build of torch"
    want = torch.version.cuda.split(".")[0]
    if toolkit is None:
        return f"no CUDA toolkit was found; install CUDA {want} and set CUDA_HOME to its folder"
    text = subprocess.run([toolkit / "bin/nvcc", "--version"], capture_output=True, text=True)
    got = re.search(r"release (\d+)", text.stdout).group(1)
    if got != want:
        return (
            f"{toolkit} is CUDA {got}, but torch was built with {want}; set CUDA_HOME to a {want}"
        )
    return None


def wants_cuda(obstacle: str | None) -> bool:
    choice = os.environ.get("BIGKERN_CUDA", "")
    if choice not in ("", "0", "1"):
        raise SystemExit(f"BIGKERN_CUDA must be 0 or 1, got {choice!r}")
    if choice == "1" and obstacle:
        raise SystemExit(f"BIGKERN_CUDA=1, but {obstacle}; or set BIGKERN_CUDA=0")
    if choice != "0" and obstacle:
        print(f"bigkern: building without CUDA kernels: {obstacle}")
    return choice != "0" and obstacle is None


toolkit = find_toolkit()
with_cuda = wants_cuda(cuda_obstacle(toolkit))
if with_cuda:
    os.environ["CUDA_HOME"] = str(toolkit)
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # noqa: E402


class Build(BuildExtension):
    """Keeps the objects, those of an editable build too: the next one compiles what has changed."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.build_temp = "build/objects"


headers = glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.cuh", recursive=True)
flags = ["-O3", "-std=c++17", STABLE_ABI]
quiet = "-Wno-maybe-uninitialized"  # GCC 12 warns of its own AVX-512 headers
hidden = "-fvisibility=hidden"
extensions = [
    CppExtension(
        "bigkern._C",
        [*glob("csrc/*.cpp"), *glob("csrc/cpu/*.cpp")],
        depends=headers,
        extra_compile_args={"cxx": [*flags, hidden, quiet]},
        py_limited_api=True,
    )
]
if with_cuda:
    extensions.append(
        CUDAExtension(
            "bigkern._C_cuda",
            glob("csrc/cuda/*.cu"),
            depends=headers,
            extra_compile_args={
                "cxx": [],
                "nvcc": [*flags, "-DUSE_CUDA", "-lineinfo", f"-Xcompiler={hidden}"],
            },
            py_limited_api=True,
        )
    )

setup(
    packages=[
        *find_packages(include=["bigkern", "bigkern.*"]),
        "bigkern.kernels",
        "bigkern.kernels.tuning",
    ],
    package_dir={"bigkern": "bigkern", "bigkern.kernels": "kernels"},
    package_data={"bigkern.train": ["*.npz"], "bigkern.kernels.tuning": ["*.json"]},
    ext_modules=extensions,
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
