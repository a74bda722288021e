"""Training Hugging Face models with bigkern's attention and optimizer."""

import pytest
import torch
from transformers_helpers import (
    LAYERS,
    VOCABULARY,
    Calls,
    build,
    draw_tokens,
    transformers,
    with_attention,
)

import bigkern
from bigkern.testing import assert_as_accurate

accelerate = pytest.importorskip("accelerate")
pytestmark = pytest.mark.usefixtures("one_thread")


def loss_and_gradients(model, inputs):
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    grads = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return loss.detach(), grads


@pytest.mark.parametrize("name", ["llama", "mistral", "bert"])
def test_gradient_checkpointing(name):
    model = build(name, "bigkern").train()
    inputs, _ = draw_tokens("left")
    expected = loss_and_gradients(model, inputs)
    model.gradient_checkpointing_enable()
    with Calls() as calls:
        found = loss_and_gradients(model, inputs)
    assert len(calls.forward) == 2 * LAYERS  # once more in the backward
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(
    ("name", "padding"),
    [
        ("llama", None),
        ("mistral", "left"),
        pytest.param("bert", "left", marks=pytest.mark.slow),
    ],
)
def test_compiles_in_one_piece(name, padding):
    torch.compiler.reset()
    model = build(name, "bigkern", num_hidden_layers=1).train()
    inputs, _ = draw_tokens(padding)
    plain = loss_and_gradients(with_attention(model, "eager"), inputs)
    exact = loss_and_gradients(with_attention(model, "sdpa", torch.float64), inputs)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss_and_gradients(compiled, inputs)
    with torch.profiler.profile() as profile:
        found = loss_and_gradients(compiled, inputs)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["bigkern::attention"] == counts["bigkern::attention_backward"] == 1
    for actual, expected, baseline, factor in zip(found, exact, plain, (2.0, 3.0), strict=True):
        assert_as_accurate(actual, expected, baseline, factor)


class Sequences(torch.utils.data.Dataset):
    """Each counts on from its first token."""

    def __len__(self):
        return 32

    def __getitem__(self, index):
        tokens = 3 + (index + torch.arange(8)) % (VOCABULARY - 3)
        return {"input_ids": tokens, "labels": tokens}


def make_trainer(folder, max_steps, **options):
    model = build("llama", "bigkern")
    arguments = transformers.TrainingArguments(
        output_dir=folder,
        max_steps=max_steps,
        per_device_train_batch_size=8,
        save_steps=6,
        logging_steps=1,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    optimizer = bigkern.optim.AdamW(model.parameters(), lr=5e-3)
    return transformers.Trainer(
        model, arguments, train_dataset=Sequences(), optimizers=(optimizer, None)
    )


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer(tmp_path):
    """And on from a checkpoint, to the same parameters."""
    whole = make_trainer(tmp_path / "whole", 12)
    with Calls() as calls:
        whole.train()
    assert len(calls.forward) == calls.num_backward == 12 * LAYERS
    losses = losses_of(whole)
    assert losses[-1] < 0.7 * losses[0]

    make_trainer(tmp_path / "cut", 6).train()
    rest = make_trainer(tmp_path / "cut", 12)
    rest.train(resume_from_checkpoint=True)
    for mine, expected in zip(rest.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, expected)
    assert losses_of(rest) == losses


def prepare(folder=None):
    accelerator = accelerate.Accelerator(cpu=True)
    model = build("bert", "bigkern").train()
    optimizer = bigkern.optim.AdamW(model.parameters(), lr=5e-3)
    batches = torch.utils.data.DataLoader(Sequences(), batch_size=8)
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    if folder is not None:
        accelerator.load_state(folder)
    return accelerator, model, optimizer, batches


def train(accelerator, model, optimizer, batches):
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_accelerate(tmp_path):
    """And on from a state, to the same losses."""
    parts = prepare()
    with Calls() as calls:
        first = train(*parts)
    assert len(calls.forward) == calls.num_backward == len(first) * LAYERS
    parts[0].save_state(tmp_path)
    second = train(*parts)
    assert second[-1] < first[0]
    assert train(*prepare(tmp_path)) == second
