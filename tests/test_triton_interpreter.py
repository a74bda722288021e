"""The Triton kernels under TRITON_INTERPRET=1, in which they can be debugged."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="torch for CPUs comes without Triton")


@pytest.mark.parametrize("ops", ["adam", "attention", "int8"])
def test_ops_run_in_the_interpreter(ops):
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("interpreted.py"), ops],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
