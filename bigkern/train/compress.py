"""`bigkern compress`: a smaller, faster run out of a trained one."""

import copy
import os
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bigkern.train.checkpoint import RunState, list_checkpoints, save_checkpoint, write_json
from bigkern.train.config import CompressConfig
from bigkern.train.distillation import check_teacher, distillation_task
from bigkern.train.errors import UserError, writing
from bigkern.train.images import ImageSummary
from bigkern.train.loop import Task, check_parameters, train
from bigkern.train.measure import count_numbers, latencies_ms, peak_memory_mib
from bigkern.train.pruning import count_channels, prune_channels_, prune_weights_, zeros_kept
from bigkern.train.quantization import calibrate, quantize_
from bigkern.train.saved import SavedRun, load_run, load_task
from bigkern.train.transformer import TextSummary

BATCH_SIZES = (1, 64)  # whose latency is measured


def compress(folder: Path, out: Path, config: CompressConfig, **moved: str | None) -> None:
    """Compress the run in `folder` as `config` says into the new folder `out`, and print and write
    (`out`/summary.json) what it was before and is after.

    `out` is a run's folder, for `bigkern evaluate`, `predict` and `generate`. It appears when all
    is done: what is interrupted leaves nothing, and starts over (a kill may leave a hidden folder
    beside it). `moved` as for `load_run`.

    Raises UserError where `out` isn't new, the run can't be compressed so, or the teacher differs.
    """
    check_new(out)
    source = load_run(folder, config.device, **moved)
    if source.compression.int8:
        raise UserError(f"{folder} is quantized already: compress the run that it was made of")
    task = load_task(source)
    model, compression, steps = copy.deepcopy(source.model), source.compression, 0
    training_task = task if config.distill is None else taught_task(task, source, config)

    if config.prune is not None:
        if config.prune_unit == "channels":
            prune_channels_(model, config.prune, config.prune_scope)
            compression = replace(compression, channels=count_channels(model))
        else:
            prune_weights_(model, config.prune, config.prune_scope)
    if config.trains:
        steps = fine_tune(model, training_task, source, config)
    if config.quantize is not None:
        ranges = None
        if config.mode == "static":
            ranges = calibrate(model, task, source.config.batch_size, source.config.seed)
        quantize_(model, config.mode, ranges)
        compression = replace(compression, int8=config.mode)

    step = source.step + steps
    compressed = replace(source, model=model, compression=compression, step=step)
    before, after = compare(source, compressed, task)
    write(out, source, compressed, before, after, config)
    print(table(before, after))


def check_new(out: Path) -> None:
    """Raise a UserError unless `out` can be made, or is an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty: change --out")
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out.parent).close()


def taught_task(task: Task, source: SavedRun, config: CompressConfig) -> Task:
    """`task` with the teacher's predictions in its loss."""
    teacher = load_run(Path(config.distill), config.device)
    for name, value in {"task": source.task, **task.identity}.items():
        if (found := teacher.identity.get(name)) != value:
            raise UserError(
                f"the teacher must be of the run's task: its {name} is {found}, not {value}"
            )
    inputs = task.batch(torch.arange(1))[0].to(next(teacher.model.parameters()).device)
    check_teacher(source.model, teacher.model, inputs)
    return distillation_task(task, teacher.model, config.temperature, config.distill_weight)


def fine_tune(model: nn.Module, task: Task, source: SavedRun, config: CompressConfig) -> int:
    """Train `model` in place, as its run did; return the number of steps."""
    how = replace(
        source.config, epochs=config.epochs, lr=config.lr or source.config.lr, device=config.device
    )
    with zeros_kept(model):
        result = train(replace(task, build_model=lambda: model), how)
    steps = len(result.losses)
    check_parameters(model, steps, how, None)
    model.eval()
    return steps


def compare(source: SavedRun, compressed: SavedRun, task: Task) -> list[dict[str, Any]]:
    """What is told of each, but for the size of its file."""
    models = [source.model, compressed.model]
    device = next(source.model.parameters()).device
    indices = torch.arange(max(BATCH_SIZES)) % task.num_examples
    inputs = task.batch(indices)[0].to(device)
    # First: larger batches would leave oneDNN with memory that is then not taken again.
    peaks = [peak_memory_mib(model, inputs) for model in models]
    told = [
        {
            **task.evaluate(model),
            **count_numbers(model),
            "peak_memory_mib": peak,
            "latency_ms": {},
        }
        for model, peak in zip(models, peaks, strict=True)
    ]
    for size in BATCH_SIZES:
        for one, latency in zip(told, latencies_ms(models, inputs[:size]), strict=True):
            one["latency_ms"][str(size)] = latency
    return told


def write(
    out: Path,
    source: SavedRun,
    compressed: SavedRun,
    before: dict[str, Any],
    after: dict[str, Any],
    config: CompressConfig,
) -> None:
    """Make the folder `out`, whole or not at all, and tell `before` and `after` the sizes of the
    checkpoints, without the optimizer's part of them."""
    prefix = f".{out.name}-"
    with writing(out), tempfile.TemporaryDirectory(prefix=prefix, dir=out.parent) as parent:
        before["file_bytes"] = save(source, Path(parent, "source"))
        staging = Path(parent, "compressed")
        after["file_bytes"] = save(compressed, staging)
        how = {"run": os.path.abspath(source.folder), **asdict(config)}
        told = {"task": source.task, **asdict(source.config), "compressed": how}
        write_json(staging / "config.json", told)
        write_json(staging / "summary.json", {"before": before, "after": after})
        os.replace(staging, out)


def save(run: SavedRun, folder: Path) -> int:
    """Save the model of `run`, for `load_run`, in the new `folder`; return the file's size."""
    folder.mkdir()
    identity = {**run.identity, "compression": asdict(run.compression)}
    device = next(run.model.parameters()).device
    save_checkpoint(folder, run.step, RunState(identity, run.config, {"model": run.model}, device))
    return list_checkpoints(folder)[0].stat().st_size


def table(before: dict[str, Any], after: dict[str, Any]) -> str:
    """What `compare` tells, side by side."""
    rows = [
        (title, form.format(before[name]), form.format(after[name]))
        for title, name, form in (*ImageSummary.SCORES, *TextSummary.SCORES)
        if name in before
    ]
    for title, name, show in (
        ("parameters", "parameters", "{:,}".format),
        ("non-zeros", "nonzeros", "{:,}".format),
        ("file (MiB)", "file_bytes", lambda size: f"{size / 2**20:.2f}"),
        (f"peak memory, batch {max(BATCH_SIZES)} (MiB)", "peak_memory_mib", "{:.1f}".format),
    ):
        values = (side[name] for side in (before, after))
        rows.append((title, *("-" if value is None else show(value) for value in values)))
    for size in BATCH_SIZES:
        for statistic in ("median", "p95"):
            values = (side["latency_ms"][str(size)][statistic] for side in (before, after))
            title = f"latency, batch {size}, {statistic} (ms)"
            rows.append((title, *(f"{value:.3f}" for value in values)))
    head = ("", "before", "after")
    return "\n".join(f"{title:32}{a:>14}{b:>14}" for title, a, b in (head, *rows))
