"""Classifying images: the task for the training loop, for any model, and the report after it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigkern.train import distributed
from bigkern.train.compare import Summary
from bigkern.train.config import TrainConfig
from bigkern.train.data import ImageData, augmentation, normalize
from bigkern.train.loop import Task, train
from bigkern.train.metrics import accuracy, scores_per_class

EVALUATION_BATCH = 256


@dataclass
class ImageSummary(Summary):
    train_accuracy: float
    test_accuracy: float

    UNIT = "images"
    SCORES = (
        ("accuracy, train", "train_accuracy", "{:.2%}"),
        ("accuracy, held-out", "test_accuracy", "{:.2%}"),
    )


def image_task(
    name: str,
    model_name: str,
    build_model: Callable[[], nn.Module],
    data: ImageData,
    augment: bool = False,
) -> Task:
    """The task of classifying `data` with a model that maps images [N, 1, 28, 28] to logits."""
    move = augmentation() if augment else lambda images: images

    def batch(indices: Tensor) -> tuple[Tensor, Tensor]:
        images = move(data.train.images[indices])  # [B, 1, 28, 28]
        return normalize(images, data.mean, data.std), data.train.labels[indices]

    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(images), labels)

    def evaluate(model: nn.Module) -> dict[str, float]:
        probabilities = classify(model, data.test.images, data.mean, data.std)
        return {"test_accuracy": accuracy(probabilities.argmax(dim=1), data.test.labels)}

    return Task(
        name=name,
        identity={
            "model": model_name,
            "mean": data.mean,
            "std": data.std,
            "train_images": len(data.train),
        },
        num_examples=len(data.train),
        build_model=build_model,
        batch=batch,
        loss=loss,
        evaluate=evaluate,
    )


@torch.no_grad()
def classify(model: nn.Module, images: Tensor, mean: float, std: float) -> Tensor:
    """Return the probabilities [N, 10] float32, on the CPU, of each class for `images`.

    `images` are [N, 1, 28, 28], uint8 or float32 in [0, 1], on the CPU; the model may be elsewhere.
    """
    device = next(model.parameters()).device
    return torch.cat(
        [
            model(normalize(chunk.to(device), mean, std)).softmax(dim=1).cpu()
            for chunk in images.split(EVALUATION_BATCH)
        ]
    )


def report(model: nn.Module, data: ImageData) -> tuple[float, float]:
    """Print the accuracies, the scores per class and one sample; return train and test accuracy."""
    model.eval()
    on_train, on_test = (
        classify(model, part.images, data.mean, data.std) for part in (data.train, data.test)
    )  # [N, 10] each
    train_accuracy = accuracy(on_train.argmax(dim=1), data.train.labels)
    test_accuracy = accuracy(on_test.argmax(dim=1), data.test.labels)
    print(f"Accuracy on the {len(data.train)} train images: {train_accuracy:.2%}")
    print(f"Accuracy on the {len(data.test)} held-out images: {test_accuracy:.2%}")
    print(scores_per_class(on_test.argmax(dim=1), data.test.labels))
    print(
        f"Sample: held-out image 0 is classified as {int(on_test[0].argmax())} "
        f"({on_test[0].max():.1%}), its label is {int(data.test.labels[0])}"
    )
    return train_accuracy, test_accuracy


def run_task(
    task: Task, config: TrainConfig, data: ImageData, out: Path | None, resume: bool
) -> ImageSummary | None:
    """Train as `config` says, print the report, and write it to `out`/summary.json. Of several
    processes the leader alone reports."""
    result = train(task, config, out, resume)
    if not distributed.leads():
        return None
    train_accuracy, test_accuracy = report(result.model, data)
    summary = ImageSummary(
        losses=result.losses,
        ms_per_step=result.ms_per_step,
        per_second=result.ms_per_step and 1e3 * config.batch_size / result.ms_per_step,
        peak_memory_mib=result.peak_memory_mib,
        train_accuracy=train_accuracy,
        test_accuracy=test_accuracy,
    )
    summary.show(out)
    return summary
