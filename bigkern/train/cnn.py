"""`bigkern train cnn`: the CNN on handwritten digits, or on MNIST."""

from dataclasses import replace
from pathlib import Path

from torch import nn

from bigkern.models import SimpleCNN
from bigkern.nn import Int8TrainingLinear
from bigkern.train import compare as side_by_side
from bigkern.train import distributed
from bigkern.train.config import CnnConfig
from bigkern.train.data import ImageData, load_data
from bigkern.train.images import ImageSummary, image_task, run_task
from bigkern.train.loop import Task


def build_model(config: CnnConfig) -> SimpleCNN:
    return SimpleCNN(Int8TrainingLinear if config.linear == "int8" else nn.Linear)


def build_task(config: CnnConfig, data: ImageData) -> Task:
    """The task of classifying `data` with SimpleCNN, for `train`."""
    return image_task("cnn", "SimpleCNN", lambda: build_model(config), data, config.augment)


def run(config: CnnConfig, out: Path | None = None, resume: bool = False) -> ImageSummary | None:
    """Train the CNN as `config` says, print the report, and write it to `out`/summary.json. Of
    several processes the leader alone reports."""
    with distributed.leader_first():  # which may download them
        data = load_data(config)
    return run_task(build_task(config, data), config, data, out, resume)


def compare(config: CnnConfig, out: Path | None = None) -> None:
    """Run the same training with bigkern's Adam and with torch's, and print both side by side."""
    ours, theirs = (
        replace(config, optimizer="bigkern"),
        replace(config, optimizer="torch", backend=None),
    )
    side_by_side.compare(run, ours, theirs, out)
