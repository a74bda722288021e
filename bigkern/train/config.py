"""What a run is told, and the same read again from its folder."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from bigkern.models import TransformerConfig
from bigkern.nn.int8_linear import MODES as INT8_MODES
from bigkern.train.errors import UserError

OPTIMIZERS = ("bigkern", "torch", "sgd")
SCHEDULES = ("constant", "cosine")
DATA_SETS = ("digits", "mnist")
LINEAR_LAYERS = ("float", "int8")
OBJECTIVES = ("lm", "classify")
PRUNE_UNITS = ("weights", "channels")
PRUNE_SCOPES = ("global", "layer")
QUANTIZED = ("int8",)
VOCAB_SIZE = 256  # of the language model: bytes
IMAGE_SIZE = 28
NUM_CLASSES = 10


@dataclass
class TrainConfig:
    """Options of the training loop, for any model. Raises UserError for values out of range."""

    epochs: int = 10
    batch_size: int = 64
    accumulate: int = 1  # parts of a batch, which go through the model one after another
    optimizer: str = "bigkern"  # bigkern.optim.Adam; torch: torch.optim.Adam; sgd: torch.optim.SGD
    lr: float = 1e-3
    warmup_steps: int = 0  # the learning rate rises to lr over these
    schedule: str = "constant"  # cosine: it then falls to a tenth
    momentum: float = 0.0  # sgd only
    weight_decay: float = 0.0  # added to the gradient (L2)
    decoupled_weight_decay: bool = False  # AdamW: taken off the parameter instead
    max_grad_norm: float | None = None  # clips the global gradient norm
    amp: bool = True  # autocast (bfloat16 on the CPU, float16 on CUDA) and a GradScaler
    seed: int = 0
    device: str = "auto"  # cpu, cuda, cuda:1, ...; auto: cuda where there is one
    backend: str | None = None  # forces one implementation of bigkern's kernels
    log_every: int = 100  # steps of an epoch between printed lines
    save_every: int = 1000  # steps between checkpoints, besides one at the end of each epoch

    # These may change when a run is resumed (epochs not with the schedule cosine, which they
    # stretch). All others decide its parameters.
    RESUMABLE = frozenset({"epochs", "device", "backend", "log_every", "save_every"})

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "log_every", "save_every"):
            _check(self, name, getattr(self, name) >= 1, "at least 1")
        _check_choice(self, "optimizer", OPTIMIZERS)
        _check_choice(self, "schedule", SCHEDULES)
        _check(self, "lr", self.lr > 0 and math.isfinite(self.lr), "a positive number")
        _check(self, "warmup_steps", self.warmup_steps >= 0, "at least 0")
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
        if self.decoupled_weight_decay and self.optimizer == "sgd":
            raise UserError("decoupled_weight_decay is not an option of the optimizer sgd")
        self._check_backend()

    def _check_backend(self) -> None:
        if self.backend and self.optimizer != "bigkern":
            raise UserError("backend is an option of the optimizer bigkern")

    def fixed(self) -> dict[str, Any]:
        """The options that can't change in the middle of a run."""
        changeable = self.RESUMABLE - ({"epochs"} if self.schedule == "cosine" else set())
        return {k: v for k, v in asdict(self).items() if k not in changeable}


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
        _check_choice(self, "data", DATA_SETS)
        _check_choice(self, "linear", LINEAR_LAYERS)
        if self.data == "mnist" and self.data_dir is None:
            raise UserError("data mnist needs data_dir, the folder of its IDX files")
        if self.data == "digits" and (self.data_dir is not None or self.download):
            raise UserError("data_dir and download are options of the data set mnist")
        if self.data_dir is not None:
            self.data_dir = os.path.abspath(self.data_dir)  # a run may go on from another folder


@dataclass
class TransformerTrainConfig(TrainConfig):
    """Options of `bigkern train transformer`. The defaults are those of the language model;
    `for_objective` has those of the other."""

    epochs: int = 2
    batch_size: int = 8
    lr: float = 4e-3
    warmup_steps: int = 50
    schedule: str = "cosine"
    weight_decay: float = 0.1
    decoupled_weight_decay: bool = True
    max_grad_norm: float | None = 1.0
    amp: bool = False  # a CPU without bfloat16 arithmetic is several times slower with it
    objective: str = "lm"  # predict the next byte of a text; classify: the digits, row by row
    text: str | None = None  # lm only: a file; None: the source of Python's standard library
    context: int = 256  # bytes that the language model sees
    dim: int = 128
    num_heads: int = 2
    num_blocks: int = 4
    dropout: float = 0.0
    positions: str = "rotary"  # or learned, which take a few times as many steps
    attention: str = "bigkern"  # or torch

    RESUMABLE = TrainConfig.RESUMABLE | {"text"}  # a checkpoint knows its text by a digest

    @classmethod
    def for_objective(cls, **options: Any) -> "TransformerTrainConfig":
        """The config of these options, with defaults that suit their `objective`."""
        defaults = CLASSIFY if options.get("objective") == "classify" else {}
        return cls(**{**defaults, **options})

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_choice(self, "objective", OBJECTIVES)
        try:
            self.model()
        except ValueError as error:
            raise UserError(str(error)) from error
        if self.objective == "classify" and self.text is not None:
            raise UserError("text is an option of the task lm")
        if self.objective == "classify" and self.context != IMAGE_SIZE:
            raise UserError(
                f"context must be the {IMAGE_SIZE} rows of an image, got {self.context}"
            )
        if self.text is not None:
            self.text = os.path.abspath(self.text)  # a run may go on from another folder

    def _check_backend(self) -> None:
        if self.backend and "bigkern" not in (self.optimizer, self.attention):
            raise UserError("backend is an option of the optimizer and the attention bigkern")

    def model(self) -> TransformerConfig:
        """What the model is made of."""
        classify = self.objective == "classify"
        return TransformerConfig(
            vocab_size=VOCAB_SIZE,
            num_features=IMAGE_SIZE if classify else None,
            num_classes=NUM_CLASSES if classify else None,
            context=self.context,
            dim=self.dim,
            num_heads=self.num_heads,
            num_blocks=self.num_blocks,
            dropout=self.dropout,
            positions=self.positions,
            attention=self.attention,
        )


# Where classifying differs from the language model.
CLASSIFY = {
    "epochs": 15,
    "batch_size": 32,
    "lr": 1e-3,
    "context": IMAGE_SIZE,
    "dim": 128,
    "num_heads": 4,
    "num_blocks": 2,
}


@dataclass
class CompressConfig:
    """Options of `bigkern compress`. Raises UserError for values out of range."""

    prune: float | None = None  # the share that goes
    prune_unit: str = "weights"  # become 0; channels: are taken out
    prune_scope: str = "global"  # the share of the model's; layer: of each layer's
    distill: str | None = None  # the folder of the teacher's run
    temperature: float = 4.0
    distill_weight: float = 0.9  # of the teacher in the loss; the labels have the rest
    quantize: str | None = None
    mode: str = "dynamic"  # of the INT8 layers
    epochs: int = 3  # of training, after pruning and with the teacher
    lr: float | None = None  # None: the run's
    device: str = "auto"

    NEEDS: ClassVar = {
        "prune": ("prune_unit", "prune_scope"),
        "distill": ("temperature", "distill_weight"),
        "quantize": ("mode",),
        "prune or distill": ("epochs", "lr"),
    }

    def __post_init__(self) -> None:
        prune, lr, epochs = self.prune, self.lr, self.epochs
        if prune is None and self.distill is None and self.quantize is None:
            raise UserError("compress needs --prune, --distill or --quantize")
        _check(self, "prune", prune is None or 0 < prune < 1, "between 0 and 1")
        _check_choice(self, "prune_unit", PRUNE_UNITS)
        _check_choice(self, "prune_scope", PRUNE_SCOPES)
        _check(self, "temperature", 0 < self.temperature < math.inf, "a positive number")
        _check(self, "distill_weight", 0 <= self.distill_weight <= 1, "in [0, 1]")
        _check(self, "quantize", self.quantize in (None, *QUANTIZED), "int8")
        _check_choice(self, "mode", INT8_MODES)
        least = 0 if self.distill is None else 1
        _check(self, "epochs", epochs >= least, f"at least {least}")
        _check(self, "lr", lr is None or 0 < lr < math.inf, "a positive number")
        for steps, options in self.NEEDS.items():
            if all(getattr(self, step) is None for step in steps.split(" or ")):
                for option in options:
                    if getattr(self, option) != getattr(CompressConfig, option):
                        raise UserError(f"{option} is an option of {steps}")

    @property
    def trains(self) -> bool:
        return self.epochs > 0 and (self.prune is not None or self.distill is not None)


C = TypeVar("C", bound=TrainConfig)


def read_config(
    folder: Path, task: str, config_class: Callable[..., C], changes: dict[str, Any]
) -> C:
    """The config of the run of `task` in `folder`, with `changes` to the options that may change.

    Raises UserError where there is no such run, or another option would change.
    """
    path = folder / "config.json"
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        found_task, is_compressed = saved.pop("task"), saved.pop("compressed", None)
        config = config_class(**saved) if found_task == task else None
    except FileNotFoundError:
        raise UserError(f"{folder} holds no run: there is no {path}") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, UserError) as error:
        raise UserError(f"{path} is not a run's config ({error})") from error
    if is_compressed:
        raise UserError(f"{folder} holds a compressed run, which can't be trained on")
    if config is None:
        raise UserError(f"{folder} holds a run of `train {found_task}`, not of `train {task}`")
    changed = replace(config, **changes)
    for name, value in config.fixed().items():
        if (wanted := getattr(changed, name)) != value:
            raise UserError(f"the run in {folder} has {name} {value!r}, not {wanted!r}")
    return changed


def _check_choice(config: Any, name: str, choices: tuple[str, ...]) -> None:
    _check(config, name, getattr(config, name) in choices, f"one of {', '.join(choices)}")


def _check(config: Any, name: str, holds: bool, rule: str) -> None:
    if not holds:
        raise UserError(f"{name} must be {rule}, got {getattr(config, name)!r}")
