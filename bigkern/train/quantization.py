"""A trained model with INT8 layers in the places of its linear and convolutional ones."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bigkern.nn import Int8TrainingLinear, input_ranges
from bigkern.nn.swap import swap
from bigkern.train.errors import UserError
from bigkern.train.loop import Task, epoch_order

CALIBRATION_BATCHES = 8
# Shorter sums hold little memory, and are slower in INT8: SimpleCNN's convolution, of 9 products,
# takes nearly five times as long (batch 64, AVX2).
MIN_TERMS = 32


def calibrate(model: nn.Module, task: Task, batch_size: int, seed: int) -> dict[str, Tensor]:
    """The ranges of the layers' inputs over the first batches of the training set."""
    torch.manual_seed(seed)  # of augmentation
    device = next(model.parameters()).device
    order = epoch_order(task.num_examples, seed, epoch=0).split(batch_size)
    inputs = (task.batch(indices)[0].to(device) for indices in order[:CALIBRATION_BATCHES])
    return input_ranges(model, inputs)


def quantize_(model: nn.Module, mode: str, ranges: Mapping[str, Tensor] | None = None) -> None:
    """Make INT8 layers of the linear and, but in mode weight_only, the convolutional layers whose
    outputs are sums of at least MIN_TERMS products.

    Mode static takes the scales of `ranges`; without any they are 0, for a state to be loaded.
    Raises UserError for a layer that can't be quantized.
    """
    for name, layer in list(model.named_modules()):
        if isinstance(layer, Int8TrainingLinear):
            model.set_submodule(name, as_linear(layer))
    kinds = nn.Linear if mode == "weight_only" else nn.Linear | nn.Conv2d
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, kinds) and layer.weight[0].numel() >= MIN_TERMS
    }
    if ranges is None:
        ranges = {name: torch.zeros(layer.weight.shape[1]) for name, layer in layers.items()}
    report = swap(
        model, linear="int8", conv2d="int8", mode=mode, input_ranges=ranges, only=list(layers)
    )
    for result in report.modules:
        if result.now is None and layers.keys() & set(result.names):
            raise UserError(f"the run can't be quantized: {result}")


def as_linear(layer: nn.Linear) -> nn.Linear:
    """A plain layer with the parameters of one that trains by INT8 products."""
    sizes = layer.in_features, layer.out_features, layer.bias is not None
    linear = nn.Linear(*sizes, device="meta")
    linear.weight, linear.bias = layer.weight, layer.bias
    return linear
