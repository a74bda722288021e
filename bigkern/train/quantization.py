"""A trained model with INT8 layers in the places of its linear and convolutional ones."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bigkern.nn import Int8Conv2d, Int8Linear, input_ranges
from bigkern.train.loop import Task, epoch_order

CALIBRATION_BATCHES = 8


def calibrate(model: nn.Module, task: Task, batch_size: int, seed: int) -> dict[str, Tensor]:
    """The ranges of the layers' inputs over the first batches of the training set."""
    device = next(model.parameters()).device
    order = epoch_order(task.num_examples, seed, epoch=0).split(batch_size)
    inputs = (task.batch(indices)[0].to(device) for indices in order[:CALIBRATION_BATCHES])
    return input_ranges(model, inputs)


def quantize_(model: nn.Module, mode: str, ranges: Mapping[str, Tensor] | None = None) -> None:
    """Replace the linear and, but in mode weight_only, the convolutional layers of `model`.

    Mode static takes the scales of `ranges`; without any they are 0, to be loaded.
    """
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear):
            convert = Int8Linear.from_linear
        elif isinstance(layer, nn.Conv2d) and mode != "weight_only":
            convert = Int8Conv2d.from_conv
        else:
            continue
        unknown = torch.zeros(layer.weight.shape[1])
        input_range = unknown if ranges is None else ranges[name]
        model.set_submodule(name, convert(layer, mode, input_range=input_range))
