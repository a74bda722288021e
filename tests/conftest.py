import sys
from pathlib import Path

import emulator.ops
import pytest
import torch
from cuda_compiler import NoCompilerError
from helpers import SMALL, interrupt_at

from bigkern import backends, libraries
from bigkern.train.loop import train

TRITON = {"triton": 80, "triton sm_90": 90}  # devices of tests, and what they compile for

TESTS = Path(__file__).parent
# Our folder `kernels` is not the package of that name, which transformers looks for.
sys.path[:] = [path for path in sys.path if Path(path).resolve() != TESTS.parent]
sys.path.append(str(TESTS / "stand_ins"))  # what is installed comes first


def pytest_report_header():
    import hypothesis

    if "stand_ins" in hypothesis.__file__:
        return "hypothesis isn't installed: cases are drawn by tests/stand_ins"
    return None


def pytest_configure():
    torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_generate_tests(metafunc):
    """Tests that take a device, and don't say which, run over DEVICES of their module."""
    marks = metafunc.definition.iter_markers("parametrize")
    if "device" in metafunc.fixturenames and all("device" not in mark.args[0] for mark in marks):
        devices = getattr(metafunc.module, "DEVICES", ["cpu", "cuda"])
        if metafunc.definition.get_closest_marker("one_architecture"):
            devices = [d for d in devices if d != "triton sm_90"]
        if metafunc.definition.get_closest_marker("slow"):  # the emulator would take days
            devices = [d for d in devices if d in ("cpu", "cuda")]
        if {"triton", "cuda"} <= set(devices):
            devices = [*devices, "cuda triton"]
        params = [pytest.param(d, marks=[pytest.mark.gpu] if "cuda" in d else []) for d in devices]
        metafunc.parametrize("device", params, indirect=True)


@pytest.fixture
def device(request):
    """Where the tensors are. With `emulated`, `triton` and `triton sm_90` it is the CPU, on which
    ops run the CUDA kernels, and those of Triton for A100 and H100; with `cuda triton` a GPU."""
    if "cuda" in request.param and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if request.param == "cuda triton":
        with backends.use("triton"):
            yield "cuda"
        return
    if request.param in ("cpu", "cuda"):
        yield request.param
        return
    if request.param in TRITON:
        with request.getfixturevalue("triton_driver").backend(TRITON[request.param]) as driver:
            yield "cpu"
        assert driver.take_launches()
        return
    controls = request.getfixturevalue("emulated_ops")
    controls.set_schedule("random", seed=0)
    controls.take_launches()
    with emulator.ops.backend():
        yield "cpu"
    assert controls.take_launches()


@pytest.fixture(scope="session")
def triton_driver():
    """The module."""
    pytest.importorskip("triton", reason="torch for CPUs comes without Triton")
    import triton_driver

    return triton_driver


@pytest.fixture(scope="session")
def emulated_ops():
    """The emulator's controls."""
    try:
        return emulator.ops.load()
    except NoCompilerError as obstacle:
        pytest.skip(str(obstacle))


@pytest.fixture(scope="session")
def cuda_kernels():
    """Those of the built library, as machine code."""
    import cubins  # of benchmarks/, which isn't there when an installed package is tested

    if libraries.problems["_C_cuda"]:
        pytest.skip(libraries.problems["_C_cuda"])
    try:
        return cubins.read_kernels(libraries.path("_C_cuda"))
    except cubins.NoToolError as obstacle:
        pytest.skip(str(obstacle))


@pytest.fixture(scope="module")
def one_thread():
    """Two threads wait for each other long on a busy machine, and these models gain little."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def stopped(tmp_path):
    """A run of SMALL stopped at step 4, with checkpoints after the steps 3 and 4."""
    with pytest.raises(KeyboardInterrupt):
        train(interrupt_at(4), SMALL, tmp_path)
    return tmp_path
