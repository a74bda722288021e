"""What a model costs: numbers, bytes, time."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from bigkern.nn.compare import peak_bytes, seconds_of_call, size_bytes

WARM_UP_CALLS = 2
MIN_CALLS, MAX_CALLS = 10, 500
SECONDS = 1.0  # of calls of one model


def count_numbers(model: nn.Module) -> dict[str, int]:
    """Those in the state_dict of `model`, scales of INT8 layers too, and how many aren't 0."""
    tensors = model.state_dict().values()
    return {
        "parameters": sum(x.numel() for x in tensors),
        "nonzeros": sum(int(x.count_nonzero()) for x in tensors),
    }


@torch.no_grad()
def latencies_ms(models: Sequence[nn.Module], inputs: Tensor) -> list[dict[str, float]]:
    """The median and the 95th percentile of the time that each model takes for `inputs`.

    They are called in turn, so that whatever else the machine does meets them alike.
    """
    for model in models:
        for _ in range(WARM_UP_CALLS):
            seconds_of_call(model, inputs)
    taken, total = [], 0.0
    while len(taken) < MIN_CALLS or (len(taken) < MAX_CALLS and total < SECONDS * len(models)):
        taken.append([seconds_of_call(model, inputs) for model in models])
        total += sum(taken[-1])
    return [
        {"median": 1e3 * float(np.median(times)), "p95": 1e3 * float(np.percentile(times, 95))}
        for times in np.array(taken).T
    ]


@torch.no_grad()
def peak_memory_mib(model: nn.Module, inputs: Tensor) -> float | None:
    """The weights of `model`, and what a call takes beyond them and its result at its peak; None
    where that can't be told: on the CPU, elsewhere than on Linux."""
    model(inputs)
    peak = peak_bytes(model, inputs)
    return None if peak is None else (size_bytes(model) + peak) / 2**20
