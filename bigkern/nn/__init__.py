"""Layers, drop-in for :mod:`torch.nn`'s."""

from bigkern.nn.attention import MultiheadAttention
from bigkern.nn.int8_calibration import input_ranges, smooth_
from bigkern.nn.int8_conv2d import Int8Conv2d
from bigkern.nn.int8_linear import Int8Linear
from bigkern.nn.int8_training import Int8TrainingLinear

__all__ = [
    "Int8Conv2d",
    "Int8Linear",
    "Int8TrainingLinear",
    "MultiheadAttention",
    "input_ranges",
    "smooth_",
]
