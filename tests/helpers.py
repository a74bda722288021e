"""Problems that several test files share."""

import itertools
import json
import signal

import torch
from torch import nn

import bigkern
from bigkern.train import checkpoint
from bigkern.train.config import TrainConfig
from bigkern.train.loop import Task

HALVES = [torch.float16, torch.bfloat16]
DTYPES = [torch.float32, torch.float64, *HALVES]
SHAPES = [(1,), (7,), (127,), (1000,), (0,), (3, 5, 2, 2), (4097,), (65, 129), ()]
OPTIONS = {"lr": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}

# 1e-8 is 0 in float16, with which plain PyTorch, the baseline, divides by 0.
EPS = dict.fromkeys(DTYPES, 1e-8) | {torch.float16: 1e-4}


class Problem:
    """Parameters, gradients and states of a group, all in `dtype` unless said otherwise."""

    def __init__(self, dtype, device="cpu", shapes=SHAPES, state_dtype=None, master=False, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.generator, self.device = generator, device
        self.params = [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]
        self.grads = [torch.empty_like(p) for p in self.params]
        state_dtype = state_dtype or dtype
        self.exp_avgs = [torch.zeros_like(p, dtype=state_dtype) for p in self.params]
        self.exp_avg_sqs = [torch.zeros_like(p, dtype=state_dtype) for p in self.params]
        self.max_exp_avg_sqs = [torch.zeros_like(p, dtype=state_dtype) for p in self.params]
        self.steps = [torch.zeros((), device=device) for _ in self.params]
        self.masters = [p.float() for p in self.params] if master else []
        self.new_grads()

    def new_grads(self):
        for g in self.grads:
            g.copy_(torch.randn(g.shape, generator=self.generator))

    def lists(self, amsgrad=False):
        return (
            self.params,
            self.grads,
            self.exp_avgs,
            self.exp_avg_sqs,
            self.max_exp_avg_sqs if amsgrad else [],
            self.steps,
            self.masters,
        )

    def tensors(self):
        return [*itertools.chain.from_iterable(self.lists(amsgrad=True))]

    def to(self, dtype):
        other = Problem(dtype, self.device, [p.shape for p in self.params])
        for mine, theirs in zip(self.lists(True)[:6], other.lists(True)[:6], strict=True):
            for a, b in zip(mine, theirs, strict=True):
                b.copy_(a)
        other.masters = [m.to(dtype, copy=True) for m in self.masters]
        return other


PAIRS = [
    (bigkern.optim.Adam, torch.optim.Adam),
    (bigkern.optim.AdamW, torch.optim.AdamW),
]


def make_params(device="cpu", dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(7,), (12, 33), (0,), (3, 5, 2, 2), ()]
    params = [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]
    return [p.requires_grad_() for p in params]


def set_grads(*param_lists, step=0):
    generator = torch.Generator().manual_seed(1000 + step)
    for group in zip(*param_lists, strict=True):
        grad = torch.randn(group[0].shape, generator=generator)
        for p in group:
            p.grad = grad.to(p.device, p.dtype).clone()


def assert_close(xs, ys):
    for x, y in zip(xs, ys, strict=True):
        torch.testing.assert_close(x.detach(), y.detach(), check_device=False)


def run(optimizers, param_lists, steps, start=0):
    for step in range(start, start + steps):
        set_grads(*param_lists, step=step)
        for optimizer in optimizers:
            optimizer.step()


SMALL = TrainConfig(epochs=3, batch_size=16, lr=0.01, device="cpu")  # 3 steps an epoch


def small_task(on_step=lambda step: None):
    """A regression on 40 examples that draws random numbers in its batches and its model."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, generator=generator)
    y = x.sum(dim=1, keepdim=True)
    counter = itertools.count(1)

    def batch(indices):
        on_step(next(counter))
        return x[indices] + 0.01 * torch.randn(len(indices), 3), y[indices]

    return Task(
        name="small",
        identity={"model": "small"},
        num_examples=40,
        build_model=lambda: nn.Sequential(
            nn.Linear(3, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 1)
        ),
        batch=batch,
        loss=lambda model, x, y: (model(x) - y).square().mean(),
        evaluate=lambda model: {"training_mode": float(model.training)},
    )


def interrupt_at(step):
    return small_task(lambda n: signal.raise_signal(signal.SIGINT) if n == step else None)


def parameters(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def steps_logged(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def rewrite_checkpoint(source, folder, change):
    """Put the checkpoint `source` into `folder` once more, its state changed by `change`."""
    state = checkpoint.load_checkpoint(source)
    change(state)
    with checkpoint.atomic_file(folder / source.name) as file:
        hashing = checkpoint._HashingFile(file)
        torch.save(state, hashing)
        file.write(checkpoint.SEAL + hashing.sha256.hexdigest().encode())


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
