"""The ops: public functions, whose docstrings are the contract of every backend."""

from bigkern.ops.adam import AdamGroup, adam_, grad_norm
from bigkern.ops.attention import scaled_dot_product_attention, varlen_attention
from bigkern.ops.int8_conv2d import int8_conv2d, pack_conv2d_weight
from bigkern.ops.int8_mm import (
    int8_linear,
    int8_mm,
    pack_weight,
    quantize_rows,
    weight_only_linear,
)

__all__ = [
    "AdamGroup",
    "adam_",
    "grad_norm",
    "int8_conv2d",
    "int8_linear",
    "int8_mm",
    "pack_conv2d_weight",
    "pack_weight",
    "quantize_rows",
    "scaled_dot_product_attention",
    "varlen_attention",
    "weight_only_linear",
]
