"""A whole step of `bigkern train cnn`, with bigkern's Adam and with torch's fused one.

python benchmarks/bench_train.py [--device cuda] [--save]
"""

import sys

import pytest
import torch
from common import alternate, main

from bigkern.train.cnn import build_task
from bigkern.train.config import CnnConfig
from bigkern.train.data import load_data
from bigkern.train.loop import train_step
from bigkern.train.setup import build_optimizer


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_train_cnn(benchmark, device, max_grad_norm):
    contenders = {}
    for name in ("bigkern", "torch"):
        config = CnnConfig(optimizer=name, device=device, max_grad_norm=max_grad_norm)
        task = build_task(config, load_data(config))
        torch.manual_seed(config.seed)
        model = task.build_model().to(device)
        optimizer, scaler = build_optimizer(config, model, torch.device(device))
        batch = [tensor.to(device) for tensor in task.batch(torch.arange(config.batch_size))]
        step = (task, config, batch, model, optimizer, scaler)
        contenders["torch fused" if name == "torch" else name] = lambda step=step: train_step(*step)
    alternate(benchmark, contenders, device)
    benchmark.extra_info["set"] = "clipped" if max_grad_norm else "not clipped"


def tables(benchmarks, device):
    lines = [
        "",
        "| step of `train cnn` | | ms (quartiles) | torch fused / this |",
        "|---|---|---|---|",
    ]
    for benchmark in benchmarks:
        info = benchmark["extra_info"]
        fused = info["quartiles_ms"]["torch fused"][1]
        for contender, (low, median, high) in info["quartiles_ms"].items():
            times = f"{median:.2f} ({low:.2f}..{high:.2f})"
            lines.append(f"| {info['set']} | {contender} | {times} | {fused / median:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(__file__, tables))
