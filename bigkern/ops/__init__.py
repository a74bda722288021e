"""The ops: public functions, whose docstrings are the contract of every backend."""

from bigkern.ops.adam import AdamGroup, adam_, grad_norm

__all__ = ["AdamGroup", "adam_", "grad_norm"]
