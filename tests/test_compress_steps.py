"""The steps of `bigkern compress`, and its measures, on models of their own."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from helpers import SMALL, small_task
from torch import nn

from bigkern.models import SimpleCNN, Transformer, TransformerConfig
from bigkern.nn import Int8Conv2d, Int8Linear
from bigkern.testing import assert_as_accurate
from bigkern.train import distillation, measure, pruning
from bigkern.train.cnn import build_task
from bigkern.train.config import CnnConfig
from bigkern.train.data import load_digits
from bigkern.train.errors import UserError
from bigkern.train.loop import train
from bigkern.train.quantization import quantize_

pytestmark = pytest.mark.usefixtures("one_thread")


def test_channels_of_the_whole_model_are_compared_in_units_of_their_layer():
    model = SimpleCNN()
    with torch.no_grad():
        for layer in (model.conv1, model.fc1):
            layer.weight.fill_(1.0)
            layer.weight[:8] *= 0.1
    pruning.prune_channels_(model, 16 / 160, "global")
    assert pruning.count_channels(model) == {"conv1": 24, "fc1": 120}
    assert model.conv1.weight.min() == model.fc1.weight.min() == 1


def test_features_of_a_transformer_are_gone():
    model = Transformer(TransformerConfig(context=8, dim=16, num_heads=2, num_blocks=2)).eval()
    tokens = torch.randint(256, (2, 8))
    masked = copy.deepcopy(model)
    pruning.prune_channels_(model, 0.25, "layer")
    assert pruning.count_channels(model) == dict.fromkeys(model.channels(), 48)
    for name in model.channels():
        layer = masked.get_submodule(name)
        lost = layer.weight.detach().norm(dim=1).argsort()[:16]
        layer.weight.data[lost], layer.bias.data[lost] = 0, 0
    with torch.no_grad():
        assert_as_accurate(model(tokens), copy.deepcopy(masked).double()(tokens), masked(tokens))


def test_zeros_stay_while_the_rest_learns():
    model = small_task().build_model()
    with torch.no_grad():
        model[0].weight[::2] = 0
    before = copy.deepcopy(model)
    with pruning.zeros_kept(model):
        train(replace(small_task(), build_model=lambda: model), replace(SMALL, weight_decay=0.1))
    assert not model[0].weight[::2].any()
    assert (model[0].weight[1::2] != before[0].weight[1::2]).all()
    assert not torch.equal(model[3].weight, before[3].weight)
    assert model.state_dict().keys() == before.state_dict().keys()


def test_the_soft_loss_by_hand():
    """Two classes, whose log odds are divided by the temperature 2."""
    p, q = 1 / (1 + math.exp(-1.0)), 1 / (1 + math.exp(0.5))  # teacher, student: of the first
    expected = 4 * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))
    student, teacher = torch.tensor([[0.0, 1.0]] * 3), torch.tensor([[2.0, 0.0]] * 3)
    loss = distillation.soft_loss(student, teacher, 2.0)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    sequences = (x.expand(5, 3, 2) for x in (student, teacher))
    assert distillation.soft_loss(*sequences, 2.0).item() == pytest.approx(expected, rel=1e-6)


def test_labels_and_teacher_are_weighed_and_the_teacher_gets_no_gradient():
    student, teacher = SimpleCNN(), SimpleCNN()
    task = build_task(CnnConfig(), load_digits())
    taught = distillation.distillation_task(task, teacher.train(), 3.0, 0.25)
    batch = task.batch(torch.arange(8))
    loss = taught.loss(student, *batch)
    soft = distillation.soft_loss(student(batch[0]), teacher(batch[0]), 3.0)
    expected = 0.25 * soft + 0.75 * task.loss(student, *batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())
    assert not teacher.training


@pytest.mark.parametrize("mode", ["dynamic", "static", "weight_only"])
def test_which_layers_become_int8(mode):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3), nn.Linear(31, 9), nn.Linear(32, 9)
    )
    quantize_(model, mode)
    conv = nn.Conv2d if mode == "weight_only" else Int8Conv2d
    assert [type(layer) for layer in model] == [nn.Conv2d, conv, nn.Linear, Int8Linear]
    assert model[3].mode == mode


def test_weights_that_cannot_be_quantized():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    nn.init.constant_(model[1].weight, math.nan)
    with pytest.raises(UserError, match=r"can't be quantized: 1: .*finite"):
        quantize_(model, "dynamic")


def test_peak_memory_is_that_of_weights_and_what_a_call_takes():
    model = nn.Sequential(nn.Linear(1024, 2048), nn.Linear(2048, 1))
    peak = measure.peak_memory_mib(model, torch.randn(4096, 1024))
    if peak is None:
        pytest.skip("needs Linux's /proc")
    assert 39 < peak < 44  # 8 and 32, but for pages that were there


def test_latencies_are_of_their_models(monkeypatch):
    class Slow(nn.Module):
        def forward(self, x):
            calls.append(len(x))
            return x

    monkeypatch.setattr(measure, "SECONDS", 0.0)
    calls = []
    quick, slow = measure.latencies_ms([nn.Identity(), Slow()], torch.zeros(3, 1))
    assert calls == [3] * (measure.WARM_UP_CALLS + measure.MIN_CALLS)
    assert quick.keys() == slow.keys() == {"median", "p95"}
