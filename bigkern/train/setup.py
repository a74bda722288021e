"""From the options' names to devices, optimizers and backends."""

import contextlib
import math
from contextlib import AbstractContextManager

import torch
from torch import nn

from bigkern import amp, backends, optim
from bigkern.train import distributed
from bigkern.train.config import TrainConfig
from bigkern.train.errors import UserError


def pick_device(name: str) -> torch.device:
    """The device `name` (auto: CUDA where there is one). Raises UserError if it isn't here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = distributed.local_gpu()
    elif name.startswith("cuda") and distributed.size() > 1:
        raise UserError(f"device must be auto, cpu or cuda for several processes, got {name!r}")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name} isn't here: torch sees {torch.cuda.device_count()} GPUs")
    if device.type == "cuda" and distributed.is_joined():
        torch.cuda.set_device(device)  # which NCCL communicates from
    return device


def build_optimizer(
    config: TrainConfig, model: nn.Module, device: torch.device
) -> tuple[torch.optim.Optimizer, torch.amp.GradScaler]:
    """The optimizer that `config` names and its GradScaler, which is idle without amp."""
    params, lr = model.parameters(), config.lr
    decay = {"weight_decay": config.weight_decay}
    if config.optimizer != "sgd":
        decay["decoupled_weight_decay"] = config.decoupled_weight_decay
    scaler_class = torch.amp.GradScaler
    if config.optimizer == "bigkern":
        optimizer = optim.Adam(params, lr, max_grad_norm=config.max_grad_norm, **decay)
        scaler_class = amp.GradScaler
    elif config.optimizer == "torch":
        optimizer = torch.optim.Adam(params, lr, fused=True, **decay)
    else:
        optimizer = torch.optim.SGD(params, lr, config.momentum, **decay)
    return optimizer, scaler_class(device.type, enabled=config.amp)


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """That of `step`, counted from 0."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)  # in [0, 1)
    return config.lr * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)


def forced_backend(name: str | None) -> AbstractContextManager[None]:
    """A context in which bigkern's ops run on backend `name`, if one is given, or not at all.

    Raises UserError for one that doesn't exist. One that lacks an op raises NotImplementedError
    when this op is called.
    """
    if name is None:
        return contextlib.nullcontext()
    if name not in backends.NAMESPACES:
        raise UserError(f"backend must be one of {', '.join(backends.NAMESPACES)}, got {name!r}")
    return backends.use(name)
