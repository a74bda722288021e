"""Replaces what bigkern makes faster in a model, in place, and puts it back."""

import functools
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from bigkern.nn.attention import MultiheadAttention
from bigkern.nn.int8_conv2d import Int8Conv2d
from bigkern.nn.int8_layer import Int8Layer
from bigkern.nn.int8_linear import MODES, Int8Linear
from bigkern.nn.int8_training import Int8TrainingLinear
from bigkern.nn.swap_change import (
    AttentionInside,
    AttentionOfTransformers,
    AttributeChange,
    Change,
    Transplant,
    describe,
)
from bigkern.nn.swap_choice import (
    Filter,
    Names,
    chooser,
    names_attention,
    obstacle,
    shared_parameters,
    weight_readers,
)
from bigkern.nn.swap_trial import run_trial

LINEAR = (None, "int8", "int8_training")
CONV2D = (None, "int8")


class Swapped(NamedTuple):
    """What became of a module. `names` are all that it has in the model, "" for the model itself;
    `now` is None where it was left, and then `reason` says why."""

    names: tuple[str, ...]
    was: str
    now: str | None
    reason: str | None

    def __str__(self) -> str:
        names = ", ".join(name or "(the model)" for name in self.names)
        return f"{names}: {self.was} " + (f"-> {self.now}" if self.now else f"left: {self.reason}")


class SwapReport:
    """What :func:`swap` did to each module that it looked at, and the way back.

    Attributes:
        modules: list of :class:`Swapped`, in the order of the model's modules.
    """

    def __init__(self, names: Names) -> None:
        self.modules: list[Swapped] = []
        self._names = names
        self._changes: list[Change] = []
        self._is_undone = False

    def __str__(self) -> str:
        num_swapped = sum(module.now is not None for module in self.modules)
        counts = f"{num_swapped} swapped, {len(self.modules) - num_swapped} left"
        return "\n".join([counts, *map(str, self.modules)])

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """By each module's first name: its other names (``also``), what it ``was`` and is ``now``,
        None where it was left, and then the ``reason``, else None."""
        return {
            names[0]: {"also": list(names[1:]), "was": was, "now": now, "reason": reason}
            for names, was, now, reason in self.modules
        }

    def undo(self) -> None:
        """Puts everything back: the same modules, with the attributes and the very parameters that
        they had. Float weights, of what was quantized, are where and in the dtype that they were,
        wherever the model has moved; training modes and hooks stay as they are now.

        Raises:
            RuntimeError: it was undone before, or something else has changed a module since; then
                nothing is changed.
        """
        if self._is_undone:
            raise RuntimeError("the swap was undone before")
        for change in self._changes:
            if not change.is_there():
                name = self._names[change.module][0] or "the model"
                raise RuntimeError(f"{name} has changed since it was swapped: undo that first")
        self._is_undone = True
        while self._changes:
            self._changes.pop().undo()


def swap(
    model: nn.Module,
    *,
    attention: bool = False,
    linear: str | None = None,
    conv2d: str | None = None,
    mode: str = "dynamic",
    input_ranges: Mapping[str, Tensor] | None = None,
    only: Filter | Iterable[Filter] | None = None,
    skip: Filter | Iterable[Filter] | None = None,
    inputs: Any = None,
) -> SwapReport:
    """Replaces each :class:`torch.nn.MultiheadAttention` in `model` by bigkern's, and what else is
    asked for. A module stays the same object, with its names, its hooks, its device and dtype, its
    training mode, and, where it isn't quantized, its parameters.

    Args:
        model: changed in place.
        attention: calls of :func:`torch.nn.functional.scaled_dot_product_attention` inside of the
            model's forward, and of that of each module whose class names this function, run
            bigkern's (not those inside of a MultiheadAttention that is left); a model of Hugging
            Face's transformers gets the attention ``bigkern``. What the kernels can't do then
            raises an error.
        linear: ``int8``: each :class:`torch.nn.Linear` becomes a :class:`bigkern.nn.Int8Linear`,
            for inference; ``int8_training``: a :class:`bigkern.nn.Int8TrainingLinear`.
        conv2d: ``int8``: each :class:`torch.nn.Conv2d` becomes a :class:`bigkern.nn.Int8Conv2d`.
        mode: how these treat their inputs: ``dynamic``, ``static``, ``weight_only``.
        input_ranges: of :func:`bigkern.nn.input_ranges`, for the mode static.
        only, skip: which modules to look at, and which to leave: the name of a module, which stands
            for all in it too, or a pattern of names (``*.attn``); a compiled regular expression,
            to be found in the name; a function of name and module; or several of these.
        inputs: a batch, as for :func:`bigkern.nn.input_ranges`. The model runs on it, in
            evaluation, before it is changed: what can't be replaced as it is used there is left.

    Returns:
        A report: print it, read it as a dict, undo the swap. It keeps the float weights of what was
        quantized, until it is deleted.

    Raises:
        ValueError: an option that isn't among those above; a filter that fits no module.
        TypeError: a model that isn't a module; a filter of another type.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model)}")
    for name, value, choices in (
        ("linear", linear, LINEAR),
        ("conv2d", conv2d, CONV2D),
        ("mode", mode, MODES),
    ):
        if value not in choices:
            raise ValueError(f"{name} must be one of {choices}, got {value!r}")
    if mode == "static" and input_ranges is None:
        raise ValueError("mode static needs input_ranges: see bigkern.nn.input_ranges")

    names = defaultdict(list)  # the modules, each once
    for name, module in model.named_modules(remove_duplicate=False):
        names[module].append(name)
    recipes = _recipes(names, linear, conv2d, mode, input_ranges or {})
    replacements, reasons = _choose(names, recipes, chooser(names, only, skip))
    report = SwapReport(names)
    try:
        _change(model, report, replacements, reasons, attention, inputs)
    except BaseException:
        report.undo()
        raise
    return report


class _Recipe(NamedTuple):
    kind: type[nn.Module]
    make: Callable[[nn.Module], nn.Module]
    drops_weight: bool = False  # it isn't a parameter afterwards


def _recipes(
    names: Names,
    linear: str | None,
    conv2d: str | None,
    mode: str,
    input_ranges: Mapping[str, Tensor],
) -> list[_Recipe]:
    """How to make the replacements that were asked for."""

    def quantize(convert: Callable, module: nn.Module) -> nn.Module:
        if module.weight.is_meta:
            raise ValueError("its weight is on the device meta")
        ranges = (input_ranges[name] for name in names[module] if name in input_ranges)
        return convert(module, mode, input_range=next(ranges, None))

    # Attention comes first: on it depends which layers' weights are read by others.
    recipes = [_Recipe(nn.MultiheadAttention, MultiheadAttention.from_torch)]
    if linear == "int8_training":
        recipes.append(_Recipe(nn.Linear, Int8TrainingLinear.from_linear))
    for wanted, kind, convert in (
        (linear, nn.Linear, Int8Linear.from_linear),
        (conv2d, nn.Conv2d, Int8Conv2d.from_conv),
    ):
        if wanted == "int8":
            recipes.append(_Recipe(kind, functools.partial(quantize, convert), drops_weight=True))
    return recipes


def _choose(
    names: Names,
    recipes: list[_Recipe],
    reason_not_chosen: Callable[[nn.Module], str | None],
) -> tuple[dict[nn.Module, nn.Module], dict[nn.Module, str]]:
    """The modules to replace with what replaces them, and those to leave with the reasons."""
    replacements: dict[nn.Module, nn.Module] = {}
    reasons: dict[nn.Module, str] = {}
    for kind, make, drops_weight in recipes:
        unsuitable = weight_readers(names, replacements)
        if drops_weight:
            unsuitable |= shared_parameters(names)
        for module in names:
            if not isinstance(module, kind) or isinstance(
                module, MultiheadAttention | Int8TrainingLinear
            ):
                continue
            reason = reason_not_chosen(module) or obstacle(module, kind) or unsuitable.get(module)
            if reason is None:
                try:
                    replacements[module] = make(module)
                    continue
                except (TypeError, ValueError) as error:
                    reason = str(error)
            reasons[module] = reason
    return replacements, reasons


def _change(
    model: nn.Module,
    report: SwapReport,
    replacements: dict[nn.Module, nn.Module],
    reasons: dict[nn.Module, str],
    attention: bool,
    inputs: Any,
) -> None:
    """Changes the model, and notes it in the report."""
    names, changes = report._names, report._changes
    # torch's encoder would read the weights of its layers, and call them with nested tensors.
    for module in names:
        if isinstance(module, nn.TransformerEncoder) and any(
            isinstance(replacements.get(layer), Int8Layer | Int8TrainingLinear)
            for layer in module.modules()
        ):
            changes.append(AttributeChange(module, "use_nested_tensor", False))
    if inputs is not None:
        for module, reason in run_trial(model, replacements, inputs).items():
            del replacements[module]
            reasons[module] = reason
    was = {module: describe(module) for module in names}
    now = {}
    for module, replacement in replacements.items():
        changes.append(Transplant(module, replacement))
        now[module] = describe(module)
    for module, change in _attention_changes(model, names).items() if attention else ():
        try:
            changes.append(change(module))
            now[module] = describe(module)
        except NotImplementedError as error:
            reasons[module] = str(error)
    report.modules = [
        Swapped(tuple(names[module]), was[module], now.get(module), reasons.get(module))
        for module in names
        if module in now or module in reasons
    ]


def _attention_changes(model: nn.Module, names: Names) -> dict[nn.Module, Callable]:
    """How the calls of torch's attention in a model are turned to bigkern's."""
    transformers = sys.modules.get("transformers")
    found: dict[nn.Module, Callable] = {}
    inside: set[nn.Module] = set()  # models of transformers, each with its parts
    for module in names:
        if transformers and isinstance(module, transformers.PreTrainedModel):
            if module not in inside:
                found[module] = AttentionOfTransformers
                inside.update(module.modules())
        elif module is model or (
            names_attention(type(module)) and not isinstance(module, MultiheadAttention)
        ):
            found[module] = AttentionInside
    return found
