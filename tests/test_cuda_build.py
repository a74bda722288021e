"""What the CUDA compiler makes of csrc/cuda, asked without a GPU."""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from cuda_compiler import ROOT, NoCompilerError, nvcc_command

SOURCES = sorted(path.name for path in (ROOT / "csrc/cuda").glob("*.cu"))
ARCHITECTURES = ("80", "90a")


class Compiled(NamedTuple):
    kernels: dict[str, str]  # mangled name -> what ptxas says of it
    cubin: Path


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[tuple[str, str], Compiled]:
    try:
        nvcc = nvcc_command()
    except NoCompilerError as obstacle:
        pytest.skip(str(obstacle))
    folder = tmp_path_factory.mktemp("cubins")

    def compile_one(source: str, arch: str) -> Compiled:
        cubin = folder / f"{source}.{arch}.cubin"
        target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
        command = [*nvcc, target, "-Xptxas=-v", "-cubin", ROOT / "csrc/cuda" / source, "-o", cubin]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        kernels = re.findall(r"Compiling entry function '(\w+)'(.*?Used \d+ reg)", run.stderr, re.S)
        return Compiled(dict(kernels), cubin)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = {
            (source, arch): pool.submit(compile_one, source, arch)
            for source in SOURCES
            for arch in ARCHITECTURES
        }
    return {key: job.result() for key, job in jobs.items()}


def _sass(cubin: Path) -> dict[str, str]:
    """Mangled name of each kernel -> its machine code."""
    tool = shutil.which("cuobjdump")
    if tool is None:
        triton = pytest.importorskip("triton", reason="needs cuobjdump, which triton contains")
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    functions = re.split(r"\n\s*Function : (\w+)", text)[1:]
    return dict(zip(functions[::2], functions[1::2], strict=True))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_no_kernel_spills_registers(compiled, source, arch):
    for name, report in compiled[source, arch].kernels.items():
        wanted = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
        assert wanted in report, f"{name}: {report}"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_adam_has_a_kernel_for_each_variant(compiled, arch):
    names = compiled["adam.cu", arch].kernels
    # 6 pairs of dtypes, 4 of them with or without master weights; each with or without amsgrad
    assert sum("adam_kernel" in name for name in names) == (2 + 4 * 2) * 2
    assert sum("sum_of_squares_kernel" in name for name in names) == 4


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_int8_products_keep_tensor_cores_busy(compiled, arch):
    """The loop over K: products, what loads their operands, and few instructions else."""
    kernels = _sass(compiled["int8_gemm.cu", arch].cubin)
    products = {name: code for name, code in kernels.items() if "int8_gemm_kernel" in name}
    assert len(products) == 8  # 3 tiles for either order of B in memory, 2 for convolutions
    for name, code in products.items():
        assert re.search(r"LDGSTS\.E\.BYPASS\S*\.128\b", code), name
        loop = _loop_with(code, "IMMA.16832.S8.S8")
        share = sum("IMMA" in line for line in loop) / len(loop)
        assert share > (0.15 if "Li64ELi64" in name else 0.4), f"{name}: {share}"
    for name, code in kernels.items():
        if "int8_gemv_kernel" in name:
            assert "LDG.E.EF.128" in code, name
            assert "IDP.4A.S8.S8" in code, name


def _loop_with(code: str, instruction: str) -> list[str]:
    """The shortest loop that has the instruction."""
    lines = {int(m[1], 16): m[2] for m in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", code)}
    jumps = [(at, re.search(r"BRA (0x[0-9a-f]+)", line)) for at, line in lines.items()]
    loops = [
        [line for place, line in lines.items() if int(target[1], 16) <= place <= at]
        for at, target in jumps
        if target and int(target[1], 16) < at
    ]
    return min((loop for loop in loops if any(instruction in line for line in loop)), key=len)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_adam_streams_16_bytes_an_access(compiled, arch):
    for name, code in _sass(compiled["adam.cu", arch].cubin).items():
        if "adam_kernel" in name:
            assert "LDG.E.128" in code, name
            assert "STG.E.128" in code, name
        elif "sum_of_squares_kernel" in name:
            assert code.count("LDG.E.128") >= 4, name  # so many at once in flight
        local_or_generic = re.search(r"\b(LDL|STL|LD\.E|ST\.E)\b", code)
        assert local_or_generic is None, f"{name}: {local_or_generic[0]}"
