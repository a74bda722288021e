"""Stands in for hypothesis where it isn't installed, a GPU machine without a network above all: the
part that the tests use. It draws as many cases, the same each time, but neither looks for edges
nor makes failing cases smaller. conftest.py puts this folder last on the path."""

import functools
import inspect
from collections.abc import Callable
from enum import Enum
from random import Random
from typing import Any

from . import strategies as strategies

Phase = Enum("Phase", ["explicit", "generate"])
HealthCheck = Enum("HealthCheck", ["function_scoped_fixture"])


class settings:
    def __init__(self, parent: "settings | None" = None, **options: Any) -> None:
        self.max_examples = options.get("max_examples", parent.max_examples if parent else 100)

    def __call__(self, test: Callable) -> Callable:
        test.max_examples = self.max_examples
        return test


def given(*positional: strategies.Strategy, **named: strategies.Strategy) -> Callable:
    """Positional strategies are for the last parameters."""

    def decorate(test: Callable) -> Callable:
        signature = inspect.signature(test)
        names = list(signature.parameters)[len(signature.parameters) - len(positional) :]
        drawn_by = dict(zip(names, positional, strict=True)) | named

        @functools.wraps(test)
        def run(*args: Any, **kwargs: Any) -> None:
            for i in range(getattr(run, "max_examples", 100)):
                random = Random(f"{test.__qualname__} {i}")
                drawn = {name: strategy.draw(random) for name, strategy in drawn_by.items()}
                try:
                    test(*args, **kwargs, **drawn)
                except BaseException:
                    print(f"failing case {i}: {drawn}")
                    raise

        kept = [p for name, p in signature.parameters.items() if name not in drawn_by]
        run.__signature__ = signature.replace(parameters=kept)
        return run

    return decorate
