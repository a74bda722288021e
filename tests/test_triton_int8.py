"""The Triton kernels of the int8 products in the emulator: the tiles that only large problems take,
which are tested here at their edges, and the order of threads."""

import pytest
import torch
from bigkern.kernels import tuning

import bigkern
from bigkern.ops import reference_int8 as reference
from bigkern.ops import reference_int8_training
from bigkern.ops.int8_training import int8_scaled_mm

pytestmark = pytest.mark.usefixtures("one_thread")


def integers(*shape):
    return torch.randint(-128, 128, shape, dtype=torch.int8)


@pytest.mark.parametrize(
    ("architecture", "layout"), [(80, "columns"), (90, "columns"), (90, "rows")]
)
def test_large_tiles_are_exact(architecture, layout, triton_driver):
    """Also where rows, columns and K end within a tile."""
    with triton_driver.backend(architecture) as driver:
        config = tuning.lookup("int8_mm", torch.int8, M=8192, N=8192)
        M, N, K = config["BLOCK_M"] + 3, config["BLOCK_N"] + 16, 3 * config["BLOCK_K"] + 16
        a, b = integers(M, K), integers(K, N) if layout == "rows" else integers(N, K).T
        x, scale = torch.randn(M, K), torch.rand(N)
        with tuning.tried("int8_mm", config):
            driver.find_races(True)
            assert torch.equal(bigkern.int8_mm(a, b), reference.int8_mm(a, b))
            if layout == "columns":
                options = {"bias": torch.randn(N), "activation": "gelu"}
                y = bigkern.int8_linear(x, b.T, scale, **options)
                torch.testing.assert_close(y, reference.int8_linear(x, b.T, scale, **options))
        launches = [launch["kernel"] for launch in driver.take_launches()]
    assert "int8_mm_kernel" in launches
    assert "add_parts_kernel" not in launches


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_order_of_threads_changes_nothing(order, triton_driver):
    """Nor do races hide: parts of K, their sum, and what follows."""
    a, b, scale = integers(33, 1100), integers(1100, 48), torch.rand(33)
    expected = reference_int8_training.int8_scaled_mm(a, b, scale)
    with triton_driver.backend(80) as driver:
        driver.find_races(True)
        driver.set_schedule(order)
        assert torch.equal(int8_scaled_mm(a, b, scale), expected)
        launches = [launch["kernel"] for launch in driver.take_launches()]
    assert launches == ["int8_mm_kernel", "add_parts_kernel"]
