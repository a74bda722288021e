"""What a run leaves behind: metrics, events, config."""

import errno
import json
import os
import sys
import threading
from collections import Counter

import pytest
import torch
from helpers import SMALL, flip_a_bit, small_task, steps_logged

from bigkern.train import metrics
from bigkern.train.checkpoint import (
    list_checkpoints,
)
from bigkern.train.config import CnnConfig, read_config
from bigkern.train.errors import UserError
from bigkern.train.loop import train

pytestmark = pytest.mark.usefixtures("one_thread")


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
