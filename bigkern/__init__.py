"""Hand-written kernels that make PyTorch training and inference cheaper, as drop-in parts."""

from importlib.metadata import version

import torch  # noqa: F401  (before the compiled libraries, which need torch's)

__version__ = version("bigkern")

from bigkern import amp, backends, libraries, models, nn, onnx, optim
from bigkern.nn.compare import compare
from bigkern.nn.swap import swap
from bigkern.ops import (
    int8_conv2d,
    int8_linear,
    int8_mm,
    pack_conv2d_weight,
    pack_weight,
    quantize_rows,
    scaled_dot_product_attention,
    varlen_attention,
    weight_only_linear,
)
from bigkern.ops.kv_cache import KVCache, attention_with_cache

__all__ = [
    "KVCache",
    "__version__",
    "amp",
    "attention_with_cache",
    "backends",
    "compare",
    "int8_conv2d",
    "int8_linear",
    "int8_mm",
    "libraries",
    "models",
    "nn",
    "onnx",
    "optim",
    "pack_conv2d_weight",
    "pack_weight",
    "quantize_rows",
    "scaled_dot_product_attention",
    "swap",
    "varlen_attention",
    "weight_only_linear",
]
