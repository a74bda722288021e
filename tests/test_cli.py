"""The command line: what each command prints, and one clear message for whatever goes wrong."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from helpers import rewrite_checkpoint

import bigkern
from bigkern.cli import main
from bigkern.train import checkpoint, images
from bigkern.train.config import CnnConfig
from bigkern.train.data import load_digits

QUICK = ["train", "cnn", "--batch-size", "256", "--device", "cpu"]  # 6 steps an epoch


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Two threads wait for each other long on a busy machine, and these models gain little."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def fails(capsys, *argv):
    """Run a command that must fail, and return its message: one, on stderr, without a traceback."""
    assert main([str(a) for a in argv]) == 1
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    assert err.splitlines()[-1].startswith("bigkern: error: ")
    return err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of 3 epochs."""
    folder = tmp_path_factory.mktemp("runs") / "new" / "run"
    assert main([*QUICK, "--epochs", "3", "--lr", "0.003", "--out", str(folder)]) == 0
    return folder


def save_digit(path, index, size=28, invert=False):
    """Save a held-out digit as a picture and return its label."""
    image = pytest.importorskip("PIL.Image", reason="it writes pictures")
    data = load_digits()
    pixels = (data.test.images[index, 0] * 255).round().to(torch.uint8).numpy()
    picture = image.fromarray(255 - pixels if invert else pixels).resize((size, size))
    picture.convert("RGB").save(path)
    return int(data.test.labels[index])


# Commands that succeed


@pytest.mark.parametrize("argv", [["--version"], ["--help"], ["train", "--help"], [*QUICK, "-h"]])
def test_help_and_version(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 0
    out = capsys.readouterr().out
    expected = {"--version": f"bigkern {bigkern.__version__}", "-h": "(default: 0.001)"}
    assert expected.get(argv[-1], "usage: bigkern") in out


def test_info_prints_the_report(capsys, monkeypatch):
    module = types.SimpleNamespace(report=lambda: "all is well")
    monkeypatch.setitem(sys.modules, "bigkern.info", module)
    assert main(["info"]) == 0
    assert capsys.readouterr().out == "all is well\n"


def test_train_reports_what_a_run_is_judged_by(capsys):
    assert main([*QUICK, "--epochs", "1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Epoch [1/1], Step [1/6], Loss: 2.")
    for text in (
        "Accuracy on the 1437 train images: ",
        "Accuracy on the 360 held-out images: ",
        "Sample: held-out image 0 is classified as ",
        "Time per step: ",
        "images per second",
        "Peak memory: ",
    ):
        assert text in out
    pytest.importorskip("sklearn", reason="it computes precision, recall and F1")
    assert "precision    recall  f1-score" in out


def test_out_holds_config_metrics_summary_and_checkpoints(finished):
    config = json.loads((finished / "config.json").read_text())
    assert (config["task"], config["epochs"], config["lr"]) == ("cnn", 3, 0.003)
    assert (finished / "metrics.jsonl").read_text().count("\n") == 18
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["test_accuracy"] > 0.8
    names = [path.name for path in checkpoint.list_checkpoints(finished)]
    assert names == ["checkpoint-00000018.pt", "checkpoint-00000012.pt"]


def test_evaluate_repeats_the_accuracy_of_the_run(finished, capsys):
    assert main(["evaluate", str(finished), "--device", "cpu"]) == 0
    summary = json.loads((finished / "summary.json").read_text())
    assert f"360 held-out images: {summary['test_accuracy']:.2%}" in capsys.readouterr().out


def test_predict_classifies_pictures(finished, tmp_path, capsys):
    labels = [save_digit(tmp_path / f"{i}.png", 12 * i, size=8 + 28 * i) for i in range(4)]
    (tmp_path / "notes.txt").write_text("no picture")
    assert main(["predict", str(finished), str(tmp_path), "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" (")[0] for line in lines] == [
        f"{tmp_path / f'{i}.png'}: {label}" for i, label in enumerate(labels)
    ]
    assert all(10 < float(line.split("(")[1].rstrip("%)")) <= 100 for line in lines)
    assert main(["predict", str(finished), str(tmp_path / "2.png"), "--device", "cpu"]) == 0
    assert capsys.readouterr().out.splitlines() == [lines[2]]


def test_predict_inverts_dark_on_light(finished, tmp_path, capsys):
    save_digit(tmp_path / "light.png", 100)
    save_digit(tmp_path / "dark.png", 100, invert=True)
    main(["predict", str(finished), str(tmp_path / "light.png")])
    main(["predict", str(finished), str(tmp_path / "dark.png"), "--invert"])
    first, second = capsys.readouterr().out.splitlines()
    assert first.split(": ")[1] == second.split(": ")[1]


def test_compare_runs_both_optimizers_in_turn(tmp_path, capfd):
    assert main([*QUICK, "--epochs", "1", "--compare", "--out", str(tmp_path)]) == 0
    out = capfd.readouterr().out
    lines = out.splitlines()
    table = lines[[line.split() for line in lines].index(["bigkern", "torch"]) :]
    titles = ["time per step (ms)", "images per second", "peak memory (MiB)"]
    titles += ["accuracy, train", "accuracy, held-out"]
    titles += [f"loss at step {i}" for i in range(1, 6)] + ["final loss"]
    for title, line in zip(titles, table[1:-1], strict=True):
        assert line.startswith(title)
        ours, theirs = (float(cell.strip("%").replace(",", "")) for cell in line.split()[-2:])
        assert 0.1 < ours / theirs < 10
    assert float(table[-1].split()[5]) < 0.05
    assert table[-1].startswith("largest difference of the losses: ")
    for name in "bigkern", "torch":
        assert json.loads((tmp_path / name / "config.json").read_text())["optimizer"] == name


# Commands that fail


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["train"],
        ["train", "rnn"],
        ["train", "cnn", "--data", "cifar"],
        ["train", "cnn", "--colour"],
        ["train", "cnn", "--epochs", "many"],
        ["train", "cnn", "--out", "a", "--resume", "b"],
        ["evaluate"],
    ],
)
def test_unknown_commands_and_options(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", "0"], "epochs must be at least 1, got 0"),
        (["--batch-size", "1438"], "batch_size must be at most the 1437 examples, got 1438"),
        (["--lr", "nan"], "lr must be a positive number"),
        (["--momentum", "0.9"], "momentum is an option of the optimizer sgd"),
        (["--save-every", "5"], "--save-every needs --out"),
        (["--device", "tpu"], "device must be auto, cpu, cuda or cuda:N"),
        (["--backend", "opencl"], "backend must be one of native, triton"),
        (["--data", "mnist"], "mnist needs data_dir"),
        (["--compare", "--resume", "x"], "--compare can't be combined with"),
        (["--resume", "/nowhere"], "/nowhere holds no run"),
        (["--out", "/dev/null/run"], "cannot write /dev/null/run"),
        (["--lr", "1e30", "--no-amp", "--batch-size", "700"], "the loss is nan at step 2"),
    ],
)
def test_bad_options_have_a_message(capsys, options, message):
    assert message in fails(capsys, "train", "cnn", "--device", "cpu", *options)


def test_a_folder_with_a_run_goes_on_only_by_its_own_options(finished, capsys):
    assert "holds a run" in fails(capsys, *QUICK, "--out", finished)
    message = fails(capsys, "train", "cnn", "--resume", finished, "--seed", "1")
    assert "has seed 0, not 1" in message
    assert main(["train", "cnn", "--resume", str(finished), "--log-every", "2"]) == 0


def test_a_full_disk_has_a_message(tmp_path):
    """A limit on the size of files, 8 MiB, cuts off the first checkpoint."""
    run = tmp_path / "run"
    script = 'ulimit -f 8192; exec "$@"'
    command = [
        "bash",
        "-c",
        script,
        "-",
        sys.executable,
        "-m",
        "bigkern",
        *QUICK,
        "--out",
        str(run),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert (
        f"bigkern: error: cannot write {run}/checkpoint-00000000.pt: File too large" in done.stderr
    )
    assert not list(run.glob("checkpoint*"))


def test_ctrl_c_exits_with_130(tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        signal.raise_signal(signal.SIGINT)
        return real_loss(*_)

    real_loss = images.F.cross_entropy
    monkeypatch.setattr(images.F, "cross_entropy", interrupt)
    assert main([*QUICK, "--out", str(tmp_path)]) == 130
    err = capsys.readouterr().err
    assert f"stopped after step 1; go on with: bigkern train cnn --resume {tmp_path}" in err
    assert checkpoint.list_checkpoints(tmp_path)[0].name == "checkpoint-00000001.pt"


def test_folders_without_a_run(tmp_path, capsys):
    for command in ["evaluate"], ["predict"]:
        image = ["x.png"] if command == ["predict"] else []
        assert "there is no folder" in fails(capsys, *command, tmp_path / "x", *image)
        assert "there is no checkpoint in" in fails(capsys, *command, tmp_path, *image)


def test_a_checkpoint_of_another_model(finished, tmp_path, capsys):
    rewrite_checkpoint(
        checkpoint.list_checkpoints(finished)[0],
        tmp_path,
        lambda state: state["identity"].update(model="Transformer"),
    )
    message = fails(capsys, "evaluate", tmp_path)
    assert "its model is Transformer, not SimpleCNN" in message


def test_bad_pictures(finished, tmp_path, capsys):
    image = pytest.importorskip("PIL.Image", reason="it reads pictures")
    (tmp_path / "text.png").write_text("no picture")
    save_digit(tmp_path / "cut.png", 0)
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:60])
    image.fromarray(np.zeros((28, 28), np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "empty").mkdir()
    for name, message in {
        "text.png": "not an image that Pillow can read",
        "cut.png": "not an image that Pillow can read",
        "missing.png": "not an image that Pillow can read",
        "deep.png": "convert it to 8 bits",
        "empty": "holds no image",
    }.items():
        error = fails(capsys, "predict", finished, tmp_path / name)
        assert message in error
        assert str(tmp_path / name) in error


def test_every_option_of_train_is_a_field_of_the_config(capsys):
    with pytest.raises(SystemExit):
        main(["train", "cnn", "--help"])
    options = set(re.findall(r"--([a-z][a-z-]*)", capsys.readouterr().out))
    fields = {field.name.replace("_", "-") for field in dataclasses.fields(CnnConfig)}
    negations = {"no-amp", "no-decoupled-weight-decay"}
    torchruns = {"nproc-per-node"}
    assert options == fields | negations | torchruns | {"help", "out", "resume", "compare"}


def test_python_m_bigkern(tmp_path):
    command = [sys.executable, "-m", "bigkern", "evaluate", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 1
    assert done.stderr == f"bigkern: error: there is no checkpoint in {tmp_path}\n"
