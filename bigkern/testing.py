"""How accuracy is judged: by how wrong plain PyTorch is in the same dtype, not by a tolerance
picked by hand."""

import torch
from torch import Tensor


def max_error(actual: Tensor, expected: Tensor) -> float:
    """The largest absolute difference, in float64; 0 where both are NaN or the same infinity."""
    a, b = actual.detach().cpu().double(), expected.detach().cpu().double()
    same = (a == b) | (a.isnan() & b.isnan())
    return torch.where(same, 0.0, (a - b).abs()).max().item() if a.numel() else 0.0


def assert_as_accurate(
    actual: Tensor, expected: Tensor, baseline: Tensor, factor: float = 2.0
) -> None:
    """Asserts error(actual) <= factor * error(baseline), which counts as one rounding step of the
    largest value at least.

    Args:
        actual: a kernel's result.
        expected: the reference's result in float64, of the same shape.
        baseline: plain PyTorch's result in the dtype of `actual`.
    """
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    assert actual.dtype == baseline.dtype, f"dtype {actual.dtype}, expected {baseline.dtype}"
    finite = expected[expected.isfinite()]
    largest = finite.abs().max().item() if finite.numel() else 0.0
    rounding = torch.finfo(actual.dtype).eps * largest
    bound = factor * max(max_error(baseline, expected), rounding)
    error = max_error(actual, expected)
    assert error <= bound, f"error {error:.3e} is more than {bound:.3e} ({factor} x torch's)"
