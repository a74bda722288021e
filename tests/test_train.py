"""The training loop and the CNN's task."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import SMALL, parameters, small_task, steps_logged
from torch import nn

from bigkern.train import loop
from bigkern.train.checkpoint import (
    list_checkpoints,
)
from bigkern.train.cnn import build_task, run
from bigkern.train.compare import comparison
from bigkern.train.config import CnnConfig, TrainConfig
from bigkern.train.data import load_digits
from bigkern.train.errors import UserError
from bigkern.train.loop import Task, epoch_order, train
from bigkern.train.setup import learning_rate

pytestmark = pytest.mark.usefixtures("one_thread")


# What the loop computes


def test_gradient_descent_solves_linear_regression():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 1, dtype=torch.float64, generator=generator)
    y = 3 * x - 2 + 0.1 * torch.randn(50, 1, dtype=torch.float64, generator=generator)

    def line():
        model = nn.Linear(1, 1).double()
        nn.init.constant_(model.weight, 0.5)
        nn.init.constant_(model.bias, 0.1)
        return model

    task = Task(
        name="line",
        identity={},
        num_examples=50,
        build_model=line,
        batch=lambda indices: (x[indices], y[indices]),
        loss=lambda model, x, y: (model(x) - y).square().mean(),
        evaluate=lambda model: {},
    )
    config = TrainConfig(
        optimizer="sgd", lr=0.3, batch_size=50, epochs=100, amp=False, device="cpu"
    )
    result = train(task, config)

    error = 0.5 * x + 0.1 - y
    assert result.losses[0] == pytest.approx(error.square().mean().item())
    w1 = 0.5 - 0.3 * (2 * error * x).mean().item()
    after_one = train(task, replace(config, epochs=1)).model
    assert after_one.weight.item() == pytest.approx(w1, rel=1e-12)

    (w, b), *_ = np.linalg.lstsq(np.c_[x.numpy(), np.ones(50)], y.numpy()[:, 0])
    assert result.model.weight.item() == pytest.approx(w, abs=1e-12)
    assert result.model.bias.item() == pytest.approx(b, abs=1e-12)


def test_momentum_and_weight_decay_reach_sgd():
    plain, heavy, decayed = (
        train(small_task(), replace(SMALL, optimizer="sgd", **options)).model
        for options in ({}, {"momentum": 0.9}, {"weight_decay": 0.1})
    )
    assert not torch.equal(parameters(plain), parameters(heavy))
    assert parameters(decayed).norm() < parameters(plain).norm()


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.1}, {"weight_decay": 0.1}])
@pytest.mark.parametrize("amp", [True, False])
def test_bigkern_and_torch_train_alike(options, amp):
    ours, theirs = (
        train(small_task(), replace(SMALL, optimizer=name, amp=amp, **options))
        for name in ("bigkern", "torch")
    )
    # Rounding differs in the last bits; under bfloat16 that can tip the rounding of an activation.
    tolerance = 2**-8 if amp else 1e-5
    torch.testing.assert_close(
        torch.tensor(ours.losses), torch.tensor(theirs.losses), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize(
    ("optimizer", "norm", "limit"),
    [
        ("sgd", 1e-3, 9 * 0.01 * 1e-3),  # 9 steps of lr * norm
        ("torch", 1e-12, 9 * 0.01 * 1e-12 / 1e-8),  # gradients far below Adam's eps
        ("bigkern", 1e-12, 9 * 0.01 * 1e-12 / 1e-8),
    ],
)
def test_max_grad_norm_clips_before_the_step(optimizer, norm, limit):
    config = replace(SMALL, optimizer=optimizer, max_grad_norm=norm)
    torch.manual_seed(config.seed)
    initial = parameters(small_task().build_model())
    moved = (parameters(train(small_task(), config).model) - initial).norm().item()
    assert 0.1 * limit < moved < 1.1 * limit


def test_autocast_covers_forward_and_loss():
    seen = []

    def loss(model, x, y):
        seen.append((torch.is_autocast_enabled("cpu"), model(x).dtype))
        return (model(x) - y).square().mean()

    task = replace(small_task(), loss=loss)
    train(task, replace(SMALL, epochs=1))
    train(task, replace(SMALL, epochs=1, amp=False))
    assert seen == [(True, torch.bfloat16)] * 3 + [(False, torch.float32)] * 3


def test_an_epoch_visits_each_example_once_in_an_order_of_its_own():
    visited = []
    task = small_task()
    train(replace(task, batch=lambda i: visited.append(i) or task.batch(i)), SMALL)
    epochs = [torch.cat(visited[k : k + 3]) for k in (0, 3, 6)]
    assert [len(indices) for indices in visited[:3]] == [16, 16, 8]
    for epoch, order in enumerate(epochs):
        assert order.sort().values.tolist() == list(range(40))
        assert torch.equal(order, epoch_order(40, SMALL.seed, epoch))
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0], epoch_order(40, 1, 0))


def test_the_seed_decides_everything(tmp_path):
    first, again, other = (
        parameters(train(small_task(), replace(SMALL, seed=seed)).model) for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_printed_lines(capsys):
    train(small_task(), replace(SMALL, epochs=2, log_every=2))
    lines = capsys.readouterr().out.splitlines()
    assert [line[: line.index(", L")] for line in lines] == [
        f"Epoch [{epoch}/2], Step [{step}/3]" for epoch in (1, 2) for step in (1, 3)
    ]
    assert float(lines[0].rpartition("Loss: ")[2]) > 0


def test_batch_size_may_be_the_full_set_but_not_more():
    assert len(train(small_task(), replace(SMALL, batch_size=40)).losses) == 3
    with pytest.raises(UserError, match="batch_size must be at most the 40 examples, got 41"):
        train(small_task(), replace(SMALL, batch_size=41))


@pytest.mark.parametrize("device", ["tpu", "mps", "cuda:99", "cpu:x"])
def test_unknown_devices_are_refused(device):
    with pytest.raises(UserError, match=f"device.*{device}"):
        train(small_task(), replace(SMALL, device=device))


def test_unknown_backend_is_refused():
    with pytest.raises(UserError, match="backend must be one of native, triton, got 'opencl'"):
        train(small_task(), replace(SMALL, backend="opencl"))


def test_forced_backend_trains_alike():
    forced = train(small_task(), replace(SMALL, backend="native"))
    assert forced.losses == train(small_task(), SMALL).losses


# The learning rate, and parts of a batch


def test_learning_rate_warms_up_and_falls_along_a_cosine():
    config = TrainConfig(lr=0.5, warmup_steps=4, schedule="cosine")
    rates = [learning_rate(config, step, 24) for step in range(24)]
    assert rates[:5] == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5])
    assert rates[14] == pytest.approx(0.275)  # half way from 0.5 to 0.05
    assert rates[23] == pytest.approx(0.05, rel=0.06)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    constant = replace(config, schedule="constant")
    assert [learning_rate(constant, step, 24) for step in (0, 3, 4, 23)] == [0.125, 0.5, 0.5, 0.5]
    assert learning_rate(TrainConfig(lr=0.3), 0, 5) == 0.3
    assert learning_rate(config, 0, 1) == 0.125


def test_the_learning_rate_reaches_the_optimizer():
    """Gradient descent with a gradient of 1 moves by the learning rates."""
    task = replace(
        small_task(),
        build_model=lambda: nn.Linear(1, 1, bias=False).double(),
        loss=lambda model, x, y: model.weight.sum(),
    )
    config = replace(SMALL, optimizer="sgd", amp=False, warmup_steps=3, schedule="cosine")
    rates = [learning_rate(config, step, 9) for step in range(9)]
    losses = train(task, config).losses
    assert [a - b for a, b in itertools.pairwise(losses)] == pytest.approx(rates[:-1])


@pytest.mark.parametrize("optimizer", ["bigkern", "torch"])
def test_decoupled_weight_decay_is_adamw(optimizer):
    config = replace(SMALL, optimizer=optimizer, weight_decay=0.1, amp=False)
    model = train(small_task(), replace(config, decoupled_weight_decay=True)).model
    real = loop.build_optimizer

    def adamw(config, model, device):
        _, scaler = real(config, model, device)
        return torch.optim.AdamW(model.parameters(), config.lr, weight_decay=0.1), scaler

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "build_optimizer", adamw)
        expected = train(small_task(), config).model
    torch.testing.assert_close(parameters(model), parameters(expected))
    other = train(small_task(), config).model
    assert not torch.allclose(parameters(model), parameters(other))


# The CNN


@pytest.fixture(scope="module")
def digits_run():
    return run(CnnConfig(device="cpu"))


def test_default_run_learns_the_digits(digits_run):
    assert digits_run.test_accuracy > 0.95
    assert digits_run.train_accuracy > 0.98
    assert len(digits_run.losses) == 230
    assert digits_run.losses[0] == pytest.approx(math.log(10), abs=0.1)
    assert digits_run.ms_per_step > 0
    assert digits_run.per_second == pytest.approx(64e3 / digits_run.ms_per_step)
    assert 50 < digits_run.peak_memory_mib < 20_000


def test_cnn_losses_agree_with_torch():
    data = load_digits()
    config = CnnConfig(epochs=1, device="cpu", amp=False)
    ours, theirs = (
        train(build_task(c, data), c).losses for c in (config, replace(config, optimizer="torch"))
    )
    assert ours == pytest.approx(theirs, rel=1e-3)


def test_comparison_shows_the_largest_difference(digits_run):
    losses = list(digits_run.losses)
    losses[41] += 0.5
    text = comparison(digits_run, replace(digits_run, losses=losses, ms_per_step=None))
    assert "largest difference of the losses: 5.00e-01 at step 42" in text
    assert text.splitlines()[1].split()[-1] == "-"


# Losses and parameters that are not finite


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    task = small_task()

    def loss(model, x, y):
        losses.append(task.loss(model, x, y))
        return losses[-1] * (math.nan if len(losses) == 5 else 1)

    losses = []
    with pytest.raises(UserError, match=r"loss is nan at step 5.*lower --lr.*--max-grad-norm") as e:
        train(replace(task, loss=loss), SMALL, tmp_path)
    assert "checkpoint-00000003.pt" in str(e.value)
    assert list_checkpoints(tmp_path)[0].name == "checkpoint-00000003.pt"
    assert steps_logged(tmp_path) == [1, 2, 3, 4]


def test_parameters_that_are_not_finite_are_never_saved(tmp_path):
    config = replace(SMALL, optimizer="sgd", amp=False, save_every=1, lr=3e38)
    task = small_task()
    steep = replace(task, loss=lambda model, x, y: 1000 * task.loss(model, x, y))
    with pytest.raises(UserError, match="not finite after step 1: training stopped"):
        train(steep, config, tmp_path)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-00000000.pt"]
