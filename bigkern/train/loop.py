"""The training loop. It knows no model: a `Task` brings data, model, loss and scores."""

import contextlib
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bigkern.train import distributed
from bigkern.train.checkpoint import RunState, list_checkpoints, open_run, save_checkpoint
from bigkern.train.config import TrainConfig
from bigkern.train.console import interrupt_flag, progress
from bigkern.train.errors import UserError
from bigkern.train.metrics import MetricsLog, peak_memory_mib
from bigkern.train.setup import build_optimizer, forced_backend, learning_rate, pick_device

AMP_DTYPE = {"cpu": torch.bfloat16, "cuda": torch.float16}


@dataclass
class Task:
    """What is trained."""

    name: str  # as in `bigkern train <name>`
    identity: dict[str, Any]  # plain values: a checkpoint that has others is another task's
    num_examples: int
    build_model: Callable[[], nn.Module]
    batch: Callable[[Tensor], tuple[Tensor, ...]]  # indices [B] int64 -> tensors on the CPU
    loss: Callable[..., Tensor]  # (model, *batch) -> mean loss of the examples, scalar
    evaluate: Callable[[nn.Module], dict[str, float]]  # scores to log after each epoch


@dataclass
class TrainResult:
    model: nn.Module
    losses: list[float]  # of each step that this process ran
    ms_per_step: float | None  # median, without the first step, evaluation and saving
    peak_memory_mib: float


def train(
    task: Task, config: TrainConfig, out: Path | None = None, resume: bool = False
) -> TrainResult:
    """Train a new model, or go on with the run in the folder `out` (`resume`).

    On the CPU `task` and `config` alone decide the parameters, however often the run is stopped.
    The loss is printed at the first step of each epoch and every `log_every` steps after it. `out`
    receives config, metrics and checkpoints.

    The processes of torchrun share each batch (see bigkern.train.distributed), and all of them see
    `out`. So many again resume to the same parameters.

    Raises UserError where the loss is not finite or `out` can't be written or resumed, and, after
    Ctrl-C or SIGTERM and once the step is done and saved, KeyboardInterrupt.
    """
    if config.batch_size > task.num_examples:
        raise UserError(
            f"batch_size must be at most the {task.num_examples} examples, got {config.batch_size}"
        )
    device, backend = pick_device(config.device), forced_backend(config.backend)
    torch.manual_seed(config.seed)
    model = task.build_model().to(device)
    distributed.seed_generators(config.seed)
    optimizer, scaler = build_optimizer(config, model, device)
    run = RunState(
        identity={"task": task.name, **config.fixed(), **task.identity},
        config=config,
        parts={"model": model, "optimizer": optimizer, "scaler": scaler},
        device=device,
    )
    start = open_run(out, run, resume) if out else 0
    trained = {**run.parts, "model": distributed.replicate(model)}
    logs = out is not None and distributed.leads()

    steps_per_epoch = math.ceil(task.num_examples / config.batch_size)
    total_steps = config.epochs * steps_per_epoch
    losses: list[float] = []
    unread: list[Tensor] = []  # losses still on the device: reading one waits for a GPU
    step_seconds: list[float] = []  # the first step, which warms up, is left out
    tic = None
    model.train()
    with (
        backend,
        contextlib.closing(MetricsLog(out, start)) if logs else contextlib.nullcontext() as log,
        progress(start, total_steps) as (say, advance),
        interrupt_flag() as interrupted,
    ):
        for step in range(start, total_steps):
            epoch, i = divmod(step, steps_per_epoch)
            if i == 0 or step == start:
                order = epoch_order(task.num_examples, config.seed, epoch)  # [num_examples]
            indices = order[i * config.batch_size : (i + 1) * config.batch_size]  # [B]
            indices, weight = distributed.share(indices)
            batch = [tensor.to(device) for tensor in task.batch(indices)]
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step, total_steps)
            unread.append(train_step(task, config, batch, weight=weight, **trained))
            advance()
            prints = i % config.log_every == 0
            ends_epoch = i + 1 == steps_per_epoch
            stops = distributed.any_of(interrupted.is_set())
            saves = ends_epoch or stops or (step + 1) % config.save_every == 0
            if device.type == "cuda" and not (prints or saves or step == start):
                continue

            values = distributed.total(torch.stack(unread)).tolist()
            unread.clear()
            if tic:
                step_seconds.append((time.perf_counter() - tic) / len(values))
            losses += values
            first = step + 2 - len(values)  # values[0] is of this step, counted from 1
            check_losses(values, first, config, out)
            if prints:
                place = f"Epoch [{epoch + 1}/{config.epochs}], Step [{i + 1}/{steps_per_epoch}]"
                say(f"{place}, Loss: {values[-1]:.4f}")
            if log:
                scores = evaluate(task, model) if ends_epoch else {}
                log.write(first, epoch + 1, values, scores)
            if out and saves:
                check_parameters(model, step + 1, config, out)
                save_checkpoint(out, step + 1, run)
            if stops:
                command = f"{distributed.command()} train {task.name}"
                hint = f"go on with: {command} --resume {out}" if out else "not saved"
                raise KeyboardInterrupt(f"stopped after step {step + 1}; {hint}")
            tic = time.perf_counter()
    return TrainResult(
        model=model,
        losses=losses,
        ms_per_step=1e3 * statistics.median(step_seconds) if step_seconds else None,
        peak_memory_mib=peak_memory_mib(device),
    )


def train_step(
    task: Task,
    config: TrainConfig,
    batch: list[Tensor],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    weight: float = 1.0,
) -> Tensor:
    """One step on `batch`, on the model's device; returns the loss, a scalar on that device, times
    `weight`: this process's part of the whole batch."""
    loss = compute_gradients(task, config, batch, model, scaler, weight)
    update_parameters(config, model, optimizer, scaler)
    optimizer.zero_grad()
    return loss


def compute_gradients(
    task: Task,
    config: TrainConfig,
    batch: list[Tensor],
    model: nn.Module,
    scaler: torch.amp.GradScaler,
    weight: float = 1.0,
) -> Tensor:
    """Add the gradients of the mean loss on the whole batch, scaled, to the parameters' .grad; see
    train_step."""
    device, size = batch[0].device.type, len(batch[0])
    losses = []
    parts = list(zip(*(x.chunk(config.accumulate) for x in batch), strict=True))
    for i, part in enumerate(parts, start=1):
        waits = i < len(parts)
        with distributed.without_exchange(model) if waits else contextlib.nullcontext():
            with torch.autocast(device, AMP_DTYPE[device], enabled=config.amp):
                loss = task.loss(model, *part) * (weight * len(part[0]) / size)
            # Over the processes the gradients are averaged, and are to be summed up.
            scaler.scale(loss * distributed.size()).backward()
        losses.append(loss.detach())
    return sum(losses[1:], losses[0])


def update_parameters(
    config: TrainConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> None:
    """Unscale, clip and step, by the parameters' .grad."""
    if config.max_grad_norm is not None and config.optimizer != "bigkern":
        scaler.unscale_(optimizer)  # bigkern's clips inside its kernel
        nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    scaler.step(optimizer)
    scaler.update()


def epoch_order(num_examples: int, seed: int, epoch: int) -> Tensor:
    """The order [num_examples] int64 of the examples in an epoch, from these numbers alone."""
    return torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(num_examples))


def evaluate(task: Task, model: nn.Module) -> dict[str, float]:
    model.eval()
    scores = task.evaluate(model)
    model.train()
    return scores


def check_losses(values: list[float], first: int, config: TrainConfig, out: Path | None) -> None:
    """Raise UserError if one of `values`, those of step `first` and after, isn't finite."""
    for step, value in enumerate(values, start=first):
        if not math.isfinite(value):
            raise diverged(f"the loss is {value} at step {step}", config, out)


def check_parameters(model: nn.Module, step: int, config: TrainConfig, out: Path | None) -> None:
    """Raise UserError if a parameter isn't finite, so that such a model is never saved."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise diverged(f"{name} is not finite after step {step}", config, out)


def diverged(what: str, config: TrainConfig, out: Path | None) -> UserError:
    remedies = [f"a lower --lr than {config.lr:g}"]
    remedies += ["--max-grad-norm 1"] if config.max_grad_norm is None else []
    remedies += ["--no-amp"] if config.amp else []
    saved = list_checkpoints(out) if out else []
    last_good = f"; the last good checkpoint is {saved[0]}" if saved else ""
    return UserError(f"{what}: training stopped. Try {', '.join(remedies)}{last_good}")
