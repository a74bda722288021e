"""What autocast asks of an op, as torch.compile and torch.export trace it."""

import torch


@torch.compiler.assume_constant_result  # torch before 2.14 doesn't trace it
def _is_available(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """None where autocast is off, and for devices that have none."""
    if _is_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None
