"""A whole training step of the CNN and of the Transformer: bigkern's attention and Adam against
torch's SDPA and fused Adam in the same loop.

python benchmarks/bench_train.py [--device cuda] [--save]
"""

import ctypes
import gc
import statistics
import sys

import pytest
import torch
from common import alternate, main, sample, skip_slow_bfloat16, skip_without_kernels

from bigkern.testing import memory_beyond_results
from bigkern.train.cnn import build_task
from bigkern.train.config import CnnConfig, TransformerTrainConfig
from bigkern.train.data import load_data
from bigkern.train.loop import compute_gradients, train_step, update_parameters
from bigkern.train.setup import build_optimizer
from bigkern.train.text import load_text
from bigkern.train.transformer import text_task

SIZES = {
    "default": {},
    "context 1,024": {
        "context": 1024, "batch_size": 1, "dim": 512, "num_heads": 8, "num_blocks": 6
    },
}  # fmt: skip
ATTENTION = ("bigkern::attention", "scaled_dot_product")


class Contender:
    """A model, its optimizer and a batch, in the training loop's own functions."""

    def __init__(self, config, task, device, compiled=False):
        self.config, self.task = config, task
        torch.manual_seed(config.seed)
        self.model = task.build_model().to(device)
        self.optimizer, self.scaler = build_optimizer(config, self.model, torch.device(device))
        if compiled:
            self.model = torch.compile(self.model)
        self.batch = [tensor.to(device) for tensor in task.batch(torch.arange(config.batch_size))]

    def step(self):
        return train_step(
            self.task, self.config, self.batch, self.model, self.optimizer, self.scaler
        )

    def update(self):
        update_parameters(self.config, self.model, self.optimizer, self.scaler)

    def optimizer_ms(self, device):
        """What is done once the gradients are there: unscale, clip, step."""
        compute_gradients(self.task, self.config, self.batch, self.model, self.scaler)
        times = [sample(self.update, 1, device) for _ in range(7)]
        self.optimizer.zero_grad()
        return 1e3 * statistics.median(times)

    def attention_ms(self):
        """Of a step, by the profiler."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            self.step()
        found = {e.key: e for e in profile.key_averages() if any(a in e.key for a in ATTENTION)}
        inner = [e for key, e in found.items() if "flash" in key or "bigkern::" in key]
        return sum(e.cpu_time_total for e in inner) / 1e3

    def peak_mib(self):
        """Of a step, beyond the model, its optimizer's state and the batch."""
        if self.batch[0].is_cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.step()
            return (torch.cuda.max_memory_allocated() - before) / 2**20
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what another contender has left
        return memory_beyond_results(lambda: [self.step()]) / 2**20


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_train_cnn(benchmark, device, max_grad_norm):
    contenders = {}
    for name in ("bigkern", "torch"):
        config = CnnConfig(optimizer=name, device=device, max_grad_norm=max_grad_norm)
        contender = Contender(config, build_task(config, load_data(config)), device)
        contenders["torch fused" if name == "torch" else name] = contender.step
    alternate(benchmark, contenders, device)
    benchmark.extra_info["set"] = "clipped" if max_grad_norm else "not clipped"


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("size", SIZES)
def test_train_transformer(benchmark, device, size, amp):
    skip_without_kernels("attention", device)
    if amp:
        skip_slow_bfloat16(device)
    text = load_text(None, SIZES[size].get("context", 256))
    contenders = {}
    for name in ("bigkern", "torch"):
        config = TransformerTrainConfig(
            optimizer=name, attention=name, device=device, amp=amp, **SIZES[size]
        )
        for compiled in (False, True):
            contender = Contender(config, text_task(config, text), device, compiled)
            contenders[f"{name}, compiled" if compiled else name] = contender
    steps = {name: contender.step for name, contender in contenders.items()}
    alternate(benchmark, steps, device, rounds=5)
    benchmark.extra_info |= {
        "set": f"Transformer, {size}, {'autocast' if amp else 'float32'}",
        "tokens": config.batch_size * config.context,
        "optimizer_ms": {name: c.optimizer_ms(device) for name, c in contenders.items()},
        "attention_ms": {name: c.attention_ms() for name, c in contenders.items()},
        "peak_mib": {name: c.peak_mib() for name, c in contenders.items()},
    }


def tables(benchmarks, device):
    lines = [
        "",
        "| step of `train cnn` | | ms (quartiles) | torch fused / this |",
        "|---|---|---|---|",
    ]
    for info in (b["extra_info"] for b in benchmarks if "tokens" not in b["extra_info"]):
        fused = info["quartiles_ms"]["torch fused"][1]
        for contender, (low, median, high) in info["quartiles_ms"].items():
            times = f"{median:.2f} ({low:.2f}..{high:.2f})"
            lines.append(f"| {info['set']} | {contender} | {times} | {fused / median:.2f} |")
    lines += [
        "",
        "| step of `train transformer` | | ms (quartiles) | tokens/s | peak MiB | attention | "
        "optimizer | rest | torch / this |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for info in (b["extra_info"] for b in benchmarks if "tokens" in b["extra_info"]):
        times = {name: quartiles[1] for name, quartiles in info["quartiles_ms"].items()}
        for name, (low, median, high) in info["quartiles_ms"].items():
            attention, optimizer = info["attention_ms"][name], info["optimizer_ms"][name]
            reference = times["torch, compiled" if "compiled" in name else "torch"]
            cells = (
                info["set"],
                name,
                f"{median:.0f} ({low:.0f}..{high:.0f})",
                f"{1e3 * info['tokens'] / median:,.0f}",
                f"{info['peak_mib'][name]:.0f}",
                *(f"{x / median:.0%}" for x in (attention, optimizer)),
                f"{(median - attention - optimizer) / median:.0%}",
                f"{reference / median:.2f}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(__file__, tables))
