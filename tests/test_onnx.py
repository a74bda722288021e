"""bigkern.onnx: graphs of standard operators, run by onnxruntime."""

import copy

import pytest
import torch
from torch import nn

import bigkern
from bigkern.models import SimpleCNN, Transformer, TransformerConfig
from bigkern.nn import Int8Conv2d, Int8Linear, Int8TrainingLinear, MultiheadAttention
from bigkern.ops import reference_int8, reference_int8_conv2d
from bigkern.ops.reference_int8 import ACTIVATIONS
from bigkern.testing import assert_as_accurate

pytest.importorskip("onnxscript", reason="torch.onnx.export needs it")
onnxruntime = pytest.importorskip("onnxruntime", reason="it runs the graphs")

Dim = torch.export.Dim


class Each(nn.Module):
    """All layers of the same input: one graph is made faster than many."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        return tuple(layer(x) for layer in self.layers)


def run(model, example, inputs, sizes=None, path=None):
    """What onnxruntime computes of `inputs`, of the dynamic `sizes`, by the graph that was exported
    with `example`; and the operators in it."""
    shapes = None if sizes is None else ((sizes,) * len(example),)
    if not isinstance(model, Attend):  # whose inputs are *tensors
        shapes = shapes and shapes[0]
    program = bigkern.onnx.export(model, example, path, dynamic_shapes=shapes, verbose=False)
    graph = path or program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]
    feeds = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    outputs = [torch.from_numpy(y) for y in session.run(None, feeds)]
    assert {node.domain for node in program.model.graph} == {""}
    return outputs, {node.op_type for node in program.model.graph}


# INT8


def integers(*shape):
    """Extremes, whose products of pairs overflow 16 bits, and ties; the largest of a row is 127,
    which makes its scale 1."""
    x = torch.randint(-254, 255, shape) / 2
    x[torch.rand(shape) < 0.5] = 127
    x.view(shape[0], -1)[:, 0] = -127
    return x


def test_integers_of_linear_are_exact():
    layer = Int8Linear(300, 33, bias=False)
    state = layer.state_dict()
    state["weight_q"] = integers(33, 300).to(torch.int8)
    state["weight_scale"] = torch.ones(33)
    layer.load_state_dict(state)
    x = integers(9, 300)
    (y,), operators = run(layer, (integers(4, 300),), (x,), {0: Dim("rows")})
    assert torch.equal(y, layer(x))
    assert torch.equal(y, (x.round().double() @ layer.weight_q.double().T).float())
    assert "MatMulInteger" in operators


def test_integers_of_conv2d_are_exact():
    layers = Each(
        Int8Conv2d(6, 12, (3, 2), (2, 1), (1, 2), (1, 2), groups=groups, bias=False)
        for groups in (1, 2, 6)
    )
    for layer in layers.layers:
        state = layer.state_dict()
        state["weight_q"] = integers(*state["weight_q"].shape).to(torch.int8)
        state["weight_scale"] = torch.ones(12)
        layer.load_state_dict(state)
    x = integers(3, 6, 9, 8)
    sizes = {0: Dim("batch"), 2: Dim("height", min=4), 3: Dim("width", min=4)}
    outputs, operators = run(layers, (integers(2, 6, 7, 11),), (x,), sizes)
    for y, expected in zip(outputs, layers(x), strict=True):
        assert torch.equal(y, expected)
        assert y.abs().max() > 127 * 127
    assert "ConvInteger" in operators


def test_linear():
    x = torch.randn(9, 64)
    options = [{"activation": activation} for activation in ACTIVATIONS]
    options += [{"mode": "static", "input_range": x.abs().amax(0) / 2}]
    layers = Each(Int8Linear.from_linear(nn.Linear(64, 32), **each) for each in options)
    outputs, _ = run(layers, (x[:4],), (x,), {0: Dim("rows")})
    for y, plain, layer in zip(outputs, layers(x), layers.layers, strict=True):
        exact = reference_int8.int8_linear(
            x.double(), layer.weight_q, layer.weight_scale, layer.bias, layer.x_scale,
            activation=layer.activation, dtype=torch.float64,
        )  # fmt: skip
        assert_as_accurate(y, exact, plain)


def test_a_layer_that_was_trained():
    x = torch.randn(9, 64)
    layer = Int8TrainingLinear(64, 32).eval()
    (y,), operators = run(layer, (x[:4],), (x,), {0: Dim("rows")})
    exact = reference_int8.int8_linear(
        x.double(), *bigkern.quantize_rows(layer.weight), layer.bias, dtype=torch.float64
    )
    assert_as_accurate(y, exact, layer(x))
    assert "MatMulInteger" in operators


def test_linear_with_outliers_and_factors():
    """Whose product in floating point isn't bigkern's."""
    x = torch.randn(9, 64)
    x[:, 5] *= 50
    linear = nn.Linear(64, 32)
    layer = Int8Linear.from_linear(
        linear, input_range=x.abs().amax(0), alpha=0.5, outlier_threshold=20.0
    )
    (y,), _ = run(layer, (x[:4],), (x,), {0: Dim("rows")})
    assert_as_accurate(y, linear.double()(x.double()), layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weight_only_keeps_its_weight_in_int8(dtype, tmp_path):
    linear, sizes = nn.Linear(512, 96, dtype=dtype), (0, 16, 24)
    layers = Each(Int8Linear.from_linear(linear, "weight_only", group_size=n) for n in sizes)
    x = torch.randn(9, 512, dtype=dtype)
    outputs, operators = run(layers, (x[:4],), (x,), {0: Dim("rows")}, tmp_path / "model.onnx")
    for y, layer, group_size in zip(outputs, layers.layers, sizes, strict=True):
        tensors = (layer.weight_q, layer.weight_scale, layer.bias)
        exact, plain = (
            reference_int8.weight_only_linear(
                x.to(wide), *tensors, group_size=group_size, dtype=wide
            ).to(kept)
            for wide, kept in ((torch.float64, torch.float64), (torch.float32, dtype))
        )
        assert_as_accurate(y, exact, plain)
    assert "DequantizeLinear" in operators
    assert (tmp_path / "model.onnx").stat().st_size < 1.5 * 3 * 512 * 96


def test_conv2d():
    layers = Each(
        Int8Conv2d.from_conv(
            nn.Conv2d(4, 6, 3, padding=1, padding_mode=mode, groups=2), activation="silu"
        )
        for mode in ("zeros", "reflect")
    )
    x = torch.randn(5, 4, 8, 8)
    outputs, _ = run(layers, (x[:2],), (x,), {0: Dim("batch")})
    for y, plain, layer in zip(outputs, layers(x), layers.layers, strict=True):
        mode = {"zeros": "constant"}.get(layer.padding_mode, layer.padding_mode)
        exact = reference_int8_conv2d.int8_conv2d(
            nn.functional.pad(x, (1, 1, 1, 1), mode).double(),
            layer.weight_q, layer.weight_scale, layer.bias, stride=[1, 1], padding=[0] * 4,
            dilation=[1, 1], groups=2, activation="silu", dtype=torch.float64,
        )  # fmt: skip
        assert_as_accurate(y, exact, plain)


def test_nan_stays_in_its_row_and_zeros_are_zeros():
    layer = Int8Linear.from_linear(nn.Linear(8, 4))
    x = torch.randn(4, 8)
    x[0], x[1, 3], x[2, 5] = 0, torch.nan, -torch.inf
    (y,), _ = run(layer, (x[:2],), (x,), {0: Dim("rows")})
    torch.testing.assert_close(y, layer(x), equal_nan=True)
    assert y.isnan().all(1).tolist() == [False, True, True, False]


def test_functions():
    class Module(nn.Module):
        def forward(self, a, b):
            values, scale = bigkern.quantize_rows(a)
            return bigkern.int8_mm(values, b), scale

    a, b = torch.randn(5, 16), torch.randint(-128, 128, (16, 7), dtype=torch.int8)
    (c, scale), _ = run(Module(), (a, b), (a, b))
    expected_c, expected_scale = Module()(a, b)
    assert torch.equal(c, expected_c)
    assert torch.equal(scale, expected_scale)


# Attention


class Attend(nn.Module):
    def __init__(self, *options):
        super().__init__()
        self.options = options

    def forward(self, *tensors):
        found = []
        for options in self.options:
            results = bigkern.scaled_dot_product_attention(*tensors, enable_gqa=True, **options)
            found += [results] if torch.is_tensor(results) else results
        return tuple(found)


def test_attention():
    model = Attend(
        {},
        {"is_causal": True, "return_lse": True},
        {"window": (2, 0), "softcap": 3.0, "scale": 0.7},
        {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0])},
    )

    def make(batch, length):
        return tuple(torch.randn(batch, heads, length, 8) for heads in (4, 2, 2))

    inputs = make(3, 9)
    outputs, _ = run(model, make(2, 5), inputs, {0: Dim("batch"), 2: Dim("length", min=2)})
    exact, plain = model(*(x.double() for x in inputs)), model(*inputs)
    for y, e, p in zip(outputs, exact, plain, strict=True):
        assert_as_accurate(y, e, p)


def test_a_query_without_keys_gets_zeros():
    q, k, v = (torch.randn(1, 2, 3, 8) for _ in range(3))
    mask = torch.tensor([[True, False, True], [False] * 3, [True] * 3])
    (y,), _ = run(Attend({}), (q, k, v, mask), (q, k, v, mask))
    assert torch.equal(y[:, :, 1], torch.zeros(1, 2, 8))
    (exact,) = Attend({})(q.double(), k.double(), v.double(), mask)
    assert_as_accurate(y, exact, *Attend({})(q, k, v, mask))


def test_weights_of_a_layer():
    layer = MultiheadAttention(16, 4, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    outputs, _ = run(layer, (x, x, x), (x, x, x))
    doubles = copy.deepcopy(layer).double()(*[x.double()] * 3)
    for y, e, p in zip(outputs, doubles, layer(x, x, x), strict=True):
        assert_as_accurate(y, e, p)


def test_what_has_no_graph_is_refused():
    layer = MultiheadAttention(16, 4, dropout=0.1, batch_first=True)
    x = torch.randn(2, 5, 16)
    with pytest.raises(NotImplementedError, match=r"dropout can't be exported: call model.eval"):
        bigkern.onnx.export(layer, (x, x, x))

    class Packed(nn.Module):
        def forward(self, x, ends):
            return bigkern.varlen_attention(x, x, x, ends, ends, 3, 3)

    ends = torch.tensor([0, 2, 5], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="packed sequences can't be exported: pad"):
        bigkern.onnx.export(Packed(), (torch.randn(5, 2, 8), ends))


# Models


def encoder():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), torch.randn(3, 9, 16)


def language_model():
    config = TransformerConfig(vocab_size=16, context=12, dim=16, num_heads=2, num_blocks=1)
    return Transformer(config), torch.randint(16, (3, 9))


@pytest.mark.parametrize(
    "make",
    [encoder, language_model, lambda: (SimpleCNN(), torch.randn(3, 1, 28, 28))],
    ids=["encoder", "language model", "cnn"],
)
def test_models(make):
    """As near to the model in float64 as bigkern's layers are: what is rounded differs in its last
    bits, which may tip the rounding of an integer."""
    model, x = make()
    model.eval()
    exact = copy.deepcopy(model).double()(x.double() if x.is_floating_point() else x).detach()
    bigkern.swap(model, linear="int8", conv2d="int8")
    sizes = {0: Dim("batch"), **({} if x.dim() == 4 else {1: Dim("length", max=12)})}
    example = x[:2] if x.dim() == 4 else x[:2, :5].contiguous()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        expected = model(x)
        (y,), operators = run(model, (example,), (x,), sizes)
        assert torch.equal(model(x), expected)
    assert_as_accurate(y, exact, expected)
    assert "MatMulInteger" in operators
    assert all(torch.equal(tensor, before[k]) for k, tensor in model.state_dict().items())
    model.load_state_dict(before)
