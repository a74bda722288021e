"""Int8Conv2d against torch's float convolution: results, state, torch's transformations, errors."""

import copy
import itertools
import pickle

import pytest
import torch
from int8_helpers import double, sqnr
from torch import nn

from bigkern.nn import Int8Conv2d, input_ranges

DEVICES = ["cpu", "emulated", "triton", "cuda"]
pytestmark = pytest.mark.usefixtures("one_thread")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
PADDINGS = [(0, "zeros"), ((1, 2), "zeros"), ("same", "zeros"), ("valid", "zeros")]
PADDINGS += [(p, mode) for mode in ("reflect", "replicate", "circular") for p in (1, "same")]


@pytest.mark.parametrize("padding", PADDINGS, ids=str)
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_close_to_float_over_all_options(groups, padding):
    padding, padding_mode = padding
    for kernel, stride, dilation, mode in itertools.product(
        [1, (3, 2), 3], [1, (2, 3)], [1, (1, 2)], ["dynamic", "static"]
    ):
        if padding == "same" and stride != 1:
            continue
        conv = nn.Conv2d(
            6, 12, kernel, stride, padding, dilation, groups, padding_mode=padding_mode
        )
        x = torch.randn(2, 6, 17, 19)
        layer = Int8Conv2d.from_conv(conv, mode, input_range=x.abs().amax((0, 2, 3)))
        expected = double(conv)(x)
        assert layer(x).shape == expected.shape
        assert sqnr(layer(x), expected) > 34
        assert torch.equal(layer(x[0]), layer(x[:1])[0])


@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes_and_layouts(dtype):
    conv = nn.Conv2d(16, 33, 3, padding=1, bias=False, dtype=dtype)
    layer = Int8Conv2d.from_conv(conv, activation="relu")
    x = torch.randn(2, 16, 9, 8).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert sqnr(y, double(conv)(x).relu()) > 34
    last = layer(x.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, y)
    assert layer(x[:0]).shape == (0, 33, 9, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def make(mode="dynamic"):
    conv = nn.Conv2d(4, 6, (3, 2), (1, 2), "valid", 1, 2, padding_mode="circular").eval()
    layer = Int8Conv2d.from_conv(conv, mode, input_range=torch.full((4,), 3.0), activation="silu")
    arguments = (4, 6, (3, 2), (1, 2), "valid", 1, 2, True, "circular", mode)
    return layer, lambda device=None: Int8Conv2d(*arguments, activation="silu", device=device)


@pytest.mark.parametrize("groups", [1, 2, 6, 18])
def test_forward_backward_and_state_on_each_device(groups, device):
    conv = nn.Conv2d(18, 36, (3, 2), padding=1, groups=groups).to(device)
    x = torch.randn(2, 18, 7, 6, device=device, requires_grad=True)
    for mode in ("dynamic", "static"):
        layer = Int8Conv2d.from_conv(conv, mode, input_range=x.detach().abs().amax((0, 2, 3)))
        y = layer(x)
        assert sqnr(y, double(conv)(x)) > 34
        assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()
        assert torch.equal(copy.deepcopy(layer)(x), y)
        last = layer(x.contiguous(memory_format=torch.channels_last))
        assert torch.equal(last, y)


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_state_copies_and_pickles(mode):
    layer, construct = make(mode)
    x = torch.randn(2, 4, 7, 8)
    state = layer.state_dict()
    assert state["weight_q"].shape == (6, 2, 3, 2)
    assert not layer.training
    loaded, on_meta = construct(), construct("meta")
    loaded.load_state_dict(state)
    on_meta.load_state_dict(state, assign=True)
    copies = [loaded, on_meta, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    for other in copies:
        assert repr(other) == repr(layer)
        assert torch.equal(other(x), layer(x))
        assert torch.equal(other.weight_q, layer.weight_q)
    half = copy.deepcopy(layer).half()
    assert torch.equal(half.weight_scale, layer.weight_scale)
    assert sqnr(half(x.half()), layer(x)) > 35


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_compiles_and_exports(mode):
    torch._dynamo.reset()
    layer, _ = make(mode)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, 7, 8, requires_grad=True)
    y = layer(x)
    assert torch.equal(compiled(x), y)
    grads = [torch.autograd.grad(f(x).square().sum(), x)[0] for f in (layer, compiled)]
    assert torch.equal(*grads)
    last = x.detach().contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.equal(compiled(last), y)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(layer, (x.detach(),), dynamic_shapes=({0: batch},))
    more = torch.randn(5, 4, 7, 8)
    assert torch.equal(program.module()(more), layer(more))


def test_a_whole_network():
    """Calibrated and with every layer of int8, channels last inside."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1, groups=16),
        nn.ReLU(), nn.Conv2d(16, 32, 1), nn.ReLU(), nn.Conv2d(32, 10, 3),
    ).eval()  # fmt: skip
    x = torch.randn(4, 3, 20, 20)
    ranges = input_ranges(model, [torch.randn(50, 3, 20, 20)])
    for mode in ("dynamic", "static"):
        layers = [
            Int8Conv2d.from_conv(module, mode, input_range=ranges[name])
            if isinstance(module, nn.Conv2d)
            else module
            for name, module in model.named_children()
        ]
        quantized = nn.Sequential(*layers)
        y = quantized(x)
        assert sqnr(y, double(model)(x)) > 30
        last = quantized(x.contiguous(memory_format=torch.channels_last))
        assert torch.equal(last, y)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Int8Conv2d(3, 4, 3, mode="weight_only"), ValueError, "mode must be one of dynam"),
        (lambda: Int8Conv2d(3, 4, 3, groups=2), ValueError, "divisible by groups"),
        (lambda: Int8Conv2d(3, 4, 3, activation="elu"), ValueError, "activation must be one of"),
        (lambda: Int8Conv2d(3, 4, 3, dtype=torch.float64), TypeError, "dtype must be torch.float"),
        (lambda: Int8Conv2d.from_conv(nn.Linear(3, 4)), TypeError, "conv must be a torch.nn.Conv2"),
        (
            lambda: Int8Conv2d.from_conv(nn.Conv2d(3, 4, 3).double()),
            TypeError,
            "conv.weight must be torch.float32 or",
        ),
        (
            lambda: Int8Conv2d.from_conv(nn.Conv2d(3, 4, 3), "static"),
            ValueError,
            "static needs input_range",
        ),
        (
            lambda: Int8Conv2d(3, 4, 3)(torch.ones(1, 2, 5, 5)),
            ValueError,
            r"weight_q .*\[4, 2, 3, 3\]",
        ),
        (lambda: Int8Conv2d(3, 4, 3)(torch.ones(3, 2, 9)), ValueError, "kernel_size must fit the"),
        (lambda: Int8Conv2d(3, 4, 3)(torch.ones(5, 5)), ValueError, r"x must have .*\[5, 5\]"),
        (
            lambda: Int8Conv2d(3, 4, 3)(torch.ones(1, 3, 5, 5).double()),
            ValueError,
            "x must be .*float64",
        ),
        (
            lambda: Int8Conv2d(3, 4, 3)(torch.ones(1, 3, 5, 5, device="meta")),
            ValueError,
            "input must be on cpu, like the weight, got meta",
        ),
    ],
)
def test_bad_layers(call, error, message):
    with pytest.raises(error, match=message):
        call()
