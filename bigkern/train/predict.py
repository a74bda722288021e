"""Evaluate and classify with a run's latest checkpoint."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bigkern.models import SimpleCNN
from bigkern.train.checkpoint import CheckpointError, load_latest
from bigkern.train.cnn import build_model
from bigkern.train.config import CnnConfig
from bigkern.train.data import load_data, resize
from bigkern.train.errors import UserError, require
from bigkern.train.images import classify, report
from bigkern.train.setup import pick_device


@dataclass
class TrainedCNN:
    model: SimpleCNN
    config: CnnConfig
    mean: float  # of the normalization that the model was trained with
    std: float


def load_cnn(folder: Path, device: str = "auto") -> TrainedCNN:
    """Load the CNN of the run in `folder` onto `device`. Raises UserError where there is none."""

    def use(path: Path, state: dict[str, Any]) -> TrainedCNN:
        identity = state["identity"]
        if identity.get("model") != "SimpleCNN":
            raise CheckpointError(path, f"its model is {identity.get('model')}, not SimpleCNN")
        try:
            config = CnnConfig(**state["config"])
            model = build_model(config)
            model.load_state_dict(state["model"])
            return TrainedCNN(model, config, identity["mean"], identity["std"])
        except (KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(path, f"its state doesn't fit ({error})") from error

    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    trained = load_latest(folder, use)
    trained.model.to(pick_device(device)).eval()
    return trained


def evaluate(folder: Path, device: str = "auto", data_dir: str | None = None) -> None:
    """Print the report of the run in `folder` on its data set, which `data_dir` may have moved."""
    trained = load_cnn(folder, device)
    config = replace(trained.config, data_dir=data_dir) if data_dir else trained.config
    report(trained.model, replace(load_data(config), mean=trained.mean, std=trained.std))


def read_image(path: Path, invert: bool) -> Tensor:
    """Read a picture as grayscale [1, 28, 28] float32 in [0, 1]; `invert` swaps black and white.

    Raises UserError for what Pillow can't read, or has more than 8 bits per channel.
    """
    pillow = require("PIL.Image", "reading images")
    try:
        with pillow.open(path) as picture:
            if picture.mode.startswith(("I", "F")):
                raise UserError(
                    f"{path}: convert it to 8 bits per pixel, its mode is {picture.mode}"
                )
            gray = np.array(picture.convert("L"))  # [H, W] uint8
    except (OSError, SyntaxError, ValueError, pillow.DecompressionBombError) as error:
        raise UserError(f"{path}: not an image that Pillow can read ({error})") from error
    image = resize(torch.from_numpy(gray)[None, None] / 255)[0]
    return 1 - image if invert else image


def predict(folder: Path, source: Path, invert: bool = False, device: str = "auto") -> None:
    """Print path, class and probability of the image `source`, or of all images in that folder.

    The model knows light digits on a dark ground: `invert` is for dark ones on a light ground.
    """
    trained = load_cnn(folder, device)
    paths = list_images(source)
    images = torch.stack([read_image(path, invert) for path in paths])  # [N, 1, 28, 28]
    probabilities = classify(trained.model, images, trained.mean, trained.std)  # [N, 10]
    for path, row in zip(paths, probabilities, strict=True):
        print(f"{path}: {int(row.argmax())} ({row.max():.1%})")


def list_images(source: Path) -> list[Path]:
    if not source.is_dir():
        return [source]
    suffixes = require("PIL.Image", "reading images").registered_extensions()
    paths = sorted(path for path in source.iterdir() if path.suffix.lower() in suffixes)
    if not paths:
        raise UserError(f"{source} holds no image")
    return paths
