"""`bigkern compress`: what each step takes away, what it keeps, and that the report is true."""

import copy
import json
import signal
import subprocess
import sys

import pytest
import torch
from torch import nn

from bigkern.cli import main
from bigkern.models import SimpleCNN
from bigkern.nn import Int8Linear
from bigkern.testing import assert_as_accurate
from bigkern.train import compress, distillation, measure
from bigkern.train.checkpoint import list_checkpoints, load_checkpoint
from bigkern.train.data import load_digits
from bigkern.train.images import accuracy, classify
from bigkern.train.saved import load_run

pytestmark = pytest.mark.usefixtures("one_thread")

TRAIN = ["train", "cnn", "--batch-size", "128", "--no-amp", "--device", "cpu"]
USE = """
import sys, torch
from pathlib import Path
from bigkern.cli import main
from bigkern.train.saved import load_run
torch.set_num_threads(1)
run, folder = map(Path, sys.argv[1:])
with torch.no_grad():
    logits = load_run(run, "cpu").model(torch.load(folder / "images.pt"))
torch.save(logits, folder / "logits.pt")
for command in ["evaluate", str(run)], ["predict", str(run), str(folder / "digit.png")]:
    assert main([*command, "--device", "cpu"]) == 0
"""


@pytest.fixture(autouse=True, scope="module")
def few_calls():
    """Times don't matter here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "SECONDS", 0.0)
        patch.setattr(measure, "MIN_CALLS", 2)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of 3 epochs, and that of another of one."""
    folder = tmp_path_factory.mktemp("runs")
    assert main([*TRAIN, "--epochs", "3", "--out", str(folder / "teacher")]) == 0
    options = ["--epochs", "1", "--seed", "1"]
    assert main([*TRAIN, *options, "--out", str(folder / "student")]) == 0
    return folder / "teacher", folder / "student"


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """Compress the run of 3 epochs, or `source`, and return the saved run, with `made`, the model
    that was saved."""
    made = []
    save = compress.save
    monkeypatch.setattr(compress, "save", lambda run, *where: made.append(run) or save(run, *where))

    def run(*options, source=None, out="out"):
        argv = ["compress", source or trained[0], "--out", tmp_path / out, "--device", "cpu"]
        assert main([str(x) for x in (*argv, *options)]) == 0
        loaded = load_run(tmp_path / out, "cpu")
        loaded.made = made[-1].model
        return loaded

    return run


def fails(capsys, *argv):
    assert main([str(a) for a in argv]) == 1
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return err.splitlines()[-1]


def save_digit(path):
    """The first that is held out."""
    image = pytest.importorskip("PIL.Image", reason="it writes pictures")
    image.fromarray((load_digits().test.images[0, 0] * 255).byte().numpy()).save(path)


def state_of(folder):
    return load_checkpoint(list_checkpoints(folder)[0])["model"]


def summary_of(run):
    return json.loads((run.folder / "summary.json").read_text())


def weights(model):
    return {n: m.weight.detach() for n, m in model.named_modules() if hasattr(m, "weight")}


@pytest.mark.parametrize("epochs", [0, 1])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_pruned_weights_are_the_smallest_and_stay_0(trained, run, scope, epochs):
    pruned = run("--prune", 0.7, "--prune-scope", scope, "--epochs", epochs)
    before, after = weights(load_run(trained[0], "cpu").model), weights(pruned.model)
    if scope == "global":
        before, after = (
            {"all": torch.cat([w.flatten() for w in ws.values()])} for ws in (before, after)
        )
    for name, weight in after.items():
        is_zero = weight == 0
        assert is_zero.sum() == round(0.7 * weight.numel())
        assert before[name][is_zero].abs().max() <= before[name][~is_zero].abs().min()
        assert torch.equal(weight[~is_zero], before[name][~is_zero]) == (epochs == 0)
    assert state_of(pruned.folder).keys() == state_of(trained[0]).keys()


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_channels_are_gone(trained, run, scope):
    """The model computes what it did with those channels at 0."""
    options = ["--prune", 0.5, "--prune-unit", "channels", "--prune-scope", scope]
    small, model = run(*options, "--epochs", 0).model, load_run(trained[0], "cpu").model
    counts = {}
    for name in ("conv1", "fc1"):
        layer, was = small.get_submodule(name), model.get_submodule(name)
        norms = was.weight.detach().flatten(1).norm(dim=1)
        counts[name] = len(layer.weight)
        lost = norms.argsort()[: len(norms) - counts[name]]
        was.weight.data[lost] = 0
        was.bias.data[lost] = 0
    if scope == "layer":
        assert counts == {"conv1": 16, "fc1": 64}
    else:
        assert sum(counts.values()) == 80
    shapes = {name: list(weight.shape) for name, weight in weights(small).items()}
    conv1, fc1 = counts.values()
    assert shapes == {"conv1": [conv1, 1, 3, 3], "fc1": [fc1, conv1 * 26 * 26], "fc2": [10, fc1]}
    assert (small.conv1.out_channels, small.fc1.in_features) == (conv1, conv1 * 26 * 26)
    images = torch.randn(5, 1, 28, 28)
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(images.double())
        assert_as_accurate(small(images), expected, model(images))


def test_a_student_comes_to_predict_what_its_teacher_does(trained, run):
    teacher, student = (load_run(folder, "cpu").model for folder in trained)
    by_labels, by_teacher = (
        run("--distill", trained[0], "--distill-weight", weight, "--epochs", 1,
            source=trained[1], out=f"weight{weight}").model
        for weight in (0, 1)
    )  # fmt: skip
    images = load_digits().test.images
    with torch.no_grad():
        untaught, by_labels, by_teacher = (
            distillation.soft_loss(model(images), teacher(images), 4.0).item()
            for model in (student, by_labels, by_teacher)
        )
    assert by_teacher < min(untaught, by_labels) / 2


@pytest.mark.parametrize("mode", ["dynamic", "static", "weight_only"])
def test_int8_layers_lose_no_accuracy(run, mode):
    quantized = run("--quantize", "int8", "--mode", mode)
    model = quantized.model
    assert type(model.conv1) is nn.Conv2d  # too small to gain
    assert type(model.fc1) is type(model.fc2) is Int8Linear
    assert {model.fc1.mode, model.fc2.mode} == {mode}
    before, after = summary_of(quantized).values()
    assert before["test_accuracy"] > 0.85
    assert before["test_accuracy"] - after["test_accuracy"] < 0.005
    assert after["file_bytes"] < 0.27 * before["file_bytes"]


def test_static_scales_are_of_the_training_set(trained, run):
    model = run("--quantize", "int8", "--mode", "static").model
    source, images = load_run(trained[0], "cpu").model, load_digits().train.images
    with torch.no_grad():
        largest = source.conv1(images).relu().max().item() / 127
    assert 0.5 * largest < model.fc1.x_scale.item() <= 1.0001 * largest


def test_a_run_trained_with_int8_products_is_quantized_too(tmp_path, run):
    folder = tmp_path / "run"
    assert main([*TRAIN, "--epochs", "1", "--linear", "int8", "--out", str(folder)]) == 0
    assert type(run("--quantize", "int8", source=folder).model.fc1) is Int8Linear


# All together


def test_all_steps_and_another_process(trained, run, tmp_path, capsys):
    """The other process computes the same bits."""
    digits = load_digits().test
    save_digit(tmp_path / "digit.png")
    options = ["--prune", 0.5, "--prune-unit", "channels", "--prune-scope", "layer"]
    options += ["--distill", trained[0], "--epochs", 1, "--quantize", "int8", "--mode", "static"]
    made = run(*options)
    capsys.readouterr()
    assert list(made.model.fc1.weight_q.shape) == [64, 16 * 26 * 26]
    torch.save(digits.images, tmp_path / "images.pt")
    argv = [sys.executable, "-c", USE, made.folder, tmp_path]
    done = subprocess.run([str(x) for x in argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = made.made(digits.images)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)
    shown = f"{summary_of(made)['after']['test_accuracy']:.2%}"
    assert f"360 held-out images: {shown}" in done.stdout
    assert f"digit.png: {int(expected[0].argmax())} (" in done.stdout


def test_the_report_is_true(run, capsys):
    made = run("--prune", 0.5, "--epochs", 0, "--quantize", "int8")
    printed = capsys.readouterr().out
    before, after = summary_of(made).values()
    state = state_of(made.folder).values()
    assert after["parameters"] == sum(x.numel() for x in state)
    assert after["nonzeros"] == sum(int((x != 0).sum()) for x in state)
    assert before["parameters"] == sum(p.numel() for p in SimpleCNN().parameters())
    assert after["nonzeros"] < 0.51 * before["parameters"]
    assert after["file_bytes"] == list_checkpoints(made.folder)[0].stat().st_size
    assert before["file_bytes"] == pytest.approx(4 * before["parameters"], rel=0.01)
    digits = load_digits().test
    predicted = classify(made.model, digits.images, 0.0, 1.0).argmax(1)
    assert after["test_accuracy"] == accuracy(predicted, digits.labels)
    for side in (before, after):
        assert all(0 < x["median"] <= x["p95"] for x in side["latency_ms"].values())
    rows = {line[:34].strip(): line.split()[-2:] for line in printed.splitlines()}
    assert rows["non-zeros"] == [f"{side['nonzeros']:,}" for side in (before, after)]
    assert rows["file (MiB)"] == [f"{x['file_bytes'] / 2**20:.2f}" for x in (before, after)]
    assert rows["accuracy, held-out"] == [f"{x['test_accuracy']:.2%}" for x in (before, after)]
    for size in ("1", "64"):
        shown = [f"{side['latency_ms'][size]['p95']:.3f}" for side in (before, after)]
        assert rows[f"latency, batch {size}, p95 (ms)"] == shown


# Nothing is lost


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_interrupted_compression_leaves_nothing(trained, tmp_path, capsys, monkeypatch):
    def interrupt(*arguments):
        signal.raise_signal(signal.SIGINT)
        return real_loss(*arguments)

    before = contents(trained[0])
    real_loss = distillation.soft_loss
    monkeypatch.setattr(distillation, "soft_loss", interrupt)
    argv = ["compress", trained[0], "--out", tmp_path / "out", "--distill", trained[0]]
    assert main([str(x) for x in (*argv, "--device", "cpu")]) == 130
    assert "stopped after step 1; not saved" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert contents(trained[0]) == before


def test_a_full_disk_leaves_nothing(trained, tmp_path, capsys, monkeypatch):
    def full(path, value):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compress, "write_json", full)
    argv = ["compress", trained[0], "--out", tmp_path / "out", "--quantize", "int8"]
    message = fails(capsys, *argv)
    assert f"cannot write {tmp_path}/out: No space left" in message
    assert not list(tmp_path.iterdir())


def test_a_compressed_run_is_compressed_further_but_not_trained_on(run, tmp_path, capsys):
    run("--prune", 0.5, "--prune-unit", "channels", "--prune-scope", "layer", "--epochs", 0)
    second = run("--prune", 0.8, "--epochs", 0, source=tmp_path / "out", out="second")
    assert second.model.conv1.out_channels == 16
    third = run("--distill", second.folder, "--epochs", 1, source=second.folder, out="third")
    both = zip(weights(second.model).values(), weights(third.model).values(), strict=True)
    assert all(torch.equal(a == 0, b == 0) for a, b in both)
    fourth = run("--quantize", "int8", source=third.folder, out="fourth")
    assert fourth.model.conv1.out_channels == 16
    assert not list_checkpoints(fourth.folder)[1:]

    message = fails(capsys, "compress", fourth.folder, "--out", tmp_path / "x", "--prune", 0.5)
    assert "is quantized already" in message
    message = fails(capsys, "train", "cnn", "--resume", second.folder)
    assert "holds a compressed run, which can't be trained on" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "compress needs --prune, --distill or --quantize"),
        (["--prune", 0], "prune must be between 0 and 1, got 0.0"),
        (["--prune", 1], "prune must be between 0 and 1, got 1.0"),
        (["--prune", "nan"], "prune must be between 0 and 1"),
        (["--prune", 0.5, "--temperature", 2], "temperature is an option of distill"),
        (["--quantize", "int8", "--epochs", 1], "epochs is an option of prune or distill"),
        (["--prune", 0.5, "--mode", "static"], "mode is an option of quantize"),
        (["--prune", 0.5, "--epochs", -1], "epochs must be at least 0"),
        (["--prune", 0.5, "--lr", 0], "lr must be a positive number"),
        (["--distill", "x", "--temperature", 0], "temperature must be a positive number"),
        (["--distill", "x", "--distill-weight", 2], "distill_weight must be in [0, 1], got 2.0"),
        (["--distill", "x", "--epochs", 0], "epochs must be at least 1"),
        (["--distill", "/nowhere"], "there is no folder /nowhere"),
        (
            ["--prune", 0.99, "--prune-unit", "channels", "--prune-scope", "layer"],
            "prune 0.99 would leave no channel of conv1",
        ),
        (["--quantize", "int8", "--data-dir", "x"], "data_dir and download are options of the"),
        (["--quantize", "int8", "--text", "x"], "text is not an option of a run of `train cnn`"),
    ],
)
def test_bad_options_have_a_message(trained, tmp_path, capsys, options, message):
    found = fails(capsys, "compress", trained[0], "--out", tmp_path / "out", *options)
    assert message in found
    assert not list(tmp_path.iterdir())


def test_bad_folders_have_a_message(trained, tmp_path, capsys):
    options = ["--quantize", "int8"]
    assert "is not empty" in fails(capsys, "compress", trained[0], "--out", trained[1], *options)
    message = fails(capsys, "compress", trained[0], "--out", "/dev/null/x", *options)
    assert "cannot write /dev/null/x" in message
    message = fails(capsys, "compress", tmp_path, "--out", tmp_path / "out", *options)
    assert "there is no checkpoint in" in message


# The Transformer


@pytest.fixture(scope="module")
def transformers(tmp_path_factory):
    """The folders of a language model and of a classifier, of an epoch each."""
    folder = tmp_path_factory.mktemp("transformers")
    text = folder / "source.py"
    text.write_bytes(b"".join(b"x%d = %d + x%d\n" % (i % 97, i, i % 31) for i in range(300)))
    size = ["--dim", "32", "--num-heads", "2", "--num-blocks", "1", "--device", "cpu"]
    train = ["train", "transformer", *size, "--epochs", "1", "--batch-size", "16"]
    lm, classifier = folder / "lm", folder / "classifier"
    assert main([*train, "--text", str(text), "--context", "24", "--out", str(lm)]) == 0
    assert main([*train, "--task", "classify", "--lr", "0.01", "--out", str(classifier)]) == 0
    return lm, classifier


STEPS = [
    ["--prune", 0.5, "--epochs", 0, "--quantize", "int8"],
    ["--prune", 0.5, "--prune-unit", "channels", "--quantize", "int8", "--mode", "static"],
    ["--quantize", "int8", "--mode", "weight_only"],
]


@pytest.mark.parametrize("options", STEPS, ids=lambda options: "-".join(map(str, options)))
def test_a_language_model(transformers, run, capsys, options):
    made = run(*options, source=transformers[0])
    before, after = summary_of(made).values()
    assert after["validation_loss"] < before["validation_loss"] + 0.1
    assert "bits per byte" in capsys.readouterr().out
    assert not any(type(layer) is nn.Linear for layer in made.model.modules())
    for command in ["evaluate"], ["generate", "--prompt", "x4", "--temperature", "0"]:
        assert main([command[0], str(made.folder), *command[1:], "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert f"Validation loss: {after['validation_loss']:.4f}" in out
    assert "x4" in out


@pytest.mark.parametrize("options", STEPS[1:], ids=lambda options: "-".join(map(str, options)))
def test_a_transformer_that_classifies(transformers, run, tmp_path, capsys, options):
    made = run(*options, "--distill", transformers[1], "--epochs", 1, source=transformers[1])
    accuracy = summary_of(made)["after"]["test_accuracy"]
    assert accuracy > 0.3
    assert main(["evaluate", str(made.folder), "--device", "cpu"]) == 0
    assert f"held-out images: {accuracy:.2%}" in capsys.readouterr().out
    save_digit(tmp_path / "digit.png")
    assert main(["predict", str(made.folder), str(tmp_path / "digit.png"), "--device", "cpu"]) == 0
    assert "digit.png: " in capsys.readouterr().out


def test_a_teacher_of_another_task(trained, transformers, tmp_path, capsys):
    for run, teacher, message in (
        (trained[0], transformers[0], "its task is transformer, not cnn"),
        (transformers[1], trained[0], "its task is cnn, not transformer"),
        (transformers[0], transformers[1], "its vocab_size is None, not 256"),
    ):
        argv = ["compress", run, "--out", tmp_path / "out", "--device", "cpu"]
        found = fails(capsys, *argv, "--distill", teacher)
        assert f"the teacher must be of the run's task: {message}" in found


def test_commands_for_the_other_kind_of_model(trained, transformers, tmp_path, capsys):
    assert "classifies no images" in fails(capsys, "predict", transformers[0], "x.png")
    assert "no language model" in fails(capsys, "generate", trained[0], "--prompt", "x")
    other = tmp_path / "other.py"
    other.write_bytes(b"y = 1\n" * 900)
    message = fails(capsys, "evaluate", transformers[0], "--text", other)
    assert "the data aren't those that" in message
