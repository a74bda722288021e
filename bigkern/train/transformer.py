"""`bigkern train transformer`: a language model of bytes, or the digits row by row."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigkern.models import Transformer
from bigkern.train import compare as side_by_side
from bigkern.train import distributed
from bigkern.train.compare import Summary
from bigkern.train.config import VOCAB_SIZE, TransformerTrainConfig
from bigkern.train.data import ImageData, load_digits
from bigkern.train.images import image_task, run_task
from bigkern.train.loop import Task, train
from bigkern.train.text import Text, load_text

EVALUATION_BATCH = 16


@dataclass
class TextSummary(Summary):
    validation_loss: float
    bits_per_byte: float

    UNIT = "tokens"
    SCORES = (
        ("validation loss", "validation_loss", "{:.4f}"),
        ("bits per byte", "bits_per_byte", "{:.4f}"),
    )


class RowsTransformer(Transformer):
    """Classifies images [N, 1, 28, 28], read as sequences of pixel rows."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.squeeze(1))  # [N, 10]


def build_model(config: TransformerTrainConfig) -> Transformer:
    model_class = RowsTransformer if config.objective == "classify" else Transformer
    return model_class(config.model())


def rows_task(config: TransformerTrainConfig, data: ImageData) -> Task:
    """The task of classifying `data`, for `train`."""
    return image_task("transformer", "Transformer", lambda: build_model(config), data)


def text_task(config: TransformerTrainConfig, text: Text) -> Task:
    """The task of predicting each byte of `text` from those before it, for `train`."""
    windows = cut(text.train, config.context)

    def batch(indices: Tensor) -> tuple[Tensor, Tensor]:
        rows = windows[indices].long()  # [B, context + 1]
        return rows[:, :-1], rows[:, 1:]

    return Task(
        name="transformer",
        identity={"model": "Transformer", "vocab_size": VOCAB_SIZE, "text": text.digest},
        num_examples=len(windows),
        build_model=lambda: build_model(config),
        batch=batch,
        loss=text_loss,
        evaluate=lambda model: text_scores(model, text.validation),
    )


def cut(text: Tensor, context: int) -> Tensor:
    """Views [N, context + 1] of `text`, each of which starts with the end of the one before it."""
    return text.unfold(0, context + 1, context)


def text_loss(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """The mean over all bytes, in nats."""
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())


@torch.no_grad()
def text_scores(model: Transformer, text: Tensor) -> dict[str, float]:
    """Of `text` [N], cut into sequences as long as the context."""
    device = model.head.bias.device
    total = 0.0
    windows = cut(text, model.config.context)
    for chunk in windows.split(EVALUATION_BATCH):
        rows = chunk.to(device).long()  # [B, context + 1]
        total += text_loss(model, rows[:, :-1], rows[:, 1:]).item() * len(rows)
    loss = total / len(windows)
    return {"validation_loss": loss, "bits_per_byte": loss / math.log(2)}


def show_scores(scores: dict[str, float]) -> None:
    print(
        f"Validation loss: {scores['validation_loss']:.4f}, "
        f"{scores['bits_per_byte']:.4f} bits per byte"
    )


def run(
    config: TransformerTrainConfig, out: Path | None = None, resume: bool = False
) -> Summary | None:
    """Train as `config` says, print the report, and write it to `out`/summary.json. Of several
    processes the leader alone reports."""
    if config.objective == "classify":
        data = load_digits()
        return run_task(rows_task(config, data), config, data, out, resume)
    text = load_text(config.text, config.context)
    print(f"Text: {len(text.train):,} bytes to train on, {len(text.validation):,} held out")
    result = train(text_task(config, text), config, out, resume)
    if not distributed.leads():
        return None
    result.model.eval()
    scores = text_scores(result.model, text.validation)
    show_scores(scores)
    tokens_per_step = config.batch_size * config.context
    summary = TextSummary(
        losses=result.losses,
        ms_per_step=result.ms_per_step,
        per_second=result.ms_per_step and 1e3 * tokens_per_step / result.ms_per_step,
        peak_memory_mib=result.peak_memory_mib,
        **scores,
    )
    summary.show(out)
    return summary


def compare(config: TransformerTrainConfig, out: Path | None = None) -> None:
    """Run the same training with bigkern's attention and Adam and with torch's, and print both side
    by side."""
    ours = replace(config, optimizer="bigkern", attention="bigkern")
    theirs = replace(config, optimizer="torch", attention="torch", backend=None)
    side_by_side.compare(run, ours, theirs, out)
