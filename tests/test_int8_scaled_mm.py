"""int8_scaled_mm against the reference."""

import pytest
import torch

from bigkern.ops import reference_int8_training as reference
from bigkern.ops.int8_training import int8_scaled_mm

DEVICES = ["cpu", "emulated", "triton", "triton sm_90", "cuda"]
SHAPES = [(1, 1, 1), (7, 127, 3), (33, 1000, 65), (129, 5, 70), (4, 0, 5)]


def make(*shape, device="cpu"):
    return torch.randint(-128, 128, shape, dtype=torch.int8).to(device)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_reference(shape, dtype, device):
    assert_is_the_reference(shape, dtype, device)


def test_empty(device):
    for shape in ((0, 4, 5), (4, 5, 0), (4, 0, 5)):
        assert_is_the_reference(shape, None, device)


def assert_is_the_reference(shape, dtype, device):
    M, K, N = shape
    a, b = make(M, K, device=device), make(K, N, device=device)
    scale = torch.randn(2 * M, device=device)[::2] / 1000
    expected = reference.int8_scaled_mm(a, b, scale, out_dtype=dtype)
    for left in (a, a.T.contiguous().T):
        for right in (b, b.T.contiguous().T, torch.cat([b, b], 1)[:, :N]):
            assert torch.equal(int8_scaled_mm(left, right, scale, out_dtype=dtype), expected)


@pytest.mark.sanitize
def test_a_scale_of_nan_shows(device):
    scale = torch.tensor([1.0, torch.nan, 0.0], device=device)
    y = int8_scaled_mm(make(3, 4, device=device), make(4, 5, device=device), scale)
    assert y[0].isfinite().all()
    assert y[1].isnan().all()
    assert not y[2].any()


def test_opcheck():
    op = torch.ops.bigkern.int8_scaled_mm.default
    torch.library.opcheck(op, (make(3, 4), make(4, 5), torch.rand(3)))
    torch.library.opcheck(op, (make(3, 4), make(4, 5), torch.rand(3)), {"out_dtype": torch.half})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.ones(3, 4)}, r"a must be torch\.int8, got torch\.float32"),
        ({"b": make(5, 5)}, r"a and b must have shapes .*, got \[3, 4\] and \[5, 5\]"),
        ({"row_scale": torch.ones(4)}, r"row_scale must be .* shape \[3\], got .* shape \[4\]"),
        ({"row_scale": torch.ones(3).half()}, r"row_scale must be torch\.float32 .*float16"),
        ({"out_dtype": torch.float64}, "out_dtype must be float32, bfloat16 or float16, got"),
    ],
)
def test_bad_input(change, message):
    arguments = {"a": make(3, 4), "b": make(4, 5), "row_scale": torch.ones(3)}
    with pytest.raises(ValueError, match=message):
        int8_scaled_mm(**arguments | change)
