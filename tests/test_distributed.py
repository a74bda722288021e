"""Training by two processes of torchrun, over gloo."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from distributed_driver import RUNS, parameters, regression
from helpers import steps_logged

import bigkern
from bigkern import cli
from bigkern.train.checkpoint import load_latest
from bigkern.train.config import CnnConfig
from bigkern.train.errors import UserError
from bigkern.train.loop import train

pytestmark = pytest.mark.usefixtures("one_thread")

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
DRIVER = Path(__file__).parent / "distributed_driver.py"
# 1437 images by 480: the last batch has 477, 239 and 238 for the two.
CNN = ["train", "cnn", "--device", "cpu", "--epochs", "1", "--batch-size", "480", "--no-amp"]
TRANSFORMER = [
    *("train", "transformer", "--device", "cpu", "--batch-size", "5", "--context", "24"),
    *("--dim", "16", "--num-heads", "2", "--schedule", "constant"),
]
COMMANDS = {
    "cnn": [*CNN, "--accumulate", "2", "--max-grad-norm", "1"],
    "transformer": [*TRANSFORMER, "--epochs", "2"],
    "amp": [*TRANSFORMER, "--epochs", "1", "--amp"],
}


def start(*arguments):
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(bigkern.__file__).parents[1]),
    }
    return subprocess.Popen(
        [*TORCHRUN, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def finish(process):
    """What it printed. If the processes wait for each other, torchrun is told to end them."""
    try:
        return process.communicate(timeout=150)[0]
    except subprocess.TimeoutExpired:
        process.terminate()
        raise


def final_state(folder):
    return load_latest(folder, lambda path, state: state)


def losses(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "text").write_text("a text that is long enough, if not more. " * 16)
    return folder


@pytest.fixture(scope="module")
def interrupted(folder):
    """What a run with dropout printed that SIGTERM stopped at some step."""
    options = ["--text", folder / "text", "--dropout", "0.1", "--epochs", "1000"]
    with start("-m", "bigkern", *TRANSFORMER, *options, "--out", folder / "stopped") as process:
        log = folder / "stopped" / "metrics.jsonl"
        while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= 3):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        return finish(process)


@pytest.fixture(scope="module")
def driver(folder, interrupted):
    """What the driver printed: it ran COMMANDS, the stopped run to its end, and that one whole."""
    text = ["--text", folder / "text"]
    steps_per_epoch = 5
    epochs = str(final_state(folder / "stopped")["step"] // steps_per_epoch + 2)
    dropout = [*TRANSFORMER, *text, "--dropout", "0.1", "--epochs", epochs]
    lines = [
        [*command, *([] if name == "cnn" else text), "--out", folder / name]
        for name, command in COMMANDS.items()
    ]
    lines += [
        [*TRANSFORMER[:2], "--resume", folder / "stopped", "--epochs", epochs],
        [*dropout, "--out", folder / "whole"],
    ]
    (folder / "runs.json").write_text(json.dumps(lines, default=str))
    with start(DRIVER, folder) as process:
        output = finish(process)
    assert (folder / "results.json").exists(), output
    return output


@pytest.fixture(scope="module")
def results(folder, driver):
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one(results, name):
    """Whether or not the batch divides, and where a process has no example of it."""
    alone = train(regression(), RUNS[name])
    assert results[name]["losses"] == pytest.approx(alone.losses, rel=1e-12)
    leader, other = results[name]["parameters"]
    assert leader == other
    assert leader == pytest.approx(parameters(alone.model), rel=1e-9)


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_train_as_one_process_does(folder, driver, name):
    """But for the order of sums in float32, whose differences the steps before have amplified. With
    amp they can tip the rounding of an activation to bfloat16."""
    alone = folder / f"{name} alone"
    text = [] if name == "cnn" else ["--text", str(folder / "text")]
    assert cli.main([*COMMANDS[name], *text, "--out", str(alone)]) == 0
    assert losses(folder / name) == pytest.approx(
        losses(alone), rel=2**-8 if name == "amp" else 1e-5
    )
    ours, theirs = final_state(folder / name), final_state(alone)
    assert ours.keys() == theirs.keys()
    for part in ("identity", "config", "model"):
        assert ours[part].keys() == theirs[part].keys()
    assert (folder / name / "summary.json").exists()


def test_one_process_goes_on_with_a_run_of_two(folder, driver):
    run = folder / "amp"
    steps = len(losses(run))
    assert cli.main([*TRANSFORMER[:2], "--resume", str(run), "--epochs", "2"]) == 0
    assert steps_logged(run) == list(range(1, 2 * steps + 1))
    assert cli.main(["generate", str(run), "--prompt", "a", "--max-new-tokens", "2"]) == 0


def test_only_the_leader_speaks(driver):
    assert driver.count("Epoch [1/1], Step [1/3]") == 1  # of the CNN
    assert driver.count("Sample: held-out image 0") == 1


def test_draws_differ(results):
    leader, other = results["draws"]
    assert leader != other


def test_an_interrupt_of_one_process_stops_all_after_the_same_step(results):
    assert results["interrupts"] == ["stopped after step 3; not saved"] * 2


def test_sigterm_stops_all_after_the_same_step(folder, interrupted, driver):
    step = int(interrupted.partition("stopped after step ")[2].partition(";")[0])
    hint = f"torchrun --nproc-per-node 2 -m bigkern train transformer --resume {folder / 'stopped'}"
    assert interrupted.count("bigkern: stopped after step") == 1
    assert hint in interrupted
    assert 3 <= step < len(losses(folder / "stopped"))


def test_a_stopped_run_goes_on_bit_for_bit(folder, driver):
    resumed, whole = final_state(folder / "stopped"), final_state(folder / "whole")
    assert resumed["step"] == whole["step"]
    assert losses(folder / "stopped") == losses(folder / "whole")
    for part in ("model", "rng"):
        assert all(torch.equal(resumed[part][k], v) for k, v in whole[part].items())
    (ours,), (theirs,) = resumed["rng_of_others"], whole["rng_of_others"]
    assert torch.equal(ours["cpu"], theirs["cpu"])
    assert not torch.equal(ours["cpu"], whole["rng"]["cpu"])


def test_a_loss_that_is_not_finite_in_one_process_ends_all(driver):
    assert driver.count("bigkern: error: the loss is nan at step") == 1
    assert "gloo" not in driver


def test_an_error_of_one_process_ends_all(tmp_path):
    (tmp_path / "file").write_text("")
    with start("-m", "bigkern", *CNN, "--out", tmp_path / "file" / "run") as process:
        output = finish(process)
    assert process.returncode == 1
    assert output.count("bigkern: error: cannot write") == 1
    assert "gloo" not in output


def test_compare_is_refused(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    args = cli.build_parser().parse_args([*CNN, "--compare"])
    with pytest.raises(UserError, match=r"--compare .*: start it without torchrun"):
        cli.train.__wrapped__(args, "cnn", CnnConfig, cli.cnn.run, cli.cnn.compare)
