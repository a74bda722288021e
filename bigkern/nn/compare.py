"""What a swap has done to a model: errors by layer, and speed, memory and size of the whole."""

import contextlib
import math
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bigkern.nn.calls import call, evaluating
from bigkern.nn.swap_change import describe
from bigkern.testing import memory_beyond_results


@dataclass(frozen=True)
class Error:
    """That of outputs y against y0: ``relative``, ||y - y0|| / ||y0||, and ``sqnr``, the same in
    dB, -20 log10(relative): infinite where they are equal."""

    relative: float
    sqnr: float

    def __str__(self) -> str:
        return "equal" if self.relative == 0 else f"{self.relative:.1e} ({self.sqnr:.1f} dB)"


@dataclass(frozen=True)
class LayerComparison:
    """A layer's error in its place in the model, where errors of the layers before it come in too;
    and ``alone``, with the input that it has in the model compared with."""

    name: str
    was: str
    now: str
    error: Error
    alone: Error


@dataclass(frozen=True)
class Cost:
    """Of a call of the model: its time in seconds (median, and the quartiles), the bytes that it
    takes at its peak beyond parameters and results (None where that can't be told: on the CPU,
    elsewhere than on Linux), and the bytes of parameters and buffers."""

    seconds: float
    quartiles: tuple[float, float]
    peak_bytes: int | None
    size_bytes: int


@dataclass(frozen=True)
class Comparison:
    """Printable, and as a dict."""

    layers: list[LayerComparison]
    output: Error
    before: Cost
    after: Cost

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        rows = [("layer", "was", "now", "error", "alone")]
        rows += [(x.name, x.was, x.now, str(x.error), str(x.alone)) for x in self.layers]
        rows.append(("the output", "", "", str(self.output), ""))
        costs = [("", "before", "after", "before / after")]
        for title, field, unit, form in (
            ("time of a call", "seconds", 1e-3, "{:.3f} ms"),
            ("peak memory", "peak_bytes", 2**20, "{:.2f} MiB"),
            ("size", "size_bytes", 2**20, "{:.2f} MiB"),
        ):
            before, after = (getattr(cost, field) for cost in (self.before, self.after))
            if before and after:
                cells = (form.format(x / unit) for x in (before, after))
                costs.append((title, *cells, f"{before / after:.2f}"))
        return "\n\n".join(map(_aligned, (rows, costs)))


@torch.no_grad()
def compare(
    model: nn.Module, swapped: nn.Module, inputs: Any, *, num_calls: int = 10
) -> Comparison:
    """Runs a model and a swapped copy of it on the same batch, in evaluation::

        swapped = copy.deepcopy(model)
        bigkern.swap(swapped, linear="int8")
        print(bigkern.compare(model, swapped, batch))

    Args:
        model, swapped: as they were before and after :func:`bigkern.swap`. Neither is changed.
        inputs: a batch, as for :func:`bigkern.nn.input_ranges`.
        num_calls: of each, by turns, to measure the time. Threads and device are as they are.

    Returns:
        The error of each layer that was swapped and ran, that of the model's output (of all its
        tensors together), and what a call costs with both.

    Raises:
        ValueError: `swapped` is `model`; no calls; outputs that differ in number or shape.
        TypeError: one of both isn't a module.
    """
    for name, x in (("model", model), ("swapped", swapped)):
        if not isinstance(x, nn.Module):
            raise TypeError(f"{name} must be a torch.nn.Module, got {type(x)}")
    if swapped is model:
        raise ValueError("swapped must be another module than model: swap a copy.deepcopy of it")
    if num_calls < 1:
        raise ValueError(f"num_calls must be at least 1, got {num_calls}")
    with evaluating(model), evaluating(swapped):
        with _without_fused_encoder():
            layers, output = _errors(model, swapped, inputs)
        before, after = _costs((model, swapped), inputs, num_calls)
    return Comparison(layers, output, before, after)


@contextlib.contextmanager
def _without_fused_encoder() -> Iterator[None]:
    """torch.nn.TransformerEncoder calls all its layers, and none with nested tensors."""
    was_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_enabled)


def _errors(
    model: nn.Module, swapped: nn.Module, inputs: Any
) -> tuple[list[LayerComparison], Error]:
    others = dict(swapped.named_modules())
    pairs = {
        name: (layer, others[name])
        for name, layer in model.named_modules()
        if name and name in others and describe(layer) != describe(others[name])
    }
    outputs: dict[str, list[Tensor]] = {name: [] for name in pairs}
    alone = {name: _ErrorSum() for name in pairs}
    in_place = {name: _ErrorSum() for name in pairs}
    with contextlib.ExitStack() as stack:
        for name, (layer, other) in pairs.items():

            def keep(module, args, kwargs, output, name=name, other=other) -> None:
                outputs[name].append(output)
                alone[name].add(output, other(*args, **kwargs))

            stack.callback(layer.register_forward_hook(keep, with_kwargs=True).remove)
        expected = call(model, inputs)
    with contextlib.ExitStack() as stack:
        for name, (_, other) in pairs.items():

            def look(module, args, output, name=name) -> None:
                if outputs[name]:  # torch's attention doesn't call its output projection
                    in_place[name].add(outputs[name].pop(0), output)

            stack.callback(other.register_forward_hook(look).remove)
        whole = _ErrorSum()
        whole.add(expected, call(swapped, inputs))
    layers = [
        LayerComparison(
            name, describe(layer), describe(other), in_place[name].error(), alone[name].error()
        )
        for name, (layer, other) in pairs.items()
        if in_place[name].count
    ]
    return layers, whole.error()


class _ErrorSum:
    """The error of several outputs together."""

    def __init__(self) -> None:
        self.count, self.noise, self.signal = 0, 0.0, 0.0

    def add(self, expected: Any, actual: Any) -> None:
        pair = [[x for x in _tensors(y) if x.is_floating_point()] for y in (expected, actual)]
        wanted, got = ([list(x.shape) for x in tensors] for tensors in pair)
        if wanted != got:
            raise ValueError(f"swapped must give outputs of shapes {wanted}, got {got}")
        self.count += 1
        for x, y in zip(*pair, strict=True):
            x, y = x.double(), y.double()
            self.noise += (y - x).square().sum().item()
            self.signal += x.square().sum().item()

    def error(self) -> Error:
        if self.noise == 0:
            return Error(0.0, math.inf)
        relative = math.sqrt(self.noise / self.signal) if self.signal else math.inf
        return Error(relative, -20 * math.log10(relative))


def _tensors(output: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor)]


def _costs(models: tuple[nn.Module, nn.Module], inputs: Any, num_calls: int) -> list[Cost]:
    seconds: list[list[float]] = [[], []]
    for _ in range(num_calls):
        for model, mine in zip(models, seconds, strict=True):
            mine.append(seconds_of_call(model, inputs))
    costs = []
    for model, mine in zip(models, seconds, strict=True):
        # Twice, since of one there are no quartiles.
        first, median, third = statistics.quantiles(mine * 2, n=4, method="inclusive")
        costs.append(Cost(median, (first, third), peak_bytes(model, inputs), size_bytes(model)))
    return costs


def seconds_of_call(model: nn.Module, inputs: Any) -> float:
    tic = time.perf_counter()
    call(model, inputs)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - tic


def size_bytes(model: nn.Module) -> int:
    return sum(x.nbytes for x in (*model.parameters(), *model.buffers()))


def peak_bytes(model: nn.Module, inputs: Any) -> int | None:
    """See :class:`Cost`."""
    is_on_gpu = any(x.is_cuda for x in (*model.parameters(), *model.buffers()))
    if not is_on_gpu and sys.platform != "linux":
        return None
    if not is_on_gpu:
        return max(0, memory_beyond_results(lambda: _tensors(call(model, inputs))))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = _tensors(call(model, inputs))
    return torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in results)


def _aligned(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
