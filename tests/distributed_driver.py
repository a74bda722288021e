"""What each process of torchrun does in test_distributed.py: many small runs, one after another.

    torchrun --nproc-per-node 2 tests/distributed_driver.py FOLDER

FOLDER/runs.json lists command lines. The leader writes what the tasks of `RUNS` gave to
FOLDER/results.json. The last line is a run that fails.
"""

import itertools
import json
import math
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from bigkern import cli
from bigkern.train import distributed
from bigkern.train.config import TrainConfig
from bigkern.train.loop import Task, train

BASE = TrainConfig(epochs=2, batch_size=20, lr=0.05, amp=False, device="cpu")
# 41 examples: the last batch of 20 has one, which leaves nothing for the second process.
RUNS = {
    "sgd": replace(BASE, optimizer="sgd", momentum=0.9),
    "torch": replace(BASE, optimizer="torch", accumulate=3),
    "clipped": replace(BASE, max_grad_norm=0.1),
    "uneven": replace(BASE, batch_size=15, accumulate=2),
    "one example a batch": replace(BASE, batch_size=1, epochs=1),
}


def regression(poison: bool = False) -> Task:
    """In float64, so that what differs is no rounding. `poison`: one example's loss is NaN."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(41, 3, dtype=torch.float64, generator=generator)
    y = x.sum(dim=1, keepdim=True).tanh()
    if poison:
        y[7] = math.nan
    return Task(
        name="regression",
        identity={},
        num_examples=len(x),
        build_model=lambda: nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double(),
        batch=lambda indices: (x[indices], y[indices]),
        loss=lambda model, x, y: (model(x) - y).square().mean(),
        evaluate=lambda model: {},
    )


def interrupted_at(step: int) -> Task:
    """In the second process alone."""
    task, steps = regression(), itertools.count(1)

    def batch(indices: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if next(steps) == step and not distributed.leads():
            signal.raise_signal(signal.SIGINT)
        return task.batch(indices)

    return replace(task, batch=batch)


def parameters(model: nn.Module) -> list[float]:
    return nn.utils.parameters_to_vector(model.parameters()).tolist()


def main(folder: Path) -> int:
    torch.set_num_threads(1)
    for line in json.loads((folder / "runs.json").read_text()):
        assert cli.main(line) == 0
    results = {}
    with distributed.processes():
        for name, config in RUNS.items():
            result = train(regression(), config)
            results[name] = {
                "losses": result.losses,
                "parameters": distributed.gather(parameters(result.model)),
            }
        try:
            train(interrupted_at(3), BASE)
        except KeyboardInterrupt as interrupt:
            results["interrupts"] = distributed.gather(str(interrupt))
        results["draws"] = distributed.gather(torch.rand(3).tolist())
        if distributed.leads():
            (folder / "results.json").write_text(json.dumps(results))
    cli.cnn.run = lambda *_: train(regression(poison=True), BASE)
    return cli.main(["train", "cnn", "--device", "cpu"])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
