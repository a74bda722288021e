"""What autocast asks of an op, as torch.compile and torch.export trace it."""

import torch


def _is_available(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


# torch before 2.14 doesn't trace it. This is torch.compiler.assume_constant_result, which would
# import the compiler, and with it Triton: a second that a program without either doesn't need.
_is_available._dynamo_marked_constant = True


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """None where autocast is off, and for devices that have none."""
    if _is_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None
