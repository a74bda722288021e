"""Calling a model with a batch, in evaluation, to look at it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


def call(model: nn.Module, batch: Any) -> Any:
    """`batch` is what the model is called with: a tensor, a tuple of arguments, or a mapping of
    keyword arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*(batch if isinstance(batch, tuple) else (batch,)))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """With the model in evaluation, and then each module in the mode that it was in."""
    trained = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in trained:
            module.training = True
