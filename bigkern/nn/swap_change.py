"""Changes of modules, each of which knows its way back."""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from bigkern.ops.attention import scaled_dot_product_attention

# What a module keeps: hooks, submodules, and whether it is in training.
KEPT = vars(nn.Module()).keys() - {"_parameters", "_buffers", "_non_persistent_buffers_set"}


class Change(Protocol):
    def is_there(self) -> bool:
        """Whether it is still as it was made, so that it can be undone."""

    def undo(self) -> None: ...


class Transplant:
    """Gives `module` the class and the attributes of `other`; it stays the same object."""

    def __init__(self, module: nn.Module, other: nn.Module) -> None:
        attributes = {name: x for name, x in vars(other).items() if name not in KEPT}
        self.module, self.new_class = module, type(other)
        self.old_class = type(module)
        self.old = {name: x for name, x in vars(module).items() if name in attributes}
        self.added = attributes.keys() - self.old.keys()
        self.hooks = other._forward_pre_hooks
        module.__class__ = self.new_class
        vars(module).update(attributes)
        module._forward_pre_hooks.update(self.hooks)

    def is_there(self) -> bool:
        return type(self.module) is self.new_class

    def undo(self) -> None:
        self.module.__class__ = self.old_class
        for name in self.added:
            del vars(self.module)[name]
        vars(self.module).update(self.old)
        for hook in self.hooks:
            self.module._forward_pre_hooks.pop(hook, None)


class AttributeChange:
    def __init__(self, module: nn.Module, name: str, value: Any) -> None:
        self.module, self.name, self.value = module, name, value
        self.old = getattr(module, name)
        setattr(module, name, value)

    def is_there(self) -> bool:
        return getattr(self.module, self.name) == self.value

    def undo(self) -> None:
        setattr(self.module, self.name, self.old)


class AttentionInside:
    """Calls of torch's attention in the forward of `module` run bigkern's."""

    def __init__(self, module: nn.Module) -> None:
        if "forward" in vars(module):
            raise NotImplementedError("its forward was replaced")
        self.module = module
        self.forward = module.forward = functools.partial(_forward_with_attention, module)

    def is_there(self) -> bool:
        return vars(self.module).get("forward") is self.forward

    def undo(self) -> None:
        del self.module.forward


class AttentionOfTransformers:
    """A model of Hugging Face's transformers takes the attention "bigkern"."""

    def __init__(self, model: nn.Module) -> None:
        from bigkern.integrations import transformers

        self.module, self.undo = model, transformers.enable(model)

    def is_there(self) -> bool:
        return self.module.config._attn_implementation == "bigkern"


class _Attention(TorchFunctionMode):
    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if function is F.scaled_dot_product_attention:
            function = scaled_dot_product_attention
        return function(*args, **(kwargs or {}))


def _forward_with_attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with _Attention():
        return type(module).forward(module, *args, **kwargs)


def describe(module: nn.Module) -> str:
    """Its class, with torch.nn or bigkern.nn before those of the two."""
    folders, name = type(module).__module__.split("."), type(module).__name__
    name = ".".join([*folders[:2], name]) if folders[1:2] == ["nn"] else name
    forward = vars(module).get("forward")
    if isinstance(forward, functools.partial) and forward.func is _forward_with_attention:
        return f"{name} with bigkern's attention inside"
    if hasattr(module, "set_attn_implementation"):  # a model of transformers
        return f"{name} with the attention {module.config._attn_implementation}"
    return name
