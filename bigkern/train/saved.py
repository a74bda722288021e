"""What a run has saved, read again for use: its model, and its data."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from bigkern.train import cnn, transformer
from bigkern.train.checkpoint import CheckpointError, load_latest
from bigkern.train.config import VOCAB_SIZE, CnnConfig, TrainConfig, TransformerTrainConfig
from bigkern.train.data import ImageData, load_data, load_digits
from bigkern.train.errors import UserError
from bigkern.train.loop import Task
from bigkern.train.pruning import resize_
from bigkern.train.quantization import quantize_
from bigkern.train.setup import pick_device
from bigkern.train.text import load_text


class Reference(NamedTuple):
    model: str  # as checkpoints name it
    config: type[TrainConfig]
    build_model: Callable[[Any], nn.Module]


REFERENCES = {
    "cnn": Reference("SimpleCNN", CnnConfig, cnn.build_model),
    "transformer": Reference("Transformer", TransformerTrainConfig, transformer.build_model),
}


@dataclass
class Compression:
    """What makes a model another than its config says. Plain values, kept in checkpoints."""

    channels: dict[str, int] | None = None  # that are left, by layer
    int8: str | None = None  # the mode of its INT8 layers


@dataclass
class SavedRun:
    folder: Path
    config: TrainConfig
    identity: dict[str, Any]
    step: int
    compression: Compression
    model: nn.Module  # in evaluation

    @property
    def task(self) -> str:
        """As in `bigkern train <task>`."""
        return self.identity["task"]

    @property
    def is_language_model(self) -> bool:
        return self.identity.get("objective") == "lm"


def load_run(folder: Path, device: str = "auto", **moved: str | None) -> SavedRun:
    """Load the run in `folder`, its model onto `device`.

    `moved` are options that say where its data are now: `data_dir` of mnist, `text` of a language
    model. Raises UserError where there is no run, or it has no such option.
    """

    def use(path: Path, state: dict[str, Any]) -> SavedRun:
        identity = state["identity"]
        reference = REFERENCES.get(identity.get("task"))
        if reference is None:
            raise CheckpointError(path, f"its task is {identity.get('task')}")
        for name, value in {"model": reference.model, "vocab_size": VOCAB_SIZE}.items():
            if (found := identity.get(name, value)) != value:
                raise CheckpointError(path, f"its {name} is {found}, not {value}")
        try:
            config = reference.config(**state["config"])
            compression = Compression(**identity.get("compression", {}))
            model = reference.build_model(config)
            if compression.channels:
                resize_(model, compression.channels)
            if compression.int8:
                quantize_(model, compression.int8)
            model.load_state_dict(state["model"])
        except (KeyError, TypeError, ValueError, RuntimeError, UserError) as error:
            raise CheckpointError(path, f"its state doesn't fit ({error})") from error
        return SavedRun(folder, config, identity, state["step"], compression, model)

    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    run = load_latest(folder, use)
    for name, value in moved.items():
        if value is not None:
            if not hasattr(run.config, name):
                raise UserError(f"{name} is not an option of a run of `train {run.task}`")
            run.config = replace(run.config, **{name: value})
    run.model.to(pick_device(device)).eval()
    return run


def load_images(run: SavedRun) -> ImageData:
    """The images of `run`, to be normalized as in its training, whatever they are now."""
    data = load_data(run.config) if isinstance(run.config, CnnConfig) else load_digits()
    return replace(data, mean=run.identity["mean"], std=run.identity["std"])


def load_task(run: SavedRun) -> Task:
    """The task of `run`. Raises UserError where its data are others now."""
    config = run.config
    if run.is_language_model:
        task = transformer.text_task(config, load_text(config.text, config.context))
    else:
        build_task = cnn.build_task if isinstance(config, CnnConfig) else transformer.rows_task
        task = build_task(config, load_images(run))
    for name, value in task.identity.items():
        if run.identity.get(name) != value:
            raise UserError(
                f"the data aren't those that {run.folder} has learnt: "
                f"its {name} is {run.identity.get(name)}, not {value}"
            )
    return task
