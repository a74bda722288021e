"""The proof of a swap: errors by layer, time, memory and size."""

import copy
import json
import math

import pytest
import torch
from swap_helpers import Attention, snapshot
from torch import nn

import bigkern
from bigkern.nn.compare import Error

pytestmark = pytest.mark.usefixtures("one_thread")


class Model(nn.Module):
    """Calls a layer twice, and returns tensors in a dict."""

    def __init__(self):
        super().__init__()
        self.first, self.twice = nn.Linear(16, 16), nn.Linear(16, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.dropout = nn.Dropout()

    def forward(self, x):
        x = self.twice(torch.relu(self.twice(self.dropout(self.first(x)))))
        out, weights = self.attention(x, x, x)
        return {"out": out, "weights": weights, "name": "a model"}


def swapped_copy(model, **options):
    swapped = copy.deepcopy(model)
    bigkern.swap(swapped, **options)
    return swapped


def error(expected, actual):
    expected, actual = (torch.cat([x.flatten().double() for x in y]) for y in (expected, actual))
    return ((actual - expected).norm() / expected.norm()).item()


def test_errors():
    model, x = Model(), torch.randn(3, 5, 16)
    model.attention.eval()
    swapped = swapped_copy(model, linear="int8")
    before = snapshot(model), snapshot(swapped)
    found = bigkern.compare(model, swapped, {"x": x}, num_calls=1)
    assert (snapshot(model), snapshot(swapped)) == before

    a, b = copy.deepcopy(model).eval(), copy.deepcopy(swapped).eval()
    with torch.no_grad():
        h = a.first(x)
        h1 = a.twice(h)
        h2 = a.twice(h1.relu())
        g = b.first(x)
        g1 = b.twice(g)
        g2 = b.twice(g1.relu())
        wanted = {
            "first": (error([h], [g]),) * 2,
            "twice": (
                error([h1, h2], [g1, g2]),
                error([h1, h2], [b.twice(h), b.twice(h1.relu())]),
            ),
            "attention": (
                error(a.attention(h2, h2, h2), b.attention(g2, g2, g2)),
                error(a.attention(h2, h2, h2), b.attention(h2, h2, h2)),
            ),
        }
    assert [layer.name for layer in found.layers] == list(wanted)
    for layer in found.layers:
        for mine, relative in zip((layer.error, layer.alone), wanted[layer.name], strict=True):
            assert mine.relative == pytest.approx(relative, rel=1e-6)
            assert mine.sqnr == pytest.approx(-20 * math.log10(relative))
    assert found.output.relative == pytest.approx(wanted["attention"][0], rel=1e-6)
    assert found.layers[2].was == "torch.nn.MultiheadAttention"
    assert found.layers[2].now == "bigkern.nn.MultiheadAttention"


def test_equal_models():
    model = Model()
    found = bigkern.compare(model, copy.deepcopy(model), torch.randn(3, 5, 16))
    assert found.layers == []
    assert found.output == Error(0.0, math.inf)
    assert str(found).splitlines()[1].split() == ["the", "output", "equal"]


def test_attention_inside_is_compared():
    model = nn.Sequential(Attention(16, 2), nn.Linear(16, 16))
    found = bigkern.compare(
        model, swapped_copy(model, attention=True), torch.randn(3, 5, 16), num_calls=1
    )
    (layer,) = found.layers
    assert (layer.name, layer.was) == ("0", "Attention")
    assert layer.now == "Attention with bigkern's attention inside"
    assert found.output.relative < 1e-6


def test_a_fused_encoder_is_compared_by_layer():
    """torch's would call its layers with nested tensors, or not at all."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    batch = {"src": torch.randn(2, 5, 16), "src_key_padding_mask": padding}
    found = bigkern.compare(model, swapped_copy(model, linear="int8"), batch, num_calls=1)
    names = [f"layers.{i}.{name}" for i in (0, 1) for name in ("self_attn", "linear1", "linear2")]
    assert [layer.name for layer in found.layers] == names
    assert all(layer.alone.sqnr > 35 for layer in found.layers)
    assert torch.backends.mha.get_fastpath_enabled()


class Widens(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor, self.weight = factor, nn.Parameter(torch.ones(1 << 18))
        self.register_buffer("hidden", torch.ones(1 << 18, dtype=torch.int8), persistent=False)

    def forward(self, x):
        return x.repeat(self.factor).sum()


def test_costs():
    x = torch.ones(1 << 20)  # 4 MiB
    found = bigkern.compare(Widens(4), Widens(16), x, num_calls=3)
    assert found.before.size_bytes == found.after.size_bytes == 5 << 18
    for cost, mib in ((found.before, 16), (found.after, 64)):
        assert mib - 2 <= cost.peak_bytes / 2**20 <= mib + 2
        assert 0 < cost.quartiles[0] <= cost.seconds <= cost.quartiles[1]
    title, *cells = str(found).splitlines()[-1].split()
    assert (title, cells) == ("size", ["1.25", "MiB", "1.25", "MiB", "1.00"])


def test_as_dict():
    model = Model()
    found = bigkern.compare(model, swapped_copy(model), torch.randn(3, 5, 16), num_calls=1)
    as_dict = json.loads(json.dumps(found.as_dict()))
    assert as_dict["layers"][0]["name"] == "attention"
    assert as_dict["output"]["relative"] == found.output.relative
    assert as_dict["after"]["seconds"] == found.after.seconds


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, x: bigkern.compare(m, m, x), ValueError, "swapped must be another module"),
        (lambda m, x: bigkern.compare(m, "m", x), TypeError, "swapped must be a torch.nn.Module"),
        (lambda m, x: bigkern.compare([m], m, x), TypeError, "model must be a torch.nn.Module"),
        (
            lambda m, x: bigkern.compare(m, copy.deepcopy(m), x, num_calls=0),
            ValueError,
            "num_calls must be at least 1, got 0",
        ),
        (
            lambda m, x: bigkern.compare(nn.Linear(16, 3), nn.Linear(16, 4), x),
            ValueError,
            r"swapped must give outputs of shapes \[\[2, 3\]\], got \[\[2, 4\]\]",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call(nn.Linear(16, 16), torch.randn(2, 16))
