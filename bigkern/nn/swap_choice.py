"""Which modules of a model are replaced, and why the others aren't."""

import fnmatch
import functools
import re
import types
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from bigkern.nn.attention import MultiheadAttention

Filter = str | re.Pattern | Callable[[str, nn.Module], bool]
Names = Mapping[nn.Module, list[str]]  # every module of a model, and all names that it has there

# What can be replaced by layers of the same parameters: these types, without further parameters.
PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias")
PARAMETERS = {
    nn.MultiheadAttention: {*PROJECTIONS, "bias_k", "bias_v"},
    nn.Linear: {"weight", "bias"},
    nn.Conv2d: {"weight", "bias"},
}


def chooser(
    names: Names, only: Filter | Iterable[Filter] | None, skip: Filter | Iterable[Filter] | None
) -> Callable[[nn.Module], str | None]:
    """A function that tells why the filters leave a module, or None."""
    wanted, unwanted = (
        None if filters is None else _find(option, filters, names)
        for option, filters in (("only", only), ("skip", skip))
    )

    def reason(module: nn.Module) -> str | None:
        if wanted is not None and module not in wanted:
            return "it isn't among only"
        return "it is among skip" if unwanted and module in unwanted else None

    return reason


def _find(option: str, filters: Filter | Iterable[Filter], names: Names) -> set[nn.Module]:
    """The modules that one of `filters` fits."""
    if isinstance(filters, str) or callable(filters) or not isinstance(filters, Iterable):
        filters = [filters]
    found = set()
    for wanted in filters:
        if not (isinstance(wanted, str | re.Pattern) or callable(wanted)):
            raise TypeError(
                f"{option} must be names, patterns or functions of name and module, got {wanted!r}"
            )
        fitting = {m for m in names if any(_fits(wanted, name, m) for name in names[m])}
        if not fitting:
            raise ValueError(f"{option} must fit a module of the model, got {wanted!r}")
        found |= fitting
    return found


def _fits(wanted: Filter, name: str, module: nn.Module) -> bool:
    if isinstance(wanted, str):
        is_inside = name == wanted or name.startswith(f"{wanted}.")
        return is_inside or fnmatch.fnmatchcase(name, wanted)
    if isinstance(wanted, re.Pattern):
        return wanted.search(name) is not None
    return wanted(name, module)


def obstacle(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Why `module`, a `kind`, may do something else than its type says, or None."""
    if type(module) not in (kind, NonDynamicallyQuantizableLinear):
        return f"it is a subclass of {kind.__name__}"
    if "forward" in vars(module):
        return "its forward was replaced"
    own = {*module._parameters, *module._buffers} - PARAMETERS[kind]
    return f"it has tensors of others: {', '.join(sorted(own))}" if own else None


def shared_parameters(names: Names) -> dict[nn.Module, str]:
    """Modules whose parameters other modules have too, and what that would mean for them."""
    owners = defaultdict(list)
    for module in names:
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[parameter].append(module)
    return {
        module: f"its {name} is that of {names[other][0]} too"
        for module in names
        for name, parameter in module._parameters.items()
        if parameter is not None
        for other in owners[parameter]
        if other is not module
    }


def weight_readers(names: Names, replaced: Iterable[nn.Module]) -> dict[nn.Module, str]:
    """Linear layers whose weights are read by the module that they are in; `replaced` are modules
    that won't."""
    found = {}

    def reads(attention: nn.Module | None) -> bool:
        is_ours = isinstance(attention, MultiheadAttention) or attention in replaced
        return isinstance(attention, nn.MultiheadAttention) and not is_ours

    for module in names:
        layers = ()
        if reads(module):
            layers = ("out_proj",)
        elif isinstance(module, nn.TransformerEncoderLayer) and reads(module.self_attn):
            layers = ("linear1", "linear2")
        for layer in layers:
            found[getattr(module, layer)] = f"its weight is read by {type(module).__name__}"
    return found


@functools.cache
def names_attention(module_class: type[nn.Module]) -> bool:
    """Whether a method of this class calls torch's attention by its name."""
    return any(
        "scaled_dot_product_attention" in method.__code__.co_names
        for base in module_class.__mro__
        for method in vars(base).values()
        if isinstance(method, types.FunctionType)
    )
