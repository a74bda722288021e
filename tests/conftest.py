import pytest
import torch
from helpers import SMALL, interrupt_at

from bigkern.train.loop import train


def pytest_configure():
    torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)],
)
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return request.param


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
