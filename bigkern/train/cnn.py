"""`bigkern train cnn`: the CNN's task for the training loop, and the report after it."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigkern.models import SimpleCNN
from bigkern.nn import Int8TrainingLinear
from bigkern.train.checkpoint import write_json
from bigkern.train.config import CnnConfig
from bigkern.train.data import ImageData, augmentation, load_data, normalize
from bigkern.train.loop import Task, train
from bigkern.train.metrics import accuracy, scores_per_class

EVALUATION_BATCH = 256


@dataclass
class Summary:
    """What `--compare` shows of a run. Plain numbers, so that a process can hand it to another."""

    losses: list[float]
    ms_per_step: float | None
    images_per_second: float | None
    peak_memory_mib: float
    train_accuracy: float
    test_accuracy: float


def build_model(config: CnnConfig) -> SimpleCNN:
    return SimpleCNN(Int8TrainingLinear if config.linear == "int8" else nn.Linear)


def build_task(config: CnnConfig, data: ImageData) -> Task:
    """The task of classifying `data` with SimpleCNN, for `train`."""
    augment = augmentation() if config.augment else lambda images: images

    def batch(indices: Tensor) -> tuple[Tensor, Tensor]:
        images = augment(data.train.images[indices])  # [B, 1, 28, 28]
        return normalize(images, data.mean, data.std), data.train.labels[indices]

    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(images), labels)

    def evaluate(model: nn.Module) -> dict[str, float]:
        probabilities = classify(model, data.test.images, data.mean, data.std)
        return {"test_accuracy": accuracy(probabilities.argmax(dim=1), data.test.labels)}

    return Task(
        name="cnn",
        identity={
            "model": "SimpleCNN",
            "mean": data.mean,
            "std": data.std,
            "train_images": len(data.train),
        },
        num_examples=len(data.train),
        build_model=lambda: build_model(config),
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


def run(config: CnnConfig, out: Path | None = None, resume: bool = False) -> Summary:
    """Train the CNN as `config` says, print the report, and write it to `out`/summary.json."""
    data = load_data(config)
    result = train(build_task(config, data), config, out, resume)
    train_accuracy, test_accuracy = report(result.model, data)
    summary = Summary(
        losses=result.losses,
        ms_per_step=result.ms_per_step,
        images_per_second=result.ms_per_step and 1e3 * config.batch_size / result.ms_per_step,
        peak_memory_mib=result.peak_memory_mib,
        train_accuracy=train_accuracy,
        test_accuracy=test_accuracy,
    )
    if summary.ms_per_step is not None:
        print(f"Time per step: {summary.ms_per_step:.2f} ms", end=", ")
        print(f"{summary.images_per_second:,.0f} images per second")
    print(f"Peak memory: {summary.peak_memory_mib:,.0f} MiB")
    if out and result.losses:  # else the run was finished, and has its summary
        numbers = {k: v for k, v in asdict(summary).items() if k != "losses"}
        write_json(out / "summary.json", numbers)
    return summary


def compare(config: CnnConfig, out: Path | None = None) -> None:
    """Run the same training with bigkern's Adam and with torch's, and print both side by side.

    Each run has a fresh process, so that its peak memory is its own.
    """
    configs = {
        "bigkern": replace(config, optimizer="bigkern"),
        "torch": replace(config, optimizer="torch", backend=None),
    }
    summaries = []
    for name, run_config in configs.items():
        print(f"--- {name}", flush=True)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            future = process.submit(run, run_config, out / name if out else None)
            summaries.append(future.result())
    print(comparison(*summaries))


def comparison(bigkern: Summary, torch: Summary) -> str:
    """A table of two runs of the same steps."""
    rows = [
        ("time per step (ms)", "ms_per_step", "{:.2f}"),
        ("images per second", "images_per_second", "{:,.0f}"),
        ("peak memory (MiB)", "peak_memory_mib", "{:,.0f}"),
        ("accuracy, train", "train_accuracy", "{:.2%}"),
        ("accuracy, held-out", "test_accuracy", "{:.2%}"),
    ]
    lines = [f"{'':20}{'bigkern':>12}{'torch':>12}"]
    for title, field, form in rows:
        values = (getattr(summary, field) for summary in (bigkern, torch))
        cells = ("-" if value is None else form.format(value) for value in values)
        lines.append(f"{title:20}" + "".join(f"{cell:>12}" for cell in cells))
    lines.append(f"{'final loss':20}{bigkern.losses[-1]:12.6f}{torch.losses[-1]:12.6f}")
    gaps = [abs(a - b) for a, b in zip(bigkern.losses, torch.losses, strict=True)]
    lines.append(
        f"largest difference of the losses: {max(gaps):.2e} at step {gaps.index(max(gaps)) + 1}"
    )
    return "\n".join(lines)
