"""Whether replacements can do what a model asks of their modules."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from bigkern.nn.calls import call, evaluating


class _ReadersOfWeights(TorchFunctionMode):
    """Notes in `found` which of the modules' weights are used while none of the modules runs, so
    by code that stays."""

    def __init__(self, modules: Mapping[Tensor, nn.Module], running: list[nn.Module]) -> None:
        self.modules, self.running, self.found = modules, running, set()

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        for x in pytree.tree_leaves((args, kwargs)):
            module = self.modules.get(x) if isinstance(x, Tensor) else None
            if module is not None and not self.running:
                self.found.add(module)
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def run_trial(
    model: nn.Module, replacements: Mapping[nn.Module, nn.Module], inputs: Any
) -> dict[nn.Module, str]:
    """Runs `model`, in evaluation, on the batch `inputs`, and each replacement on what its module
    is called with; returns the modules that can't be replaced, and why."""
    reasons: dict[nn.Module, str] = {}
    running: list[nn.Module] = []
    gone = {
        module._parameters["weight"]: module
        for module, replacement in replacements.items()
        if "weight" in module._parameters and "weight" not in replacement._parameters
    }

    def start(module: nn.Module, args: tuple, kwargs: dict) -> None:
        running.append(module)
        try:
            replacements[module].eval()(*args, **kwargs)
        except Exception as error:
            reasons[module] = f"called as in the trial, {error}"

    def end(module: nn.Module, args: tuple, output: Any) -> None:
        running.pop()

    with contextlib.ExitStack() as stack:
        for module in replacements:
            for hook in (
                module.register_forward_pre_hook(start, with_kwargs=True),
                module.register_forward_hook(end, always_call=True),
            ):
                stack.callback(hook.remove)
        stack.enter_context(evaluating(model))
        devices = {p.device for p in model.parameters() if p.is_cuda}
        stack.enter_context(torch.random.fork_rng(devices))
        readers = stack.enter_context(_ReadersOfWeights(gone, running))
        call(model, inputs)
    return dict.fromkeys(readers.found, "its weight is read by others") | reasons
