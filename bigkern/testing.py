"""How accuracy is judged: by how wrong plain PyTorch is in the same dtype, not by a tolerance
picked by hand; and how memory is measured."""

import ctypes
from collections.abc import Callable, Iterable
from pathlib import Path

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


def memory_beyond_results(call: Callable[[], Iterable[Tensor]]) -> int:
    """Bytes that `call` takes on the CPU at its peak, beyond what was there and what it returns.

    Linux with glibc only: reads and resets the peak in ``/proc``.
    """
    ctypes.CDLL(None).malloc_trim(0)  # what was freed would be taken again unnoticed
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
    before = _process_status("VmRSS")
    results = list(call())
    return _process_status("VmHWM") - before - sum(x.nbytes for x in results)


def _process_status(field: str) -> int:
    """Bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))
