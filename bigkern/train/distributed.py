"""Training by several processes, which torchrun starts.

Each has a replica of the model and a share of every batch; the gradients are summed up over all, so
that they train as one process with the whole batch does. The leader, rank 0, alone shows, logs and
saves. Without torchrun there is one process, and nothing here does anything.
"""

import contextlib
import itertools
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

# The others wait while the leader evaluates and saves. torchrun ends them if it dies.
TIMEOUT = timedelta(days=1)

_uses = itertools.count()


def is_launched() -> bool:
    return dist.is_available() and dist.is_torchelastic_launched()


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Join the processes that torchrun started. All but the leader are silent.

    The first process that fails raises its error, and the others, which then fail for want of it or
    likewise, SystemExit: one message is shown.
    """
    if not is_launched():
        yield
        return
    store, rank, size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"bigkern {next(_uses)}", store)  # addresses of before would hang it
    dist.init_process_group(store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    try:
        with contextlib.ExitStack() as stack:
            if not leads():
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            yield
    except BaseException as error:
        if store.add("failures", 1) > 1:
            raise SystemExit(1) from error
        raise
    dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if is_joined() else 0


def size() -> int:
    return dist.get_world_size() if is_joined() else 1


def is_joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def leads() -> bool:
    return rank() == 0


def command() -> str:
    """What starts bigkern by as many processes."""
    return f"torchrun --nproc-per-node {size()} -m bigkern" if size() > 1 else "bigkern"


def local_gpu() -> str:
    """The GPU of this process among those of its machine."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if is_joined() else "cuda"


def replicate(model: nn.Module) -> nn.Module:
    """`model`, which starts as the leader's, such that backward() averages over the processes."""
    return DistributedDataParallel(model) if size() > 1 else model


def seed_generators(seed: int) -> None:
    """After the model was built: dropout and augmentation draw differently in each process."""
    if rank():
        torch.manual_seed(int(np.random.default_rng([seed, rank()]).integers(2**63)))


def share(indices: Tensor) -> tuple[Tensor, float]:
    """This process's part of a batch's `indices` [B], and how much of the batch it is.

    One that gets none has the first, which counts for nothing: all must take part in the backward.
    """
    part = indices.tensor_split(size())[rank()]
    return (part, len(part) / len(indices)) if len(part) else (indices[:1], 0.0)


def without_exchange(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """A context in which forward and backward leave the gradients to this process."""
    is_replica = isinstance(model, DistributedDataParallel)
    return model.no_sync() if is_replica else contextlib.nullcontext()


def total(values: Tensor) -> Tensor:
    """The sum over the processes."""
    if size() > 1:
        dist.all_reduce(values)
    return values


def any_of(flag: bool) -> bool:
    """Whether it is set in any process."""
    return bool(total(torch.tensor([float(flag)])).item())


def gather(value: Any) -> list[Any]:
    """That of each process, by rank; picklable."""
    values = [value] * size()
    if size() > 1:
        dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def leader_first() -> Iterator[None]:
    """The leader runs the block, and then the others do."""
    if not leads():
        gather(None)
    yield
    if leads():
        gather(None)
