"""What the benchmarks share: result files, the tables made of them, and what is said where nothing
can be measured."""

import json
import os
import subprocess
import sys

import common
import gpu_results
import pytest
import torch
from cuda_compiler import ROOT
from generated import replace_generated

from bigkern import backends

pytest.importorskip("pytest_benchmark", reason="the benchmarks run by it")


def run(name, *options):
    command = [sys.executable, ROOT / f"benchmarks/bench_{name}.py", *options]
    # pytest-benchmark measures nothing in a process that seems to be one of pytest-xdist.
    env = {key: value for key, value in os.environ.items() if key != "PYTEST_XDIST_WORKER"}
    return subprocess.run(command, capture_output=True, text=True, env=env)


def test_readme_is_up_to_date():
    assert gpu_results.README.read_text() == gpu_results.readme(), "run `make readme`"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_said():
    result = run("adam", "--device", "cuda")
    assert result.returncode == 2
    assert "--device cuda needs a GPU, and torch sees none; see `bigkern info`" in result.stderr


def test_nothing_to_measure_is_said():
    result = run("attention", "-k", "test_backward")
    assert result.returncode == 0, result.stderr
    assert "on a CPU it is measured with its forward" in result.stdout
    assert "nothing was measured: every benchmark was skipped" in result.stdout


def test_a_benchmark_on_the_cpu():
    result = run("adam", "-k", "SimpleCNN and not scaler")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "| SimpleCNN | torch fused |" in result.stdout


# ---- Measuring on a GPU ----


def test_a_gpus_cases_are_its_own():
    """Not those of a CPU; and all benchmarks can be collected for it."""
    code = """
import common, pytest
options = ["--collect-only", "-q", "--import-mode=prepend", "-o", "python_files=bench_*.py"]
pytest.main([*options, "."], plugins=[common._Plugin("cuda")])
"""
    command, folder = [sys.executable, "-c", code], ROOT / "benchmarks"
    text = subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout
    assert "test_forward[" in text, text
    forward = [line for line in text.splitlines() if "test_forward[" in line]
    assert all("16384" in line or "(8, " in line or "(32, " in line for line in forward)
    assert any("(8192, 8192, 8192)" in line for line in text.splitlines())
    assert "float32" not in "".join(forward)


class Benchmark:
    """As much of pytest-benchmark's as is used."""

    def __init__(self):
        self.extra_info = {}

    def pedantic(self, function, rounds):
        for _ in range(rounds):
            function()


def fail():
    raise RuntimeError("No available kernel.\nAborting execution.")


@pytest.fixture
def measured(monkeypatch):
    """Calls take a millisecond."""
    monkeypatch.setattr(common, "sample", lambda call, calls, device: call() or 1e-3)


def test_what_torch_cannot_do_on_a_gpu_is_left_out(measured):
    benchmark = Benchmark()
    contenders = {"bigkern": lambda: None, "torch cuDNN": fail, "torch flash": lambda: None}
    common.alternate(benchmark, contenders, "cuda")
    assert benchmark.extra_info == {
        "quartiles_ms": {"bigkern": [1.0] * 3, "torch flash": [1.0] * 3},
        "missing": {"torch cuDNN": "No available kernel."},
    }


def test_triton_is_a_contender_on_a_gpu():
    forced = []
    contenders = {"bigkern": lambda: forced.append(backends._forced), "torch": lambda: None}
    assert common.with_triton(contenders, "cpu") == contenders
    both = common.with_triton(contenders, "cuda")
    assert [*both] == ["bigkern", "torch", "bigkern, Triton"]
    for call in both.values():
        call()
    assert forced == [None, "triton"]


@pytest.mark.parametrize(("name", "where"), [("bigkern", "cuda"), ("torch", "cpu")])
def test_other_failures_are_shown(measured, name, where):
    with pytest.raises(RuntimeError, match="No available kernel"):
        common.alternate(Benchmark(), {name: fail}, where)


# ---- Results of a GPU ----

WHERE = {
    "card": "NVIDIA H100 80GB HBM3",
    **gpu_results.parse_smi("580.1, 700.00, 1980, 1980, [N/A]"),
    "torch": "2.11.0",
    "cuda": "13.0",
    "bigkern": "0.1.0",
    "commit": "0123456789ab+",
    "date": "2026-01-31",
}
ROOFS = {"copy": 3e12, "bfloat16 product": 8e14}
BENCHMARKS = [
    {
        "name": "test_forward_backward[(1, 2)-full]",
        "params": {"shape": [1, 2], "kind": "full"},
        "extra_info": {
            "quartiles_ms": {"bigkern": [1.9, 2.0, 2.1], "torch flash": [2.9, 3.0, 3.1]},
            "missing": {"torch cuDNN": "no"},
            "flops": 8e11,
            "roof": "bfloat16 product",
        },
    },
    {
        "name": "test_decoding",
        "params": None,
        "extra_info": {
            "quartiles_ms": {"bigkern": [0.9, 1.0, 1.1]},
            "bytes": 15e8,
            "roof": "copy",
        },
    },
    {"name": "test_memory", "params": None, "extra_info": {"beyond": 1}},
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where results go instead."""
    monkeypatch.setattr(gpu_results, "RESULTS", tmp_path)
    readme = gpu_results.README.read_text()
    monkeypatch.setattr(gpu_results, "README", tmp_path / "README.md")
    gpu_results.README.write_text(readme)
    return tmp_path


def test_rows_hold_case_work_and_card():
    rows = gpu_results.rows("attention", BENCHMARKS, ROOFS, WHERE)
    assert [row["case"] for row in rows] == ["forward backward, (1, 2), full", "decoding"]
    assert rows[0] == {
        "benchmark": "attention",
        "case": "forward backward, (1, 2), full",
        "quartiles_ms": BENCHMARKS[0]["extra_info"]["quartiles_ms"],
        "missing": {"torch cuDNN": "no"},
        "flops": 8e11,
        "bytes": None,
        "roof": "bfloat16 product",
        "roofs": ROOFS,
        **WHERE,
    }
    assert (rows[0]["driver"], rows[0]["power_limit_w"]) == ("580.1", 700.0)
    assert rows[0]["memory_clock_mhz"] is None


def test_what_nvidia_smi_does_not_tell_is_null():
    assert set(gpu_results.parse_smi(None).values()) == {None}
    assert gpu_results.output_of("a-program-that-is-not-there") is None
    assert gpu_results.output_of("false") is None


def test_a_table_is_made_of_the_rows(folder):
    rows = gpu_results.rows("attention", BENCHMARKS, ROOFS, WHERE)
    path = gpu_results.save(rows)
    assert path == folder / "nvidia_h100_80gb_hbm3.json"
    assert json.loads(path.read_text()) == rows
    text = (folder / "README.md").read_text()
    assert "## NVIDIA H100 80GB HBM3\n\n### attention\n\ndriver 580.1, limit 700 W, " in text
    assert "SMs at 1980 MHz, of 1980 at most, torch 2.11.0" in text  # and not of the memory
    assert "copy 3000 GB/s, bfloat16 product 800 TFLOP/s." in text
    assert (
        "| forward backward, (1, 2), full | 2.000 (1.900..2.100) | 400 TFLOP/s | 50% | "
        "3.000 (1.50) |" in text
    )
    assert "| decoding | 1.000 (0.900..1.100) | 1500 GB/s | 50% | - |" in text
    assert "No GPU has been measured yet" not in text
    assert gpu_results.readme(folder) == text


def test_a_run_replaces_the_same_benchmarks_rows(folder):
    def saved():
        (file,) = folder.glob("*.json")
        return [(row["benchmark"], row["case"]) for row in json.loads(file.read_text())]

    gpu_results.save(gpu_results.rows("attention", BENCHMARKS, ROOFS, WHERE))
    gpu_results.save(gpu_results.rows("adam", BENCHMARKS[1:], ROOFS, WHERE))
    gpu_results.save(gpu_results.rows("attention", BENCHMARKS[:1], ROOFS, WHERE))
    attention = ("attention", "forward backward, (1, 2), full")
    assert saved() == [("adam", "decoding"), attention]


def test_generated_parts_are_between_their_markers():
    text = "a\n<!-- x: generated by `make readme` -->\nold\n<!-- end of x -->\nb\n"
    new = replace_generated(text, "x", r"new \1")
    assert new == text.replace("old", "\nnew \\1\n")
    assert replace_generated(new, "x", r"new \1") == new
    with pytest.raises(ValueError, match=r"x: generated by .* must be there once, got 0"):
        replace_generated("a", "x", "new")
