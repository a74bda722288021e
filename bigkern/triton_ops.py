"""The namespace ``bigkern_triton``: the ops of ``csrc/ops.cpp`` once more, run by Triton kernels.

Schemas are the native ops' own. An op here is opaque to torch.compile, as those are, and doesn't
break the graph: the autograd functions, fakes and rules for vmap of bigkern.ops serve both
namespaces, and what is launched may depend on the card and on sizes, as compiled code can't.
"""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from bigkern import libraries  # noqa: F401  (the schemas)

NAMESPACE = "bigkern_triton"

#: op -> the module of bigkern.kernels whose function of that name it is.
OPS = {
    "adam_": "adam",
    "grad_norm": "adam",
    "attention": "attention",
    "attention_backward": "attention_backward",
    "attention_weights": "attention_weights",
    "int8_mm": "int8_mm",
    "int8_scaled_mm": "int8_mm",
    "int8_linear": "int8_mm",
    "int8_conv2d": "int8_conv2d",
    "quantize_rows": "quantize_rows",
    "quantize_rows_stochastic": "quantize_rows",
    "weight_only_linear": "weight_only_linear",
}


def is_installed() -> bool:
    """Whether there is Triton: torch for CPUs comes without."""
    return importlib.util.find_spec("triton") is not None


def implement(key: str, around: Callable[[Sequence[Any]], AbstractContextManager]) -> Library:
    """Has the kernels take tensors of the dispatch key `key`, as long as the result lives.

    They run within the context that `around` makes of their arguments.
    """
    library = Library(NAMESPACE, "IMPL")
    for op, module in OPS.items():
        library.impl(op, _at_first_call(op, module, around), key)
    return library


def _at_first_call(op: str, module: str, around: Callable) -> Callable:
    """The function, imported when it is called: Triton takes a second, and most never need it."""

    def call(*args: Any, **options: Any) -> Any:
        function = getattr(importlib.import_module(f"bigkern.kernels.{module}"), op)
        with around([*args, *options.values()]):
            return function(*args, **options)

    return call


def _on_device(args: Sequence[Any]) -> torch.cuda.device:
    """Launches go to the current device: that of the first tensor."""
    firsts = (arg[0] if isinstance(arg, list) and arg else arg for arg in args)
    return torch.cuda.device(next(x.device for x in firsts if isinstance(x, Tensor)))


def _define() -> list[Library]:
    definitions = Library(NAMESPACE, "DEF")
    for op in OPS:
        schema = str(getattr(torch.ops.bigkern, op).default._schema)
        definitions.define(schema.removeprefix("bigkern::"))
    return [definitions, implement("CUDA", _on_device)]


_libraries = _define() if is_installed() else []
