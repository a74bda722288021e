"""The training loop: what it computes, and that neither a kill nor a bad disk breaks a run."""

import errno
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from bigkern.cli import main
from bigkern.train import checkpoint, metrics
from bigkern.train.checkpoint import (
    CheckpointError,
    atomic_file,
    list_checkpoints,
    load_checkpoint,
    load_latest,
)
from bigkern.train.cnn import build_task, comparison, run
from bigkern.train.config import OPTIMIZERS, CnnConfig, TrainConfig, read_config
from bigkern.train.data import load_digits
from bigkern.train.errors import UserError
from bigkern.train.loop import Task, epoch_order, train

SMALL = TrainConfig(epochs=3, batch_size=16, lr=0.01, device="cpu")  # 3 steps an epoch


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Two threads wait for each other long on a busy machine, and these models gain little."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
    assert digits_run.images_per_second == pytest.approx(64e3 / digits_run.ms_per_step)
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


# Stopping and going on


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("stop", [1, 3, 4, 8])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, optimizer, stop):
    momentum = 0.9 if optimizer == "sgd" else 0.0
    config = replace(SMALL, optimizer=optimizer, momentum=momentum)
    whole = train(small_task(), config)
    with pytest.raises(KeyboardInterrupt, match=f"stopped after step {stop}; .*--resume"):
        train(interrupt_at(stop), config, tmp_path)
    assert steps_logged(tmp_path) == list(range(1, stop + 1))

    rest = train(small_task(), config, tmp_path, resume=True)
    assert torch.equal(parameters(rest.model), parameters(whole.model))
    assert rest.losses == whole.losses[stop:]
    assert steps_logged(tmp_path) == list(range(1, 10))


def test_ctrl_c_without_out_says_that_nothing_is_saved():
    with pytest.raises(KeyboardInterrupt, match="stopped after step 2; not saved"):
        train(interrupt_at(2), SMALL)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_going_on_with_a_finished_run_trains_no_more(tmp_path):
    whole = train(small_task(), SMALL, tmp_path)
    again = train(small_task(), SMALL, tmp_path, resume=True)
    assert torch.equal(parameters(again.model), parameters(whole.model))
    assert again.losses == []
    assert again.ms_per_step is None
    longer = train(small_task(), replace(SMALL, epochs=4), tmp_path, resume=True)
    assert len(longer.losses) == 3
    assert steps_logged(tmp_path) == list(range(1, 13))


def test_the_scaler_goes_on(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(interrupt_at(4), SMALL, tmp_path)
    scaler = load_latest(tmp_path, lambda path, state: state["scaler"])
    assert scaler["_growth_tracker"] == 4
    train(small_task(), SMALL, tmp_path, resume=True)
    scaler = load_latest(tmp_path, lambda path, state: state["scaler"])
    assert scaler["_growth_tracker"] == 9


def test_a_run_killed_before_its_first_checkpoint_starts_anew(tmp_path):
    whole = train(small_task(), SMALL, tmp_path)
    for path in list_checkpoints(tmp_path):
        path.unlink()
    again = train(small_task(), SMALL, tmp_path, resume=True)
    assert torch.equal(parameters(again.model), parameters(whole.model))
    assert steps_logged(tmp_path) == list(range(1, 10))


CNN_OPTIONS = ["--batch-size", "256", "--epochs", "2", "--save-every", "2", "--device", "cpu"]
# Runs the command line, but kills the process between writing checkpoint 8 and giving it its name.
KILLED_WHILE_SAVING = """
import os, signal, sys
from bigkern import cli
real_replace = os.replace
def replace(source, target):
    if "checkpoint-00000008" in str(target):
        os.kill(os.getpid(), signal.SIGKILL)
    real_replace(source, target)
os.replace = replace
cli.main(sys.argv[1:])
"""


def test_killed_runs_go_on_bit_for_bit(tmp_path):
    augment = []
    try:
        import torchvision  # noqa: F401

        augment = ["--augment"]
    except ImportError:
        pass
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    python = [sys.executable, "-m", "bigkern"]
    command = ["train", "cnn", *CNN_OPTIONS, *augment, "--out"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    quiet = {"stdout": subprocess.DEVNULL, "env": environment}
    assert main([*command, str(whole)]) == 0

    # A kill at some step after the second ...
    with subprocess.Popen([*python, *command, str(killed)], **quiet) as process:
        log = killed / "metrics.jsonl"
        while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= 3):
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    # ... and one in the middle of saving.
    resume = ["train", "cnn", "--resume", str(killed)]
    died = subprocess.run([sys.executable, "-c", KILLED_WHILE_SAVING, *resume], **quiet)
    assert died.returncode == -signal.SIGKILL
    assert (killed / "checkpoint-00000008.pt.tmp").exists()
    assert len(list_checkpoints(killed)) == 2

    subprocess.run([*python, *resume], check=True, **quiet)
    final, expected = (load_latest(folder, lambda path, state: state) for folder in (killed, whole))
    assert final["step"] == expected["step"] == 12
    for part in "model", "rng":
        assert all(torch.equal(final[part][k], v) for k, v in expected[part].items())
    assert steps_logged(killed) == list(range(1, 13))
    assert (killed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert not list(killed.glob("*.tmp"))


# Checkpoints


@pytest.fixture
def stopped(tmp_path):
    """A run of SMALL stopped at step 4, with checkpoints after the steps 3 and 4."""
    with pytest.raises(KeyboardInterrupt):
        train(interrupt_at(4), SMALL, tmp_path)
    return tmp_path


def test_a_checkpoint_is_a_plain_file_of_torch(stopped):
    latest, previous = list_checkpoints(stopped)
    assert [latest.name, previous.name] == ["checkpoint-00000004.pt", "checkpoint-00000003.pt"]
    state = torch.load(latest, weights_only=True)
    assert state["step"] == 4
    assert state["config"]["lr"] == 0.01


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flip_a_bit, "damaged: its SHA-256"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "cut short"),
        (lambda path: path.write_bytes(b""), "cut short"),
        (lambda path: torch.save({"step": 9}, path), "or bigkern didn't write it"),
        (lambda path: path.unlink() or path.mkdir(), "can't be read"),
    ],
    ids=["flipped", "cut", "empty", "foreign", "folder"],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(stopped, capsys, damage, reason):
    latest, previous = list_checkpoints(stopped)
    damage(latest)
    with pytest.raises(CheckpointError, match=f"{latest} is refused: .*{reason}"):
        load_checkpoint(latest)
    if latest.is_dir():
        return
    whole = train(small_task(), SMALL)
    resumed = train(small_task(), SMALL, stopped, resume=True)
    errors = capsys.readouterr().err
    assert f"{latest} is refused" in errors
    assert f"the one before it, {previous}" in errors
    assert len(resumed.losses) == 6
    assert torch.equal(parameters(resumed.model), parameters(whole.model))
    assert steps_logged(stopped) == list(range(1, 10))


def test_no_usable_checkpoint_is_an_error(stopped, capsys):
    for path in list_checkpoints(stopped):
        flip_a_bit(path)
    with pytest.raises(UserError, match=f"no usable checkpoint is left in {stopped}"):
        train(small_task(), SMALL, stopped, resume=True)
    assert capsys.readouterr().err.count("is refused") == 2


@pytest.mark.parametrize(
    ("task", "config", "reason"),
    [
        (small_task(), replace(SMALL, lr=0.5), "its lr is 0.01, not 0.5"),
        (small_task(), replace(SMALL, optimizer="torch"), "its optimizer is bigkern, not torch"),
        (replace(small_task(), name="other"), SMALL, "its task is small, not other"),
        (replace(small_task(), identity={"model": "big"}), SMALL, "its model is small, not big"),
        (
            replace(small_task(), build_model=lambda: nn.Linear(3, 1)),
            SMALL,
            "its state doesn't fit",
        ),
    ],
    ids=["lr", "optimizer", "task", "identity", "model"],
)
def test_a_foreign_checkpoint_is_refused(stopped, capsys, task, config, reason):
    with pytest.raises(UserError, match="no usable checkpoint"):
        train(task, config, stopped, resume=True)
    assert reason in capsys.readouterr().err


def test_a_format_of_the_future_is_refused(stopped, monkeypatch):
    (latest, _) = list_checkpoints(stopped)
    monkeypatch.setattr(checkpoint, "FORMAT", "bigkern checkpoint 2")
    with pytest.raises(CheckpointError, match="its format is not 'bigkern checkpoint 2'"):
        load_checkpoint(latest)


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def write():
        with atomic_file(path) as file:
            file.write(b"new")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match=f"cannot write {path}: No space"):
        write()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


class FullDisk:
    """Stands for a file on a full disk: the writes numbered in `failing` fail."""

    def __init__(self, file, failing):
        self.file, self.failing, self.numbers = file, failing, itertools.count()

    def write(self, data):
        if next(self.numbers) in self.failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


@pytest.mark.parametrize("failing", [{0}, {5}, range(5, 10**6)], ids=["first", "sixth", "rest"])
def test_a_full_disk_stops_with_the_last_checkpoint_in_place(stopped, monkeypatch, failing):
    before = {path: path.read_bytes() for path in list_checkpoints(stopped)}
    real_open = open

    def open_full(path, mode="r", *args, **kwargs):
        file = real_open(path, mode, *args, **kwargs)
        return FullDisk(file, failing) if str(path).endswith(".pt.tmp") else file

    monkeypatch.setattr(checkpoint, "open", open_full, raising=False)
    with pytest.raises(UserError, match=r"cannot write .*checkpoint-00000006\.pt: No space left"):
        train(small_task(), SMALL, stopped, resume=True)
    assert {path: path.read_bytes() for path in list_checkpoints(stopped)} == before
    assert not list(stopped.glob("*.tmp"))
    monkeypatch.undo()
    resumed = train(small_task(), SMALL, stopped, resume=True)
    assert torch.equal(parameters(resumed.model), parameters(train(small_task(), SMALL).model))


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/run"):
        train(small_task(), SMALL, tmp_path / "file" / "run")


def test_a_folder_with_a_run_is_not_overwritten(stopped):
    with pytest.raises(UserError, match=f"holds a run: go on with --resume {stopped}"):
        train(small_task(), SMALL, stopped)


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


# The log


def test_metrics_have_each_step_once_and_scores_with_each_epoch(tmp_path):
    result = train(small_task(), SMALL, tmp_path)
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == result.losses
    assert [line["epoch"] for line in lines] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert [line["step"] for line in lines if "training_mode" in line] == [3, 6, 9]
    assert lines[2]["training_mode"] == 0
    assert result.model.training


def test_lines_after_the_checkpoint_and_cut_lines_are_dropped(stopped):
    with open(stopped / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "epoch": 2, "loss": 7}\n{"step": 6, "ep')
    train(small_task(), SMALL, stopped, resume=True)
    assert steps_logged(stopped) == list(range(1, 10))


def test_tensorboard_shows_each_step_once(stopped):
    pytest.importorskip("tensorboard", reason="it reads its events")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flip_a_bit(list_checkpoints(stopped)[0])  # step 4 is run once more
    train(small_task(), SMALL, stopped, resume=True)
    events = EventAccumulator(str(stopped)).Reload()
    assert Counter(e.step for e in events.Scalars("loss")) == Counter(range(1, 10))
    assert [e.step for e in events.Scalars("training_mode")] == [3, 6, 9]


def test_a_disk_that_fills_up_under_tensorboard_is_an_error(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="it writes the events")
    from tensorboard.summary.writer.record_writer import RecordWriter

    def write(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    tracebacks = []
    monkeypatch.setattr(threading, "excepthook", tracebacks.append)
    log = metrics.MetricsLog(tmp_path, 0)
    monkeypatch.setattr(RecordWriter, "write", write)
    log.write(1, 1, [0.5], {})
    with pytest.raises(UserError, match=f"cannot write {tmp_path}: No space left"):
        log.close()
    assert tracebacks == []
    threading.excepthook("of another thread")
    assert tracebacks == ["of another thread"]


def test_without_tensorboard_and_scikit_learn_it_says_what_to_install(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    train(small_task(), SMALL, tmp_path)
    assert "pip install tensorboard" in capsys.readouterr().out
    assert not list(tmp_path.glob("events*"))
    labels = torch.tensor([0, 1])
    assert "pip install scikit-learn" in metrics.scores_per_class(labels, labels)


def test_scores_are_those_of_scikit_learn():
    pytest.importorskip("sklearn", reason="it computes precision, recall and F1")
    predicted, labels = torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 1, 1])
    assert metrics.accuracy(predicted, labels) == 0.75
    row = metrics.scores_per_class(predicted, labels).splitlines()[3].split()
    assert row == ["1", "0.6667", "1.0000", "0.8000", "2"]


# The config of a run


def test_a_run_keeps_its_options(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"task": "cnn", "lr": 0.5, "seed": 7}))
    config = read_config(tmp_path, "cnn", CnnConfig, {"epochs": 20, "lr": 0.5})
    assert config == CnnConfig(lr=0.5, seed=7, epochs=20)
    with pytest.raises(UserError, match="has seed 7, not 8"):
        read_config(tmp_path, "cnn", CnnConfig, {"seed": 8})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a run's config"),
        ("[]", "is not a run's config"),
        ('{"lr": 1}', "is not a run's config"),
        ('{"task": "cnn", "colour": 1}', "is not a run's config"),
        ('{"task": "cnn", "lr": -1}', r"is not a run's config \(lr must be"),
        ('{"task": "cnn", "lr": "fast"}', "is not a run's config"),
        ('{"task": "transformer", "layers": 2}', "holds a run of `train transformer`"),
    ],
)
def test_a_config_of_something_else_is_refused(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_config(tmp_path, "cnn", CnnConfig, {})
    with pytest.raises(UserError, match="holds no run"):
        read_config(tmp_path / "nothing", "cnn", CnnConfig, {})
