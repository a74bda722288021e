"""Accuracy, per-class scores, memory, and the log of a run."""

import json
import resource
import sys
import threading
from pathlib import Path

import torch
from torch import Tensor

from bigkern.train.checkpoint import atomic_file
from bigkern.train.errors import UserError, require, writing


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """The share of `predicted` [N] that equals `labels` [N]."""
    return (predicted == labels).double().mean().item()


def scores_per_class(predicted: Tensor, labels: Tensor) -> str:
    """A table of precision, recall and F1 per class; without scikit-learn, what to install."""
    try:
        sklearn_metrics = require("sklearn.metrics", "the table of precision, recall and F1")
    except UserError as error:
        return str(error)
    return sklearn_metrics.classification_report(
        labels.numpy(), predicted.numpy(), digits=4, zero_division=0
    )


def peak_memory_mib(device: torch.device) -> float:
    """The most memory used so far: on CUDA by tensors, on the CPU by the process (resident)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


class MetricsLog:
    """Writes DIR/metrics.jsonl, and the same as TensorBoard events where tensorboard is installed.

    What an earlier process logged after step `start` is dropped: those steps are run again.
    """

    def __init__(self, folder: Path, start: int) -> None:
        self.folder, path = folder, folder / "metrics.jsonl"
        kept = _lines_until(path, start) if path.exists() else []
        with atomic_file(path) as file:
            file.writelines(kept)
        with writing(folder):
            self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        self.events = None
        self.thread_hook, threading.excepthook = threading.excepthook, self._on_thread_error
        try:
            tensorboard = require("torch.utils.tensorboard", "the log for TensorBoard")
        except UserError:
            print("No TensorBoard events: they need tensorboard: pip install tensorboard")
        else:
            with writing(folder):
                self.events = tensorboard.SummaryWriter(str(folder), purge_step=start + 1)

    def write(self, first: int, epoch: int, losses: list[float], scores: dict[str, float]) -> None:
        """Log the losses of step `first` and those after it, and `scores` with the last of them.

        Steps and epochs count from 1. Raises UserError where the disk is full.
        """
        with writing(self.folder):
            for step, loss in enumerate(losses, start=first):
                is_last = step == first + len(losses) - 1
                values = {"loss": loss, **(scores if is_last else {})}
                self.file.write(json.dumps({"step": step, "epoch": epoch, **values}) + "\n")
                for name, value in values.items() if self.events else ():
                    self.events.add_scalar(name, value, step)
            self.file.flush()

    def close(self) -> None:
        try:
            with writing(self.folder):
                self.file.close()
                if self.events:
                    self.events.close()
        finally:
            threading.excepthook = self.thread_hook

    def _on_thread_error(self, args: threading.ExceptHookArgs) -> None:
        """TensorBoard's thread hands its OSError to `write` or `close`: no traceback besides."""
        if not issubclass(args.exc_type, OSError):
            self.thread_hook(args)


def _lines_until(path: Path, step: int) -> list[bytes]:
    lines = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            is_later = json.loads(line)["step"] > step
        except ValueError:  # a kill cut the line short
            break
        if is_later:
            break
        lines.append(line)
    return lines
