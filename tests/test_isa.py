"""Each instruction set runs the op tests, in a process of its own: the choice is made once per
process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ALL = ["scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16"]
BEST = torch.ops.bigkern.best_cpu_isa()
OPS = (
    "adam",
    "grad_norm",
    "attention",
    "int8_mm",
    "int8_conv2d",
    "int8_scaled_mm",
    "quantize_rows_stochastic",
)
OP_TESTS = [str(Path(__file__).with_name(f"test_{op}.py")) for op in OPS]


def run(isa, *command):
    return subprocess.run(
        [sys.executable, *command],
        env=os.environ | {"BIGKERN_CPU_ISA": isa},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("isa", [isa for isa in ALL if isa != torch.ops.bigkern.cpu_isa()])
def test_op_tests_under(isa):
    if ALL.index(isa) > ALL.index(BEST):
        pytest.skip(f"this CPU has no {isa}")
    others = "not cuda and not emulated and not triton"  # kernels that don't depend on it
    result = run(isa, "-m", "pytest", "-q", "-k", others, "-m", "not slow", *OP_TESTS)
    assert result.returncode == 0, result.stdout[-5000:]
    assert run(isa, "-c", PRINT_ISA).stdout.strip() == isa


PRINT_ISA = "import bigkern, torch; print(torch.ops.bigkern.cpu_isa())"


def test_without_the_variable_the_best_is_used():
    assert run("", "-c", PRINT_ISA).stdout.strip() == BEST


STEP = """
import torch
from bigkern.ops import adam_
p, g, m, v = torch.ones(4, 3)
step = torch.zeros(())
try:
    adam_([p], [g], [m], [v], [], [step], lr=0.1, beta1=0.9, beta2=0.9, weight_decay=0.0, eps=1.0)
finally:
    print(step.item())
"""


def test_unknown_set_is_refused_before_anything_is_changed():
    assert run("sse9", "-c", STEP).stdout.strip() == "0.0"
    result = run("sse9", "-c", PRINT_ISA)
    names = f"{', '.join(ALL[:-1])} or {ALL[-1]}"
    assert f"BIGKERN_CPU_ISA must be {names}, got sse9" in result.stderr
    assert "ValueError" in result.stderr


@pytest.mark.skipif(ALL[-1] == BEST, reason="this CPU has every set")
def test_set_that_the_cpu_lacks_is_refused():
    result = run(ALL[-1], "-c", PRINT_ISA)
    assert f"BIGKERN_CPU_ISA={ALL[-1]} is more than this CPU has: {BEST}" in result.stderr
