"""Runs that are stopped or killed, and their checkpoints."""

import errno
import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from helpers import (
    SMALL,
    flip_a_bit,
    interrupt_at,
    parameters,
    rewrite_checkpoint,
    small_task,
    steps_logged,
)
from torch import nn

from bigkern.cli import main
from bigkern.train import checkpoint
from bigkern.train.checkpoint import (
    CheckpointError,
    atomic_file,
    list_checkpoints,
    load_checkpoint,
    load_latest,
)
from bigkern.train.config import OPTIMIZERS, TrainConfig, read_config
from bigkern.train.errors import UserError
from bigkern.train.loop import train

pytestmark = pytest.mark.usefixtures("one_thread")


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
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 2; not saved"):
        train(interrupt_at(2), SMALL)
    assert signal.getsignal(signal.SIGINT) is before


def test_sigterm_stops_as_ctrl_c_does(tmp_path):
    def terminate(step):
        if step == 4:
            signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match=f"stopped after step 4; .*--resume {tmp_path}"):
        train(small_task(terminate), SMALL, tmp_path)
    assert signal.getsignal(signal.SIGTERM) is before
    assert steps_logged(tmp_path) == [1, 2, 3, 4]


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


def test_a_run_of_an_older_version_goes_on(tmp_path):
    """One whose checkpoints and config know nothing of options that came later."""
    new = {"accumulate", "warmup_steps", "schedule", "decoupled_weight_decay"}
    old = tmp_path / "old"
    with pytest.raises(KeyboardInterrupt):
        train(interrupt_at(4), SMALL, tmp_path / "new")
    old.mkdir()

    def forget(state):
        for options in state["identity"], state["config"]:
            for name in new:
                del options[name]

    for path in list_checkpoints(tmp_path / "new"):
        rewrite_checkpoint(path, old, forget)
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    kept = {name: value for name, value in config.items() if name not in new}
    (old / "config.json").write_text(json.dumps(kept))

    config = read_config(old, "small", TrainConfig, {})
    assert config == SMALL
    rest = train(small_task(), config, old, resume=True)
    assert torch.equal(parameters(rest.model), parameters(train(small_task(), SMALL).model))
    with pytest.raises(UserError, match="no usable checkpoint"):
        train(small_task(), replace(config, accumulate=2), old, resume=True)


# 6 steps an epoch each.
CNN = ["cnn", "--batch-size", "256", "--epochs", "2"]
TRANSFORMER = [
    "transformer",
    "--batch-size",
    "4",
    "--context",
    "24",
    "--dim",
    "16",
    "--num-heads",
    "2",
    "--epochs",
    "2",
]
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


@pytest.mark.parametrize("model", [CNN, TRANSFORMER], ids=["cnn", "transformer"])
def test_killed_runs_go_on_bit_for_bit(tmp_path, model):
    options = ["--save-every", "2", "--device", "cpu"]
    if model is TRANSFORMER:
        (tmp_path / "text").write_text("a text that is long enough, if not more. " * 16)
        options += ["--text", str(tmp_path / "text"), "--dropout", "0.1"]
    elif importlib.util.find_spec("torchvision"):
        options += ["--augment"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    python = [sys.executable, "-m", "bigkern"]
    command = ["train", *model, *options, "--out"]
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
    resume = ["train", model[0], "--resume", str(killed)]
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


def test_a_checkpoint_is_a_plain_file_of_torch(stopped):
    latest, previous = list_checkpoints(stopped)
    assert [latest.name, previous.name] == ["checkpoint-00000004.pt", "checkpoint-00000003.pt"]
    state = torch.load(latest, weights_only=True)
    assert state["step"] == 4
    assert state["config"]["lr"] == 0.01


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
