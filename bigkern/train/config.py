"""What a run is told, and the same read again from its folder."""

import json
import math
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from bigkern.train.errors import UserError

OPTIMIZERS = ("bigkern", "torch", "sgd")
DATA_SETS = ("digits", "mnist")
LINEAR_LAYERS = ("float", "int8")


@dataclass
class TrainConfig:
    """Options of the training loop, for any model. Raises UserError for values out of range."""

    epochs: int = 10
    batch_size: int = 64
    optimizer: str = "bigkern"  # bigkern.optim.Adam; torch: torch.optim.Adam; sgd: torch.optim.SGD
    lr: float = 1e-3
    momentum: float = 0.0  # sgd only
    weight_decay: float = 0.0  # added to the gradient (L2)
    max_grad_norm: float | None = None  # clips the global gradient norm
    amp: bool = True  # autocast (bfloat16 on the CPU, float16 on CUDA) and a GradScaler
    seed: int = 0
    device: str = "auto"  # cpu, cuda, cuda:1, ...; auto: cuda where there is one
    backend: str | None = None  # forces one implementation of bigkern's kernels
    log_every: int = 100  # steps of an epoch between printed lines
    save_every: int = 1000  # steps between checkpoints, besides one at the end of each epoch

    # These may change when a run is resumed. All others decide its parameters.
    RESUMABLE = frozenset({"epochs", "device", "backend", "log_every", "save_every"})

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "log_every", "save_every"):
            _check(self, name, getattr(self, name) >= 1, "at least 1")
        _check(self, "optimizer", self.optimizer in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}")
        _check(self, "lr", self.lr > 0 and math.isfinite(self.lr), "a positive number")
        _check(self, "momentum", 0 <= self.momentum < 1, "in [0, 1)")
        _check(self, "weight_decay", 0 <= self.weight_decay < math.inf, "a number from 0 up")
        _check(
            self,
            "max_grad_norm",
            self.max_grad_norm is None or 0 < self.max_grad_norm < math.inf,
            "a positive number",
        )
        _check(self, "seed", 0 <= self.seed < 2**63, "in [0, 2**63)")
        if self.momentum and self.optimizer != "sgd":
            raise UserError("momentum is an option of the optimizer sgd")
        if self.backend and self.optimizer != "bigkern":
            raise UserError("backend is an option of the optimizer bigkern")

    def fixed(self) -> dict[str, Any]:
        """The options that can't change in the middle of a run."""
        return {k: v for k, v in asdict(self).items() if k not in self.RESUMABLE}


@dataclass
class CnnConfig(TrainConfig):
    """Options of `bigkern train cnn`."""

    data: str = "digits"
    data_dir: str | None = None  # mnist only: where the IDX files are
    download: bool = False  # mnist only: fetch them into data_dir first
    augment: bool = False  # random shift and rotation of the training images
    linear: str = "float"  # torch.nn.Linear; int8: bigkern.nn.Int8TrainingLinear

    RESUMABLE = TrainConfig.RESUMABLE | {"data_dir", "download"}

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, "data", self.data in DATA_SETS, f"one of {', '.join(DATA_SETS)}")
        rule = f"one of {', '.join(LINEAR_LAYERS)}"
        _check(self, "linear", self.linear in LINEAR_LAYERS, rule)
        if self.data == "mnist" and self.data_dir is None:
            raise UserError("data mnist needs data_dir, the folder of its IDX files")
        if self.data == "digits" and (self.data_dir is not None or self.download):
            raise UserError("data_dir and download are options of the data set mnist")
        if self.data_dir is not None:
            self.data_dir = os.path.abspath(self.data_dir)  # a run may go on from another folder


C = TypeVar("C", bound=TrainConfig)


def read_config(folder: Path, task: str, config_class: type[C], changes: dict[str, Any]) -> C:
    """The config of the run of `task` in `folder`, with `changes` to the options that may change.

    Raises UserError where there is no such run, or another option would change.
    """
    path = folder / "config.json"
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        found_task = saved.pop("task")
        config = config_class(**saved) if found_task == task else None
    except FileNotFoundError:
        raise UserError(f"{folder} holds no run: there is no {path}") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, UserError) as error:
        raise UserError(f"{path} is not a run's config ({error})") from error
    if config is None:
        raise UserError(f"{folder} holds a run of `train {found_task}`, not of `train {task}`")
    changed = replace(config, **changes)
    for name, value in config.fixed().items():
        if (wanted := getattr(changed, name)) != value:
            raise UserError(f"the run in {folder} has {name} {value!r}, not {wanted!r}")
    return changed


def _check(config: TrainConfig, name: str, holds: bool, rule: str) -> None:
    if not holds:
        raise UserError(f"{name} must be {rule}, got {getattr(config, name)!r}")
