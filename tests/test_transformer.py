"""The reference Transformer against plain torch: its logits, its gradients, its parts."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformer_helpers import DECODER, ENCODER, L, V, make

from bigkern.models import Transformer, TransformerConfig
from bigkern.testing import assert_as_accurate

pytestmark = pytest.mark.usefixtures("one_thread")


def plain_causal(model, tokens):
    """A causal model in plain torch, of the same parameters."""
    p, config = dict(model.named_parameters()), model.config
    B, L = tokens.shape
    E = config.dim // config.num_heads

    def linear(name, x):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(name, x):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * p[f"{name}.weight"] + p[f"{name}.bias"]

    def turn(x):  # as complex numbers
        if config.positions == "learned":
            return x
        powers = torch.arange(E // 2, dtype=torch.float64) * 2 / E
        angle = torch.arange(L, dtype=torch.float64)[:, None] / 10000**powers
        pairs = torch.complex(x[..., : E // 2].double(), x[..., E // 2 :].double())
        turned = pairs * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([turned.real, turned.imag], -1).to(x.dtype)

    def attention(name, x):
        q, k, v = linear(f"{name}.qkv", x).split(config.dim, dim=-1)
        q, k, v = (y.reshape(B, L, -1, E).transpose(1, 2) for y in (q, k, v))
        scores = turn(q) @ turn(k).mT / math.sqrt(E)
        scores = scores.masked_fill(torch.ones(L, L).triu(1).bool(), -torch.inf)
        return linear(f"{name}.out", (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, L, -1))

    def feed_forward(name, x):
        return linear(f"{name}.2", linear(f"{name}.0", x).clamp(min=0))

    x = p["embedding.weight"][tokens]
    if config.positions == "learned":
        x = x + p["position.weight"][:L]
    for i in range(config.num_blocks):
        for part, function in (("attention", attention), ("feed_forward", feed_forward)):
            name = f"blocks.{i}.{part}"
            if config.norm_first:
                x = x + function(name, norm(f"{name}_norm", x))
            else:
                x = norm(f"{name}_norm", x + function(name, x))
    return linear("head", norm("norm", x) if config.norm_first else x)


def torch_encoder(model):
    """torch's own layers with the parameters of an encoder."""
    config = model.config
    blocks = []
    for block in model.blocks:
        layer = nn.TransformerEncoderLayer(
            config.dim, config.num_heads, 4 * config.dim, dropout=0.0, batch_first=True,
            norm_first=config.norm_first, dtype=model.head.weight.dtype,
        )  # fmt: skip
        attention = layer.self_attn
        attention.in_proj_weight, attention.in_proj_bias = block.attention.qkv.parameters()
        attention.out_proj = block.attention.out
        layer.norm1, layer.norm2 = block.attention_norm, block.feed_forward_norm
        layer.linear1, layer.linear2 = block.feed_forward[0], block.feed_forward[2]
        blocks.append(layer)

    def forward(x):
        x = model.embedding(x) + model.position.weight[: x.size(1)]
        for layer in blocks:
            x = layer(x)
        return model.head(model.norm(x).mean(dim=1))

    return forward


def assert_alike(config, plain, inputs):
    """Logits and gradients of the model are as accurate as those of `plain(model)`."""
    found = []
    for dtype, run in ((torch.float32, None), (torch.float64, plain), (torch.float32, plain)):
        model = make(config, dtype)
        x = inputs.to(dtype) if inputs.is_floating_point() else inputs
        logits = model(x) if run is None else run(model)(x)
        grads = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
        found.append([logits, *grads])
    for i, tensors in enumerate(zip(*found, strict=True)):
        assert_as_accurate(*tensors, factor=3.0 if i else 2.0)


@pytest.mark.parametrize("attention", ["bigkern", "torch"])
@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("norm_first", [True, False], ids=["pre", "post"])
def test_language_model_equals_plain_torch(norm_first, positions, attention):
    config = replace(DECODER, norm_first=norm_first, positions=positions, attention=attention)
    tokens = torch.randint(V, (3, L))
    assert_alike(config, lambda model: lambda x: plain_causal(model, x), tokens)


@pytest.mark.parametrize("attention", ["bigkern", "torch"])
@pytest.mark.parametrize("norm_first", [True, False], ids=["pre", "post"])
def test_encoder_equals_torchs_layers(norm_first, attention):
    config = replace(ENCODER, norm_first=norm_first, attention=attention)
    assert_alike(config, torch_encoder, torch.randn(3, L, 7))


def test_encoder_of_tokens():
    config = replace(DECODER, num_classes=5)
    assert_alike(config, torch_encoder, torch.randint(V, (2, 1)))


@pytest.mark.parametrize("length", [1, 7, 24])
def test_later_tokens_change_nothing(length):
    model = make(DECODER)
    tokens = torch.randint(V, (2, 24))
    whole = model(tokens)
    assert whole.shape == (2, 24, V)
    tokens[:, length:] = 0
    torch.testing.assert_close(model(tokens)[:, :length], whole[:, :length], rtol=0, atol=0)


@pytest.mark.parametrize("config", [DECODER, ENCODER])
def test_no_sequence_gives_no_logits(config):
    shape = (0, 5) if config.num_features is None else (0, 5, 7)
    inputs = torch.zeros(shape, dtype=torch.int64 if len(shape) == 2 else torch.float32)
    assert make(config)(inputs).shape == ((0, 5, V) if len(shape) == 2 else (0, 5))


def test_default_is_eight_heads_of_64():
    with torch.device("meta"):
        model = Transformer(TransformerConfig())
    assert (model.config.num_heads, model.config.head_dim) == (8, 64)
    assert model.blocks[5].attention.qkv.weight.shape == (1536, 512)


def test_the_start_predicts_nothing_yet():
    torch.manual_seed(0)
    logits = Transformer(DECODER)(torch.randint(V, (2, L)))
    loss = F.cross_entropy(logits.flatten(0, 1), torch.randint(V, (2 * L,)))
    assert loss.item() == pytest.approx(math.log(V), abs=0.05)
    blocks = Transformer(replace(DECODER, num_blocks=8, dim=480)).blocks
    first, last = blocks[0].feed_forward[0].weight.std(), blocks[0].feed_forward[2].weight.std()
    assert (last / first).item() == pytest.approx(0.25, rel=0.02)  # 1 / sqrt(2 * 8)


def test_dropout_acts_in_training_only():
    model, without = make(replace(DECODER, dropout=0.5)), make(DECODER)
    tokens = torch.randint(V, (2, L))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    torch.testing.assert_close(model(tokens), without(tokens), rtol=0, atol=0)


def test_autocast():
    model, tokens = make(DECODER), torch.randint(V, (2, L))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens)
    assert logits.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        baseline = make(replace(DECODER, attention="torch"))(tokens)
    assert_as_accurate(logits, make(DECODER, torch.float64)(tokens), baseline)


def test_compiles_without_a_break():
    model, tokens = make(DECODER), torch.randint(V, (2, L))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens), model(tokens))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 0}, "context must be at least 1, got 0"),
        ({"num_heads": 7}, "num_heads must divide dim 48, got 7"),
        ({"num_classes": 0}, "num_classes must be None or at least 1, got 0"),
        ({"num_features": 3}, "num_features needs num_classes"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"positions": "sine"}, "positions must be one of learned, rotary, got 'sine'"),
        ({"attention": "flash"}, "attention must be one of bigkern, torch, got 'flash'"),
        ({"positions": "rotary", "num_heads": 16}, "even head size, got 3"),
    ],
)
def test_bad_configs(options, message):
    with pytest.raises(ValueError, match=message):
        replace(DECODER, **options)


@pytest.mark.parametrize(
    ("config", "shape", "message"),
    [
        (DECODER, (2, 25), r"from 1 to 24 tokens \(the context is 24, 0 are cached\), got 25"),
        (DECODER, (2, 0), "from 1 to 24 tokens"),
        (DECODER, (25,), r"must have shape \[B, L\], got \[25\]"),
        (ENCODER, (2, 5), r"must have shape \[B, L, 7\], got \[2, 5\]"),
        (ENCODER, (2, 5, 6), r"must have shape \[B, L, 7\], got \[2, 5, 6\]"),
    ],
)
def test_other_shapes_are_refused(config, shape, message):
    with pytest.raises(ValueError, match=message):
        make(config)(torch.zeros(shape, dtype=torch.int64))
