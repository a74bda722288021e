"""What the CUDA compiler made of the kernels, read from the built library by NVIDIA's cuobjdump."""

import importlib.util
import os
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from loops import find_loops

# From Hopper on the system keeps the first of a block's shared memory, and cubins count it.
RESERVED_SMEM = 1024
MAX_THREADS = 1024  # of a block, without __launch_bounds__


class NoToolError(Exception):
    """Why machine code can't be read here."""


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str  # @P0, @!P0 or nothing
    opcode: str  # with its modifiers
    operands: str

    @property
    def is_matrix_product(self) -> bool:
        return re.match(r"[HI]G?MMA\.", self.opcode) is not None

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.search(r"0x([0-9a-f]+)$", self.operands)
        return int(found[1], 16) if found and self.opcode.startswith("BRA") else None

    @property
    def falls_through(self) -> bool:
        is_always = not self.predicate and "," not in self.operands
        return not (is_always and self.opcode.split(".")[0] in ("BRA", "BRX", "EXIT", "RET"))


@dataclass
class Kernel:
    name: str  # as short_name() gives it
    arch: str
    registers: int
    stack_bytes: int
    static_smem: int
    max_threads: int  # of a block: __launch_bounds__
    instructions: list[Instruction]

    @property
    def base_name(self) -> str:
        return self.name.partition("<")[0]

    def count(self, *opcodes: str) -> int:
        return sum(i.opcode.split(".")[0] in opcodes for i in self.instructions)

    @property
    def spills(self) -> int:
        """Accesses to local memory."""
        return self.count("LDL", "STL")

    @cached_property
    def main_loop(self) -> list[Instruction]:
        """Of the innermost loop with the most matrix products: what each pass runs, and products
        and copies to shared memory wherever they are in it. All the code where no loop has any."""
        products = {i for i, x in enumerate(self.instructions) if x.is_matrix_product}
        loops = [loop for loop in find_loops(self.instructions) if loop.body & products]
        innermost = [x for x in loops if not any(other.body < x.body for other in loops)]
        if not innermost:
            return self.instructions
        best = max(innermost, key=lambda loop: len(loop.body & products))
        copies = {i for i in best.body if self.instructions[i].opcode.startswith("LDGSTS")}
        chosen = best.always | best.body & products | copies
        return [self.instructions[i] for i in sorted(chosen)]


def short_name(demangled: str) -> str:
    """A kernel's name with its template arguments, without namespaces and parameters."""
    name = demangled.replace("(anonymous namespace)::", "").removeprefix("void ")
    depth = 0
    for i, c in enumerate(name):
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            name = name[:i]
            break
    return re.sub(r"\b(?:\w+::)+", "", name)


def read_kernels(library: Path) -> list[Kernel]:
    """All kernels of a library, each for every architecture that it has machine code for.

    Raises:
        NoToolError: there is no cuobjdump.
    """
    tool = find_in_toolkit("bin/cuobjdump")
    with tempfile.TemporaryDirectory() as folder:
        run(tool, "-xelf", "all", library.resolve(), cwd=folder)
        cubins = sorted(Path(folder).glob("*.cubin"))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = pool.map(lambda cubin: _kernels(tool, cubin), cubins)
            return [kernel for kernels in found for kernel in kernels]


def find_in_toolkit(path: str) -> Path:
    """A file of the CUDA toolkit, or of the parts of it that triton contains."""
    folders = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if triton := importlib.util.find_spec("triton"):
        folders.append(Path(triton.origin).parent / "backends/nvidia")
    for folder in folders:
        if folder and (found := Path(folder) / path).exists():
            return found
    raise NoToolError(f"{path} isn't there: it comes with the CUDA toolkit and with triton")


def run(*command: str | Path, **options: object) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, **options).stdout


def _kernels(tool: Path, cubin: Path) -> list[Kernel]:
    arch = cubin.name.split(".")[-2]
    usage = dict(re.findall(r"Function (\w+):\n(.*)", run(tool, "-res-usage", cubin)))
    threads = {}
    for section in run(tool, "-elf", cubin).split("\n.nv.info.")[1:]:
        if found := re.search(r"EIATTR_MAX_THREADS\n.*\n.*Value:\s+(\w+)", section):
            threads[section.partition("\n")[0]] = int(found[1], 16)
    code = re.split(r"\n\s*Function : (\w+)", run(tool, "-sass", cubin))[1:]
    names = run("c++filt", *code[::2]).splitlines()
    kernels = []
    for name, mangled, text in zip(names, code[::2], code[1::2], strict=True):
        resources = {key: int(n) for key, n in re.findall(r"(\w+):(\d+)", usage[mangled])}
        reserved = RESERVED_SMEM if int(re.sub(r"\D", "", arch)) >= 90 else 0
        kernels.append(
            Kernel(
                short_name(name),
                arch,
                resources["REG"],
                resources["STACK"],
                max(0, resources["SHARED"] - reserved),
                threads.get(mangled, MAX_THREADS),
                _instructions(text),
            )
        )
    return kernels


def _instructions(text: str) -> list[Instruction]:
    pattern = r"/\*([0-9a-f]{4,})\*/ +(@!?\w+)? *([A-Z]\w*(?:\.\w+)*)([^;]*);"
    return [Instruction(int(a, 16), p, o, x.strip()) for a, p, o, x in re.findall(pattern, text)]
