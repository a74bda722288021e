"""nvcc, with the flags that setup.py builds with."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# setup.py itself is asked, in a process where nobody has fixed torch's idea of CUDA_HOME yet.
ASK_SETUP = """
import json, setuptools
from distutils.core import run_setup
extensions = {e.name: e for e in run_setup("setup.py", stop_after="init").ext_modules}
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, CUDA_HOME
cuda = extensions["bigkern._C_cuda"]  # missing, if setup.py has said why not
flags = [*COMMON_NVCC_FLAGS, *cuda.extra_compile_args["nvcc"]]
print(json.dumps([f"{CUDA_HOME}/bin/nvcc", *flags, *(f"-I{d}" for d in cuda.include_dirs)]))
"""


class NoCompilerError(Exception):
    """Why CUDA can't be compiled here."""


@functools.cache
def nvcc_command() -> tuple[str, ...]:
    """The compiler with its flags, to which an architecture and the files are added."""
    run = subprocess.run(
        [sys.executable, "-c", ASK_SETUP],
        cwd=ROOT,
        env=os.environ | {"BIGKERN_CUDA": ""},
        capture_output=True,
        text=True,
    )
    obstacle = re.search(r"building without CUDA kernels: (.*)", run.stdout)
    if obstacle:
        raise NoCompilerError(obstacle[1])
    assert run.returncode == 0, run.stderr
    return tuple(json.loads(run.stdout.splitlines()[-1]))
