"""bigkern.nn.MultiheadAttention inside torch's own Transformers."""

import copy

import pytest
import torch
from torch import nn

from bigkern.nn import MultiheadAttention
from bigkern.testing import assert_as_accurate

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
]
N, L, S, E, H = 2, 17, 23, 32, 4
CAUSAL = nn.Transformer.generate_square_subsequent_mask(L)
PADDING = torch.arange(L) >= torch.tensor([[L], [L - 4]])


def swap(model):
    """A copy with our layers."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.MultiheadAttention):
                setattr(module, name, MultiheadAttention.from_torch(child))
    return model


def assert_models_alike(model, arguments, train):
    """Of outputs, and in training of gradients, in float32 and in evaluation too."""
    model.train(train)
    found = []
    for module, dtype in (
        (swap(model), torch.float32),
        (copy.deepcopy(model).double(), torch.float64),
        (model, torch.float32),
    ):
        cast = {
            name: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for name, x in arguments.items()
        }
        with torch.set_grad_enabled(train):
            outs = [module(**cast)]
        if train:
            outs += torch.autograd.grad(outs[0].square().sum(), list(module.parameters()))
        found.append(outs)
    for i, tensors in enumerate(zip(*found, strict=True)):
        assert_as_accurate(*tensors, factor=3.0 if i else 2.0)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    "masks",
    [
        {},
        {"mask": CAUSAL},
        {"mask": CAUSAL, "is_causal": True},
        {"src_key_padding_mask": PADDING},  # evaluated, torch makes a nested tensor of it
        {"src_key_padding_mask": PADDING, "mask": CAUSAL < 0},
    ],
    ids=lambda masks: "+".join(masks),
)
def test_in_torchs_encoder(masks, batch_first, norm_first, train):
    layer = nn.TransformerEncoderLayer(
        E, H, 64, dropout=0.0, batch_first=batch_first, norm_first=norm_first
    )
    src = torch.randn((N, L, E) if batch_first else (L, N, E))
    assert_models_alike(nn.TransformerEncoder(layer, 2), {"src": src, **masks}, train)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "masks",
    [
        {"tgt_mask": CAUSAL, "tgt_is_causal": True},
        {"tgt_mask": CAUSAL, "tgt_key_padding_mask": PADDING * -9.0},
        {"tgt_mask": CAUSAL < 0, "tgt_key_padding_mask": PADDING, "tgt_is_causal": True},
    ],
    ids=lambda masks: "+".join(masks),
)
def test_in_torchs_transformer(masks, train):
    model = nn.Transformer(E, H, 1, 1, 64, dropout=0.0, batch_first=True)
    arguments = {
        "src": torch.randn(N, S, E),
        "tgt": torch.randn(N, L, E),
        "memory_key_padding_mask": torch.arange(S) >= torch.tensor([[S - 3], [S]]),
    }
    assert_models_alike(model, arguments | masks, train)


def ops_of(function, *args):
    with torch.profiler.profile() as profile:
        function(*args)
    return {event.key for event in profile.key_averages()}


def test_torchs_encoder_runs_this_layer_when_evaluated():
    layer = nn.TransformerEncoderLayer(E, H, 64, batch_first=True).eval()
    x = torch.randn(N, L, E)
    with torch.no_grad():
        assert "aten::_transformer_encoder_layer_fwd" in ops_of(layer, x)
        ops = ops_of(swap(layer), x)
    assert "bigkern::attention" in ops
    assert "aten::_transformer_encoder_layer_fwd" not in ops
