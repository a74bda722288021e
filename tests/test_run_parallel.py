"""run_parallel.py, by which `make gpu-test` runs."""

import subprocess
import sys

from cuda_compiler import ROOT


def run(folder, *options):
    command = [sys.executable, ROOT / "tests/run_parallel.py", "--folder", folder, *options]
    return subprocess.run(command, capture_output=True, text=True)


def test_all_files_run_and_failures_are_shown(tmp_path):
    (tmp_path / "test_good.py").write_text("def test_one(): pass\ndef test_two(): pass\n")
    (tmp_path / "test_bad.py").write_text("def test_three(): assert 'this' == 'that'\n")
    result = run(tmp_path, "--jobs", "2")
    assert result.returncode == 1
    assert "2 passed" in result.stdout
    assert "assert 'this' == 'that'" in result.stdout
    assert result.stdout.splitlines()[-1] == "failed: test_bad.py"

    result = run(tmp_path, "-k", "two")
    assert result.returncode == 0, result.stdout
    assert "1 passed, 1 deselected" in result.stdout
    assert result.stdout.splitlines()[-1] == "2 files passed"
