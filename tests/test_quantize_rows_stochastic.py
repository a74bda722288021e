"""quantize_rows_stochastic against the reference, and that it is right on average."""

import pytest
import torch

import bigkern
from bigkern.ops import reference_int8_training
from bigkern.ops.int8_training import quantize_rows_stochastic

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
DEVICES = ["cpu", "emulated", "triton", "cuda"]
SHAPES = [(1, 1), (7, 127), (3, 1000), (64, 65), (4, 0), (129, 16), (1, 4097)]


def make_philox(device="cpu"):
    return torch.randint(-(2**63), 2**63 - 1, (2,)).to(device)


@pytest.mark.parametrize("has_factor", [True, False])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rounds_as_the_reference(shape, dtype, has_factor, device):
    x = torch.randn(shape).to(device, dtype)
    x[-1:] = 0
    factor = 3 * torch.rand(shape[1], device=device) if has_factor else None
    for strided in (x, x.T.contiguous().T, x[:, None].expand(-1, 2, -1)[:, 1]):
        philox = make_philox(device)
        actual = quantize_rows_stochastic(strided, philox, factor)
        expected = reference_int8_training.quantize_rows_stochastic(x, philox, factor)
        for a, b in zip(actual, expected, strict=True):
            assert torch.equal(a, b)
    assert [t.shape for t in quantize_rows_stochastic(x[:0], philox)] == [(0, shape[1]), (0,)]


def test_quotients_beyond_127_saturate(device):
    """Where max / (max / 127) is rounded up, and u is so small that their sum is below -127."""
    x, philox = (
        torch.full((8, 128), -1.00002003, device=device),
        torch.tensor([661, 0], device=device),
    )
    assert x[3, 21] / (x.abs().amax() / 127) < -127
    assert reference_int8_training.uniform(philox, x.shape)[3, 21] < 2**-18
    values, _ = quantize_rows_stochastic(x, philox)
    assert torch.equal(values, reference_int8_training.quantize_rows_stochastic(x, philox)[0])


def test_rounds_to_neighbours_and_right_on_average():
    x = torch.randn(7, 127)
    n, total = 1000, 0
    for seed in range(n):
        values, scale = quantize_rows_stochastic(x, torch.tensor([seed, -seed]))
        steps = x.double() / scale[:, None].double()
        assert (values - steps).abs().max() <= 1
        total = total + values.double()
    assert torch.equal(scale, bigkern.quantize_rows(x)[1])
    # The variance of one rounding is at most 1/4; 889 means stray by 5 sigma once in 2,000 tests.
    assert (total / n - steps).abs().max() < 5 * 0.5 / n**0.5
    whole = torch.arange(-127.0, 128)[None]
    values, scale = quantize_rows_stochastic(whole, make_philox())
    assert scale == 1
    assert (values == whole).float().mean() > 0.99  # u may round up to 1


def test_rounding_depends_on_seed_offset_row_and_column(device):
    x = torch.rand(2, 256, device=device).expand(2, 256).contiguous()
    x[1] = x[0]
    draws = [
        quantize_rows_stochastic(x, torch.tensor(philox, device=device))[0]
        for philox in ([1, 2], [1, 2], [2, 2], [1, 3], [1 + 2**32, 2])
    ]
    assert torch.equal(draws[0], draws[1])
    rows = [row for draw in (draws[0], *draws[2:]) for row in draw]
    for i, row in enumerate(rows):
        assert all(not torch.equal(row, other) for other in rows[:i])
    u = reference_int8_training.uniform(torch.tensor([1, 2]), (64, 1000)).flatten()
    assert len(u.unique()) > 0.99 * len(u)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.sanitize
def test_rows_that_are_not_finite(value, device):
    x = torch.ones(3, 100, device=device)
    x[1, 70] = value
    values, scale = quantize_rows_stochastic(x, make_philox(device))
    assert scale.isnan().tolist() == [False, True, False]
    assert not values[1].any()
    assert (values[0] == 127).all()


@pytest.mark.parametrize(
    ("x", "philox", "factor", "message"),
    [
        (torch.ones(2, 3).double(), None, None, r"x must be .*, got torch.float64"),
        (torch.ones(3), None, None, r"x must have 2 dimensions, got shape \[3\]"),
        (torch.ones(2, 3), torch.ones(2), None, r"philox must be torch.int64 of shape \[2\], got"),
        (torch.ones(2, 3), None, torch.ones(2), r"factor must be .* shape \[3\], got .* \[2\]"),
        (torch.ones(2, 3), None, torch.ones(3).half(), r"factor must be torch.float32 .*float16"),
    ],
)
def test_bad_input_of_rounding(x, philox, factor, message):
    with pytest.raises(ValueError, match=message):
        quantize_rows_stochastic(x, make_philox() if philox is None else philox, factor)


def test_opcheck_of_rounding():
    op = torch.ops.bigkern.quantize_rows_stochastic.default
    torch.library.opcheck(op, (torch.randn(3, 70), make_philox(), torch.rand(70)))
    torch.library.opcheck(op, (torch.randn(3, 70).half(), make_philox()))
