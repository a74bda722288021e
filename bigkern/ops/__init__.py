"""The ops: public functions, whose docstrings are the contract of every backend."""

from bigkern.ops.adam import AdamGroup, adam_, grad_norm
from bigkern.ops.attention import scaled_dot_product_attention, varlen_attention

__all__ = [
    "AdamGroup",
    "adam_",
    "grad_norm",
    "scaled_dot_product_attention",
    "varlen_attention",
]
