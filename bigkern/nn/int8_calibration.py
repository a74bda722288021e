"""Before a model is quantized: how large its layers' inputs get, and what to do about columns that
are far larger than the others."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bigkern.nn.calls import call, evaluating

# Layers whose outputs are scaled, one by one, where their weight and bias are.
FOLDABLE = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.Linear,
    nn.Conv2d,
)


@torch.no_grad()
def input_ranges(model: nn.Module, batches: Iterable[Any]) -> dict[str, Tensor]:
    """Runs `model`, in evaluation, on `batches` and returns for each :class:`torch.nn.Linear` and
    :class:`torch.nn.Conv2d` that ran, by its name, the largest magnitude of each feature (or
    channel) of its input: float32 of shape [in_features] (or [in_channels]).

    Args:
        model: in any floating-point dtype; it isn't changed.
        batches: each is what the model is called with: a tensor, a tuple of arguments, or a dict
            of keyword arguments.

    Raises:
        ValueError: there is no batch.
    """
    ranges: dict[str, Tensor] = {}

    def observe(name: str, features_dim: int):
        def hook(module: nn.Module, args: tuple) -> None:
            x = args[0].detach().abs().movedim(features_dim, -1).flatten(0, -2).float()
            if len(x):
                found = x.amax(0)
                ranges[name] = torch.maximum(ranges[name], found) if name in ranges else found

        return hook

    hooks = [
        module.register_forward_pre_hook(observe(name, -1 if isinstance(module, nn.Linear) else -3))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    num_batches = 0
    try:
        with evaluating(model):
            for num_batches, batch in enumerate(batches, start=1):  # noqa: B007
                call(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    if not num_batches:
        raise ValueError("batches must hold one at least, got none")
    return ranges


def smoothing_scales(input_range: Tensor, weight_range: Tensor, alpha: float) -> Tensor:
    r"""What each column of the input is to be divided by, and of the weight multiplied by, so that
    both are about as hard to quantize: :math:`s_j = \max|X_j|^\alpha / \max|W_j|^{1 - \alpha}`
    (Xiao et al. 2023, https://arxiv.org/abs/2211.10438, equation 4); 1 for columns of zeros.

    Raises ValueError for an alpha outside [0, 1].
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must be from 0 to 1, got {alpha}")
    scales = input_range.pow(alpha) / weight_range.pow(1 - alpha)
    return torch.where((input_range > 0) & (weight_range > 0), scales, 1.0)


def column_range(weight: Tensor) -> Tensor:
    """The largest magnitude [K] of each column of a weight [N, K, ...]."""
    return weight.detach().abs().movedim(1, 0).flatten(1).float().amax(1)


@torch.no_grad()
def smooth_(
    model: nn.Module,
    ranges: dict[str, Tensor],
    folds: Mapping[str, str | Sequence[str]],
    alpha: float = 0.5,
) -> None:
    """Moves large columns of inputs into the weights (SmoothQuant): divides the outputs of one
    layer, by its weight and bias, and multiplies the columns of the weights that they meet. The
    model computes the same, and so can be quantized with less error.

    Args:
        model: float; changed in place.
        ranges: of :func:`input_ranges`; changed in place to what they are now.
        folds: the name of a layer (norm, Linear or Conv2d) -> the names of all Linear and Conv2d
            layers that read its output. Nothing else may read it, and nothing may be in between but
            what commutes with positive factors: ReLU, dropout, a reshape that keeps the columns.
            Where there is no such layer, give ``alpha`` to ``Int8Linear.from_linear``.
        alpha: how much is moved: from 0, such that the weights' columns become equally large, to 1,
            such that the inputs' do.

    Raises:
        ValueError: an alpha outside [0, 1]; a name without a range; shapes that don't fit.
        TypeError: layers of other types; a norm without weight.
    """
    for previous_name, names in folds.items():
        names = [names] if isinstance(names, str) else names
        previous = model.get_submodule(previous_name)
        layers = [model.get_submodule(name) for name in names]
        missing = [name for name in names if name not in ranges]
        if missing:
            raise ValueError(f"ranges must have {missing[0]!r}, got {sorted(ranges)}")
        input_range = torch.stack([ranges[name] for name in names]).amax(0)  # [K]
        _check_fold(previous_name, previous, dict(zip(names, layers, strict=True)), input_range)

        weight_range = torch.stack([column_range(layer.weight) for layer in layers]).amax(0)
        scales = smoothing_scales(input_range, weight_range, alpha)
        for parameter in (previous.weight, previous.bias if hasattr(previous, "bias") else None):
            if parameter is not None:
                parameter.div_(scales.to(parameter.dtype).view(-1, *[1] * (parameter.dim() - 1)))
        for name, layer in zip(names, layers, strict=True):
            weight = layer.weight
            weight.mul_(scales.to(weight.dtype).view(-1, *[1] * (weight.dim() - 2)))
            ranges[name] = ranges[name] / scales


def _check_fold(
    previous_name: str, previous: nn.Module, layers: Mapping[str, nn.Module], input_range: Tensor
) -> None:
    if not isinstance(previous, FOLDABLE) or previous.weight is None:
        raise TypeError(
            f"{previous_name} must be a norm, Linear or Conv2d with a weight, got {previous}"
        )
    for name, layer in layers.items():
        if not isinstance(layer, nn.Linear | nn.Conv2d) or getattr(layer, "groups", 1) != 1:
            raise TypeError(f"{name} must be a Linear, or a Conv2d with one group, got {layer}")
    K, shape = len(input_range), list(previous.weight.shape)
    is_of_rows = isinstance(previous, nn.LayerNorm | nn.RMSNorm) and len(shape) > 1
    if shape[0] != K or is_of_rows:
        raise ValueError(f"{previous_name} must have {K} outputs, got a weight of shape {shape}")


def outlier_columns(input_range: Tensor, threshold: float) -> Tensor:
    """The columns, int64, that reach `threshold`, and so are kept out of INT8 (Dettmers et al.
    2022, https://arxiv.org/abs/2208.07339). Raises ValueError for a threshold that isn't positive.
    """
    if not 0.0 < threshold < math.inf:
        raise ValueError(f"outlier_threshold must be a positive number, got {threshold}")
    return (input_range >= threshold).nonzero().flatten()
