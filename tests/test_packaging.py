"""What is installed: from another folder, without optional packages, and one wheel under two
versions of torch."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bigkern.kernels import tuning
from filelock import FileLock

from bigkern import info, libraries, triton_ops

ROOT = Path(__file__).parents[1]


def run(*command, env=None, cwd=None, check=True):
    result = subprocess.run(
        list(map(str, command)),
        env=os.environ | (env or {}),
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    assert not check or result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result


def test_imports_from_another_folder(tmp_path):
    code = "import bigkern.kernels, sys; print(bigkern.__version__, 'triton' in sys.modules)"
    assert run(sys.executable, "-c", code, cwd=tmp_path).stdout.split() == ["0.1.0", "False"]


def test_top_level_kernels_is_not_ours(tmp_path):
    result = run(sys.executable, "-c", "import kernels", cwd=tmp_path, check=False)
    assert "No module named 'kernels'" in result.stderr
    result = run(sys.executable, "-c", "import kernels", cwd=ROOT, check=False)
    assert "this folder is bigkern.kernels" in result.stderr


def test_imports_without_triton_numpy_and_extras(tmp_path):
    extras = ("sklearn", "torchvision", "tensorboard", "tqdm", "transformers", "accelerate")
    for package in ("triton", *extras):
        (tmp_path / f"{package}.py").write_text("raise ImportError('not here')")
    code = "import bigkern, torch; from bigkern.ops import grad_norm; grad_norm([torch.ones(2)])"
    run(sys.executable, "-c", code, env={"PYTHONPATH": str(tmp_path)})


def test_info_names_versions_libraries_and_ops():
    report = info.report()
    assert f"torch:                     {torch.__version__}" in report
    assert re.search(r"_C \(schemas, CPU\):\s+loaded", report)
    assert re.search(r"_C_cuda \(CUDA\):\s+(loaded|not loaded: .+)", report)
    assert re.search(r"CPU instruction set:\s+\w+ \(best available: \w+\)", report)
    assert "| adam_ | yes |" in report


@pytest.mark.skipif(
    libraries.problems["_C_cuda"] is not None or not triton_ops.is_installed(),
    reason="the table shows a build with CUDA, and Triton",
)
def test_the_table_in_the_readme_is_what_runs():
    assert info.op_table() in (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    ("torch_cuda", "env", "message"),
    [
        ("None", {"BIGKERN_CUDA": "1"}, "BIGKERN_CUDA=1, but torch 9.9 is a CPU build; install a "),
        ("'99.0'", {"BIGKERN_CUDA": "1"}, "99"),
        ("None", {"BIGKERN_CUDA": "yes"}, "BIGKERN_CUDA must be 0 or 1, got 'yes'"),
    ],
)
def test_impossible_cuda_builds_say_what_is_missing(tmp_path, torch_cuda, env, message):
    (tmp_path / "torch.py").write_text(
        f"__version__ = '9.9'\nclass version:\n    cuda = {torch_cuda}\n"
    )
    env = env | {"PYTHONPATH": str(tmp_path)}
    result = run(sys.executable, "setup.py", "--version", env=env, cwd=ROOT, check=False)
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_no_header_outside_of_the_stable_abi():
    for path in filter(Path.is_file, (ROOT / "csrc").rglob("*")):
        for header in re.findall(r"#include <((?:ATen|c10|torch)/.*?)>", path.read_text()):
            assert header.startswith(
                ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/")
            ), f"{path} includes {header}"


def test_info_tells_which_gpus_are_too_old_and_whose_tile_sizes_they_have(monkeypatch):
    gpus = [
        SimpleNamespace(name=name, major=major, minor=minor, total_memory=16 << 30)
        for name, major, minor in (("Tesla T4", 7, 5), ("NVIDIA A100", 8, 0), ("NVIDIA L4", 8, 9))
    ]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_properties", gpus.__getitem__)
    lines = [line for line in info.report().splitlines() if line.startswith("GPU:")]
    assert lines[0].endswith(
        "Tesla T4, sm_75, 16384 MiB; older than sm_80, which the CUDA kernels need: use torch's, "
        "or BIGKERN_BACKEND=triton"
    )
    assert lines[1].endswith("NVIDIA A100, sm_80, 16384 MiB")
    assert lines[2].endswith("16384 MiB; Triton's kernels have the tile sizes of sm_120")
    assert "tile sizes, Triton" not in info.report()
    monkeypatch.setenv("BIGKERN_TUNING", "a/table.json")
    assert re.search(r"\ntile sizes, Triton: +a/table.json\n", info.report())


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    options = ("--no-build-isolation", "--no-deps", "-w", folder)
    with FileLock(ROOT / "build/wheel.lock"):  # processes share the objects
        run(sys.executable, "-m", "pip", "wheel", *options, ROOT)
    (path,) = folder.glob("*.whl")
    return path


def test_source_archive_holds_all_of_the_package(tmp_path):
    """What the build reads, and the files of data."""
    command = "egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir", tmp_path
    run(sys.executable, "setup.py", "-q", *command, env={"BIGKERN_CUDA": "0"}, cwd=ROOT)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= {f"kernels/tuning/{a}.json" for a in tuning.ARCHITECTURES}
    assert names >= {
        "csrc/ops.cpp",
        "csrc/cuda/ptx.cuh",
        "kernels/adam.py",
        "bigkern/train/digits.npz",
    }


@pytest.mark.slow
def test_wheel_is_abi3_and_holds_only_bigkern(wheel):
    assert re.fullmatch(r"bigkern-0\.1\.0-cp310-abi3-\w+\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"bigkern", "bigkern-0.1.0.dist-info"}
    assert "bigkern/_C.abi3.so" in names
    assert "bigkern/kernels/__init__.py" in names
    for architecture in tuning.ARCHITECTURES:
        assert f"bigkern/kernels/tuning/{architecture}.json" in names
    assert "bigkern/train/digits.npz" in names


@pytest.mark.slow
@pytest.mark.parametrize("version", ["2.13.0+cpu", "2.14.1"])
def test_one_wheel_runs_under_several_versions_of_torch(wheel, version, tmp_path):
    """pip must reach PyPI and, for the CPU build, https://download.pytorch.org/whl/cpu."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    run(python, "-m", "pip", "install", f"torch=={version}", "numpy", "pytest", "hypothesis")
    run(python, "-m", "pip", "install", "--no-deps", wheel)
    shutil.copytree(ROOT / "tests", tmp_path / "tests")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    adam = ("adam", "grad_norm", "optim", "optim_state", "amp", "backends")
    attention = ("kv_cache", "multihead_attention")
    tests = [f"tests/test_{name}.py" for name in (*adam, *attention, "int8_mm")]
    # The emulator takes the sources, and time, for kernels that are the same with every torch.
    options = ("-q", "-m", "not slow", "-k", "not emulated and not triton")
    result = run(python, "-m", "pytest", *options, *tests, cwd=tmp_path)
    assert re.search(r"\d+ passed", result.stdout)
    code = "import torch, bigkern; print(torch.__version__, bigkern.libraries.problems['_C_cuda'])"
    output = run(python, "-c", code, cwd=tmp_path).stdout
    assert output.startswith(version.removesuffix("+cpu"))
    if "cpu" in version:
        assert "this torch is a CPU build" in output
