"""Smaller models: weights set to 0, or whole channels taken out, the smallest first."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from bigkern.train.errors import UserError


def layers(model: nn.Module) -> list[nn.Module]:
    """Those whose weights are pruned and quantized."""
    return [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def prune_weights_(model: nn.Module, amount: float, scope: str) -> None:
    """Set the share `amount` of all weights (scope `global`) or of each layer's (`layer`) to 0,
    those of the smallest magnitude. Biases, embeddings and norms stay as they are."""
    weights = [(layer, "weight") for layer in layers(model)]
    if scope == "global":
        prune.global_unstructured(weights, prune.L1Unstructured, amount=amount)
    else:
        for layer, name in weights:
            prune.l1_unstructured(layer, name, amount)
    for layer, name in weights:
        prune.remove(layer, name)


@contextlib.contextmanager
def zeros_kept(model: nn.Module) -> Iterator[None]:
    """In the block the weights that are 0 at its start stay 0, whatever trains the model."""
    masked = [layer for layer in layers(model) if (layer.weight == 0).any()]
    for layer in masked:
        prune.custom_from_mask(layer, "weight", layer.weight != 0)
    try:
        yield
    finally:
        for layer in masked:
            prune.remove(layer, "weight")


def prune_channels_(model: nn.Module, amount: float, scope: str) -> None:
    """Take the share `amount` of all channels, or of each layer's, out of the layers that
    `model.channels()` names: those with the smallest L2 norm of their weights (Li et al. 2017,
    https://arxiv.org/abs/1608.08710). Between layers norms are compared in units of the layer's
    mean, since they depend on how many weights a channel has.

    Raises UserError where a layer would lose all.
    """
    scores = {}
    for name in model.channels():
        norms = model.get_submodule(name).weight.detach().flatten(1).norm(dim=1)  # [channels]
        scores[name] = norms / norms.mean()
    groups = [list(scores)] if scope == "global" else [[name] for name in scores]
    for names in groups:
        joined = torch.cat([scores[name] for name in names])
        is_kept = torch.ones_like(joined, dtype=torch.bool)
        is_kept[joined.argsort(stable=True)[: round(amount * len(joined))]] = False
        parts = is_kept.split([len(scores[name]) for name in names])
        for name, part in zip(names, parts, strict=True):
            if not part.any():
                raise UserError(f"prune {amount} would leave no channel of {name}")
            keep_channels_(model, name, part.nonzero().flatten())


@torch.no_grad()
def keep_channels_(model: nn.Module, name: str, kept: Tensor) -> None:
    """Take all but the output channels `kept` [k] int64 out of the layer `name`, and what reads
    them out of the layer after it."""
    layer, reader = (model.get_submodule(x) for x in (name, model.channels()[name]))
    channels = len(layer.weight)
    layer.weight = nn.Parameter(layer.weight[kept])
    layer.bias = nn.Parameter(layer.bias[kept])
    by_channel = reader.weight.unflatten(1, (channels, -1))  # [N, channels, columns of each, ...]
    reader.weight = nn.Parameter(by_channel[:, kept].flatten(1, 2))
    for changed in (layer, reader):
        outputs, inputs = changed.weight.shape[:2]
        if isinstance(changed, nn.Conv2d):
            changed.out_channels, changed.in_channels = outputs, inputs
        else:
            changed.out_features, changed.in_features = outputs, inputs


def count_channels(model: nn.Module) -> dict[str, int]:
    """How many channels the layers have that `model.channels()` names."""
    return {name: len(model.get_submodule(name).weight) for name in model.channels()}


def resize_(model: nn.Module, channels: dict[str, int]) -> None:
    """Give the layers these numbers of channels, so that a state of that size can be loaded."""
    for name, count in channels.items():
        keep_channels_(model, name, torch.arange(count))
