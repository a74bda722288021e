"""The Transformer's tasks in the training loop, and `bigkern generate`."""

import json
import math
import re
import signal
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import flip_a_bit, parameters, rewrite_checkpoint, steps_logged

from bigkern.cli import main
from bigkern.models import Transformer
from bigkern.train.checkpoint import list_checkpoints
from bigkern.train.config import TransformerTrainConfig
from bigkern.train.errors import UserError
from bigkern.train.loop import compute_gradients, train
from bigkern.train.text import Text, to_tokens
from bigkern.train.transformer import run, text_scores, text_task

pytestmark = pytest.mark.usefixtures("one_thread")

SOURCE = b"".join(b"x%d = %d + x%d\n" % (i % 97, i * i % 89, i % 31) for i in range(300))
TEXT = Text(to_tokens(SOURCE[:3000]), to_tokens(SOURCE[3000:]), "digest")
SMALL = TransformerTrainConfig(
    context=24, dim=32, num_heads=2, num_blocks=2, batch_size=16, epochs=3, lr=0.01,
    warmup_steps=4, device="cpu",
)  # fmt: skip
STEPS = 8  # an epoch
TRAIN = ["train", "transformer", "--device", "cpu"]
QUICK = [*TRAIN, "--context", "24", "--dim", "32", "--num-heads", "2", "--num-blocks", "2"]
QUICK += ["--batch-size", "16", "--warmup-steps", "2", "--lr", "0.01"]


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "source.py"
    path.write_bytes(SOURCE)
    return str(path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text_file):
    """The folder of a run of two epochs."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main([*QUICK, "--text", text_file, "--epochs", "2", "--out", str(folder)]) == 0
    return folder


def fails(capsys, *argv):
    assert main([str(a) for a in argv]) == 1
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    assert err.splitlines()[-1].startswith("bigkern: error: ")
    return err


# What is learnt


def test_losses_agree_with_torch_for_60_steps():
    config = replace(SMALL, epochs=8, lr=2e-3)  # at 0.01 a difference grows a thousandfold
    ours = train(text_task(config, TEXT), config).losses
    plain = replace(config, attention="torch", optimizer="torch")
    theirs = train(text_task(plain, TEXT), plain).losses
    assert len(ours) == 8 * STEPS >= 60
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert ours[0] == pytest.approx(math.log(256), abs=0.1)
    assert ours[-1] < 3


@pytest.mark.parametrize("amp", [False, True])
def test_accumulated_gradients_are_those_of_the_batch(amp):
    task = text_task(SMALL, TEXT)
    batch = list(task.batch(torch.arange(4)))
    grads = []
    for accumulate in (1, 4, 3):  # 3: parts of 2, 2
        torch.manual_seed(0)
        model = task.build_model().double() if not amp else task.build_model()
        config = replace(SMALL, batch_size=4, accumulate=accumulate, amp=amp)
        scaler = torch.amp.GradScaler("cpu", enabled=amp)
        loss = compute_gradients(task, config, batch, model, scaler)
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()] + [loss[None]]))
    for other in grads[1:]:
        difference = (other - grads[0]).norm() / grads[0].norm()
        assert difference < (2**-7 if amp else 1e-13)


def test_accumulation_over_4_trains_like_a_batch_of_4():
    config = replace(SMALL, batch_size=4, epochs=1, lr=2e-3)
    whole = train(text_task(config, TEXT), config)
    parts = train(text_task(config, TEXT), replace(config, accumulate=4))
    assert parts.losses == pytest.approx(whole.losses, rel=1e-4)
    assert len(parts.losses) == math.ceil(124 / 4)


def test_scores_are_the_mean_over_the_text():
    torch.manual_seed(0)
    model = Transformer(SMALL.model()).eval()
    text = TEXT.validation[: 24 * 40 + 20]  # 40 sequences, in batches of 16
    scores = text_scores(model, text)
    losses = [
        F.cross_entropy(model(text[None, i : i + 24].long())[0], text[i + 1 : i + 25].long()).item()
        for i in range(0, 24 * 40, 24)
    ]
    assert scores["validation_loss"] == pytest.approx(sum(losses) / 40, rel=1e-5)
    assert scores["bits_per_byte"] == pytest.approx(sum(losses) / 40 / math.log(2), rel=1e-5)


@pytest.mark.slow
def test_default_run_classifies_the_digits():
    summary = run(TransformerTrainConfig.for_objective(objective="classify", device="cpu"))
    assert summary.test_accuracy > 0.95


def test_classifying_learns(tmp_path, capsys):
    quick = ["--epochs", "1", "--dim", "64", "--out", str(tmp_path)]
    assert main([*TRAIN, "--task", "classify", *quick]) == 0
    out = capsys.readouterr().out
    assert "images per second" in out
    assert json.loads((tmp_path / "summary.json").read_text())["test_accuracy"] > 0.3
    assert "holds a model that classifies images" in fails(
        capsys, "generate", tmp_path, "--prompt", "x"
    )


# Stopping and going on


@pytest.mark.parametrize("stop", [1, 11, STEPS])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, monkeypatch, stop):
    config = replace(SMALL, dropout=0.1, accumulate=3, amp=True)
    orders = []

    def task(stop=None):
        task, seen = text_task(config, TEXT), []

        def batch(indices):
            seen.append(indices.tolist())
            orders.append(seen[-1])
            if len(seen) == stop:
                signal.raise_signal(signal.SIGINT)
            return task.batch(indices)

        return replace(task, batch=batch)

    whole = train(task(), config)
    order = orders.copy()
    orders.clear()
    with pytest.raises(KeyboardInterrupt):
        train(task(stop), config, tmp_path)
    rest = train(task(), config, tmp_path, resume=True)
    assert orders == order
    assert rest.losses == whole.losses[stop:]
    assert torch.equal(parameters(rest.model), parameters(whole.model))
    assert steps_logged(tmp_path) == list(range(1, 3 * STEPS + 1))


def test_another_text_is_refused(tmp_path, capsys):
    config = replace(SMALL, epochs=1)
    train(text_task(config, TEXT), config, tmp_path)
    with pytest.raises(UserError, match="no usable checkpoint"):
        train(text_task(config, replace(TEXT, digest="other")), config, tmp_path, resume=True)
    assert "its text is digest, not other" in capsys.readouterr().err


def test_epochs_stretch_a_cosine_and_are_fixed_with_it(finished, capsys):
    message = fails(capsys, "train", "transformer", "--resume", finished, "--epochs", "3")
    assert "has epochs 2, not 3" in message


# The command line


def test_a_run_reports_what_it_is_judged_by(finished, text_file, tmp_path, capsys):
    assert main([*QUICK, "--text", text_file, "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert re.search(r"Text: [\d,]+ bytes to train on, [\d,]+ held out", out)
    assert "Epoch [1/2], Step [1/" in out
    assert re.search(r"Validation loss: \d\.\d{4}, \d\.\d{4} bits per byte", out)
    assert re.search(r"Time per step: .* ms, [\d,]+ tokens per second", out)
    assert "Peak memory: " in out
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["bits_per_byte"] < 4
    assert summary["tokens_per_second"] == pytest.approx(16 * 24e3 / summary["ms_per_step"])
    lines = (finished / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["validation_loss"] == summary["validation_loss"]


def test_generate_goes_on_with_the_prompt(finished, capsys):
    def written(*options):
        assert main(["generate", str(finished), "--prompt", "x4é", *options]) == 0
        return capsys.readouterr().out.removesuffix("\n")

    text = written("--seed", "1")
    assert text.startswith("x4é")
    assert text == written("--seed", "1") != written("--seed", "2")
    assert len(written("--temperature", "0", "--max-new-tokens", "5").encode()) == 9
    assert written("--top-k", "1") == written("--top-p", "1e-9") == written("--temperature", "0")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "x" * 25], r"fit the context of 24 tokens, got 25 + 1"),
        (["--prompt", "xy", "--max-new-tokens", "23"], "got 2 + 23"),
        (["--prompt", ""], "at least one token"),
        (["--prompt", "x", "--temperature", "-1"], "temperature must be a number from 0 up"),
        (["--prompt", "x", "--top-k", "0"], "top_k must be at least 1"),
        (["--prompt", "x", "--top-p", "2"], "top_p must be above 0"),
        (["--prompt", "x", "--seed", "-1"], "seed must be in [0, 2**63)"),
        (["--prompt", "x", "--device", "tpu"], "device must be auto, cpu, cuda or cuda:N"),
    ],
)
def test_bad_generate_options_have_a_message(finished, capsys, options, message):
    assert message in fails(capsys, "generate", finished, *options)


def test_a_checkpoint_of_another_vocabulary(finished, tmp_path, capsys):
    source = list_checkpoints(finished)[0]
    rewrite_checkpoint(source, tmp_path, lambda state: state["identity"].update(vocab_size=99))
    message = fails(capsys, "generate", tmp_path, "--prompt", "x")
    assert "its vocab_size is 99, not 256" in message
    rewrite_checkpoint(source, tmp_path, lambda state: state["config"].update(dim=48))
    assert "its state doesn't fit" in fails(capsys, "generate", tmp_path, "--prompt", "x")
    assert "there is no folder" in fails(capsys, "generate", tmp_path / "no", "--prompt", "x")
    flip_a_bit(list_checkpoints(tmp_path)[0])
    assert "no usable checkpoint" in fails(capsys, "generate", tmp_path, "--prompt", "x")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "/nowhere"], "cannot read /nowhere"),
        (["--context", "5000000"], "context must be shorter than the text"),
        (["--num-heads", "5"], "num_heads must divide dim 128, got 5"),
        (["--accumulate", "0"], "accumulate must be at least 1"),
        (["--warmup-steps", "-1"], "warmup_steps must be at least 0"),
        (["--optimizer", "sgd"], "decoupled_weight_decay is not an option of the optimizer sgd"),
        (["--task", "classify", "--text", "x"], "text is an option of the task lm"),
        (["--task", "classify", "--context", "9"], "context must be the 28 rows of an image"),
        (["--compare", "--attention", "torch"], "--compare can't be combined with"),
        (
            ["--attention", "torch", "--optimizer", "torch", "--backend", "native"],
            "backend is an option of",
        ),
    ],
)
def test_bad_options_have_a_message(capsys, options, message):
    assert message in fails(capsys, *TRAIN, *options)


def test_compare_shows_both_side_by_side(text_file, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the two processes
    assert main([*QUICK, "--text", text_file, "--compare", "--out", str(tmp_path)]) == 0
    lines = capfd.readouterr().out.splitlines()
    rows = {line[:20].strip(): line.split()[-2:] for line in lines}
    assert all(float(cell.replace(",", "")) > 0 for cell in rows["tokens per second"])
    for title in ("peak memory (MiB)", "bits per byte", "final loss"):
        ours, theirs = (float(cell.replace(",", "")) for cell in rows[title])
        assert 0.5 < ours / theirs < 2
    assert float(lines[-1].split()[5]) < 1e-3
    for name in "bigkern", "torch":
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["attention"] == config["optimizer"] == name
