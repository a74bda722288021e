"""Evaluate and classify with a run's latest checkpoint."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bigkern.train.data import resize
from bigkern.train.errors import UserError, require
from bigkern.train.images import classify, report
from bigkern.train.saved import load_images, load_run, load_task
from bigkern.train.transformer import show_scores


def evaluate(
    folder: Path, device: str = "auto", data_dir: str | None = None, text: str | None = None
) -> None:
    """Print how the run in `folder` does on what was held out; `data_dir` or `text` tell where its
    data are now."""
    run = load_run(folder, device, data_dir=data_dir, text=text)
    if run.is_language_model:
        show_scores(load_task(run).evaluate(run.model))
    else:
        report(run.model, load_images(run))


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
    run = load_run(folder, device)
    if run.is_language_model:
        raise UserError(f"{folder} holds a language model, which classifies no images")
    paths = list_images(source)
    images = torch.stack([read_image(path, invert) for path in paths])  # [N, 1, 28, 28]
    mean, std = run.identity["mean"], run.identity["std"]
    probabilities = classify(run.model, images, mean, std)  # [N, 10]
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
