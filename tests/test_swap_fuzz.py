"""A thousand random modules through swap and undo."""

import random

import pytest
import torch
import torch.nn.functional as F
from swap_helpers import Attention, snapshot
from torch import nn

import bigkern
from bigkern.nn import Int8Conv2d, Int8Linear, MultiheadAttention

DIM = 8  # every module maps [N, L, DIM] to the same shape
pytestmark = pytest.mark.usefixtures("one_thread")


class SelfAttention(nn.Module):
    def __init__(self, rng):
        super().__init__()
        self.need_weights = rng.random() < 0.5
        self.attention = nn.MultiheadAttention(
            DIM, 2, bias=rng.random() < 0.5, add_zero_attn=rng.random() < 0.5, batch_first=True
        )

    def forward(self, x):
        return self.attention(x, x, x, need_weights=self.need_weights)[0]


class Convolution(nn.Module):
    def __init__(self, rng):
        super().__init__()
        mode = rng.choice(["zeros", "reflect", "circular"])
        self.conv = nn.Conv2d(1, 1, 3, padding=1, padding_mode=mode, bias=rng.random() < 0.5)

    def forward(self, x):
        return self.conv(x.unsqueeze(1)).squeeze(1)


class Residual(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x)


class ReadsWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(DIM, DIM)

    def forward(self, x):
        return F.linear(x, self.fc.weight, self.fc.bias)


class Subclass(nn.Linear):
    pass


def random_module(rng, made, depth=0):
    """`made` are those before it, of which some come again."""

    def inner():
        return random_module(rng, made, depth + 1)

    def tied():
        layers = [m for m in made if type(m) is nn.Linear]
        layer = nn.Linear(DIM, DIM)
        if layers:
            layer.weight = rng.choice(layers).weight
        return layer

    def encoder_layer():
        first = rng.random() < 0.5
        return nn.TransformerEncoderLayer(
            DIM, 2, 16, dropout=0.0, batch_first=True, norm_first=first
        )

    leaves = [
        lambda: nn.Linear(DIM, DIM, bias=rng.random() < 0.5),
        lambda: SelfAttention(rng),
        lambda: Attention(DIM, 2),
        lambda: Convolution(rng),
        lambda: nn.Sequential(nn.LayerNorm(DIM), nn.GELU()),
        lambda: Subclass(DIM, DIM),
        lambda: rng.choice(made) if made else nn.Identity(),
        ReadsWeight,
        tied,
        encoder_layer,
        lambda: nn.TransformerEncoder(encoder_layer(), rng.randint(1, 2)),
    ]
    trees = [
        lambda: nn.Sequential(*(inner() for _ in range(rng.randint(1, 3)))),
        lambda: Residual(inner()),
    ]
    module = rng.choice(leaves if depth == 3 else leaves + 6 * trees)()
    made.append(module)
    return module


@pytest.mark.parametrize("block", range(10))
def test_swap_and_undo(block):
    num_swapped = 0
    for seed in range(100 * block, 100 * (block + 1)):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        model = random_module(rng, [])
        calls = []
        for module in model.modules():
            module.train(rng.random() < 0.5)
            if rng.random() < 0.1:
                module.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        x = torch.randn(2, 5, DIM)
        with torch.no_grad():
            expected = model(x)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        before, num_calls = snapshot(model), len(calls)

        reads = any(isinstance(module, ReadsWeight) for module in model.modules())
        report = bigkern.swap(
            model,
            attention=rng.random() < 0.5,
            linear=rng.choice([None, "int8", "int8_training"]),
            conv2d=rng.choice([None, "int8"]),
            inputs=x if reads or rng.random() < 0.5 else None,
        )
        with torch.no_grad():
            out = model(x)
        assert out.shape == expected.shape, seed
        assert out.isfinite().all(), seed
        is_exact = not any(isinstance(m, Int8Linear | Int8Conv2d) for m in model.modules())
        assert is_exact or model.state_dict().keys() != state.keys(), seed
        num_swapped += any(isinstance(m, MultiheadAttention) for m in model.modules())

        report.undo()
        assert snapshot(model) == before, seed
        calls.clear()
        with torch.no_grad():
            assert torch.equal(model(x), expected), seed
        assert len(calls) == num_calls, seed
        now = model.state_dict()
        assert now.keys() == state.keys(), seed
        assert all(torch.equal(now[name], value) for name, value in state.items()), seed
    assert num_swapped > 10
