"""What Triton's compilers make of the kernels, for cards that needn't be there.

python tests/triton_static.py ARCHITECTURE [OP]   # a table of all rows
"""

import json
import multiprocessing
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cubins
import triton_cases
from bigkern.kernels import tuning
from bigkern.kernels.tuning import Row
from bigkern.kernels.tuning.calls import call_of
from triton.backends.compiler import GPUTarget
from triton_driver import Driver, backend_of

# Bytes of shared memory that a block can have.
LIMITS = {
    "sm_80": 163 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
    "gfx942": 64 << 10,
}


class Kernel(NamedTuple):
    name: str
    files: dict[str, Path]  # what the compiler left, by the ends of their names

    @property
    def assembly(self) -> str:
        return self.files["ptx" if "ptx" in self.files else "amdgcn"].read_text()

    @property
    def smem(self) -> int:
        return json.loads(self.files["json"].read_text())["shared"]

    @property
    def registers(self) -> int:
        return self._resources("REG", "vgpr_count")

    @property
    def spilled_bytes(self) -> int:
        """Of a thread's registers that are in memory."""
        return self._resources("STACK", "private_segment_fixed_size")

    def _resources(self, nvidias: str, amds: str) -> int:
        if "cubin" not in self.files:
            return int(re.search(rf"\.{amds}:\s+(\d+)", self.assembly)[1])
        command = [cubins.find_in_toolkit("bin/cuobjdump"), "-res-usage", self.files["cubin"]]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return int(re.search(rf"{nvidias}:(\d+)", usage)[1])


class Compiler(Driver):
    """Launches nothing, and knows the kernels that would have been."""

    def __init__(self, architecture: str) -> None:
        super().__init__(int(re.sub(r"\D", "", architecture)))
        self.name = architecture
        self.kernels: list[Kernel] = []

    def get_current_target(self) -> GPUTarget:
        if self.name.startswith("sm_"):
            return super().get_current_target()
        return GPUTarget("hip", self.name, 64)

    def get_current_device(self) -> "Compiler":
        return self  # none has what another compiled

    def get_device_properties(self, device: "Compiler") -> dict[str, int]:
        return {"max_shared_mem": LIMITS[self.name], "multiprocessor_count": 132}

    def load_binary(self, name: str, binary: bytes, smem: int, device: int) -> tuple:
        self.kernels.append(Kernel(name, self._files[name]))
        return self, None, 0, 0, 1024

    def launch(self, *args: Any) -> None:
        pass


def compiled(architecture: str, call: Callable[[], object]) -> list[Kernel]:
    """The kernels that `call` launches."""
    compiler = Compiler(architecture)
    with backend_of(compiler):
        call()
    return compiler.kernels


def compiled_row(architecture: str, row: Row) -> list[Kernel]:
    return compiled(architecture, call_of(row, "cpu", is_large=False))


def faults(architecture: str, row: Row) -> list[str]:
    """What is wrong with the kernels whose tiles a row has."""
    try:
        kernels = compiled_row(architecture, row)
    except Exception as error:  # OutOfResources, CompilationError
        return [f"{row}: {type(error).__name__}: {error}"]
    by_name, found = {kernel.name: kernel for kernel in kernels}, []
    for name, patterns in triton_cases.EXPECTED[row["op"]](row, architecture).items():
        kernel = by_name[name]
        found += [f"{name} spills {kernel.spilled_bytes} bytes"] if kernel.spilled_bytes else []
        found += [f"{name} without {p}" for p in patterns if not re.search(p, kernel.assembly)]
    return [f"{row}: {fault}" for fault in found]


def all_faults(architecture: str, rows: Sequence[Row]) -> list[str]:
    """By as many processes as there are cores."""
    with multiprocessing.get_context("spawn").Pool() as pool:
        jobs = [(architecture, row) for row in rows]
        return [fault for found in pool.starmap(faults, jobs, chunksize=1) for fault in found]


def main(architecture: str, op: str = "") -> None:
    print("| op | dtype | shape | kernel | registers | spilled | shared | products |")
    print("|---" * 8 + "|")
    for row in tuning.rows(architecture):
        if op not in ("", row["op"]):
            continue
        for kernel in compiled_row(architecture, row):
            products = re.findall(r"mma\.sync|wgmma\.mma|tcgen05\.mma|v_mfma", kernel.assembly)
            numbers = (kernel.registers, kernel.spilled_bytes, kernel.smem, len(products))
            cells = (row["op"], row["dtype"], row["shape"], kernel.name, *numbers)
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
