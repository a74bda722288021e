"""Int8Linear: results, state, torch's transformations, errors."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from int8_helpers import double, sqnr
from torch import nn

import bigkern
from bigkern.nn import Int8Linear
from bigkern.testing import assert_as_accurate

DEVICES = ["cpu", "emulated", "triton", "cuda"]
pytestmark = pytest.mark.usefixtures("one_thread")
N, K = 65, 127
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
RANGE = torch.linspace(1, 5, K)
OPTIONS = {
    "dynamic": {},
    "static": {"mode": "static", "input_range": RANGE},
    "weight_only": {"mode": "weight_only"},
    "groups": {"mode": "weight_only", "group_size": 32},
    "smooth": {"alpha": 0.5, "input_range": RANGE},
    "outliers": {"outlier_threshold": 4.9, "input_range": RANGE, "activation": "relu"},
    "all": {
        "mode": "static",
        "outlier_threshold": 4.9,
        "alpha": 0.3,
        "input_range": RANGE,
        "activation": "silu",
    },
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def make(options=None, bias=True, dtype=torch.float32):
    linear = nn.Linear(K, N, bias, dtype=dtype)
    return linear, Int8Linear.from_linear(linear, **(options or {}))


def make_input(*lead, dtype=torch.float32):
    return torch.randn(*lead, K).to(dtype)


def constructed(options, device=None):
    """What a state_dict of `make(options)` can be loaded into."""
    num_outliers = sum(r >= options.get("outlier_threshold", 9) for r in RANGE.tolist())
    return Int8Linear(
        K,
        N,
        mode=options.get("mode", "dynamic"),
        group_size=options.get("group_size", 0),
        activation=options.get("activation"),
        has_input_factor="alpha" in options,
        num_outliers=num_outliers,
        device=device,
    )


# What it computes


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", FLOATS)
def test_is_the_op_of_the_quantized_weight(dtype, bias):
    linear, layer = make(bias=bias, dtype=dtype)
    weight_q, scale = bigkern.quantize_rows(linear.weight)
    assert torch.equal(layer.weight_q, weight_q)
    assert torch.equal(layer.weight_scale, scale)
    for x in (
        make_input(dtype=dtype),
        make_input(0, dtype=dtype),
        make_input(3, 0, 2, dtype=dtype),
        make_input(7, dtype=dtype),
        make_input(5, 3, dtype=dtype).transpose(0, 1),
    ):
        y = layer(x)
        assert y.shape == linear(x).shape
        assert y.dtype == dtype
        assert torch.equal(y, bigkern.int8_linear(x, weight_q, scale, linear.bias))
        static = Int8Linear.from_linear(linear, "static", input_range=RANGE)
        assert torch.equal(static.x_scale, RANGE.max() / 127)
        expected = bigkern.int8_linear(x, weight_q, scale, linear.bias, x_scale=static.x_scale)
        assert torch.equal(static(x), expected)
        expected = bigkern.weight_only_linear(x, weight_q, scale, linear.bias)
        assert torch.equal(Int8Linear.from_linear(linear, "weight_only")(x), expected)


@pytest.mark.parametrize("group_size", [1, 32, 127, 1000])
def test_groups_share_a_scale(group_size):
    linear, layer = make({"mode": "weight_only", "group_size": group_size})
    for g, columns in enumerate(linear.weight.split(group_size, dim=1)):
        weight_q, scale = bigkern.quantize_rows(columns)
        assert torch.equal(layer.weight_scale[:, g], scale)
        assert torch.equal(layer.weight_q.split(group_size, dim=1)[g], weight_q)
    x = make_input(3)
    expected = bigkern.weight_only_linear(
        x, layer.weight_q, layer.weight_scale, linear.bias, group_size=group_size
    )
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("in_features", [1, 7, 1000])
@pytest.mark.parametrize("out_features", [1, 7, 1000])
def test_odd_sizes(in_features, out_features):
    linear = nn.Linear(in_features, out_features)
    x = torch.randn(7, in_features)
    for mode in ("dynamic", "weight_only"):
        layer = Int8Linear.from_linear(linear, mode)
        assert sqnr(layer(x), double(linear)(x)) > 35


@every_option
@pytest.mark.parametrize("dtype", FLOATS)
def test_close_to_float(options, dtype):
    linear, layer = make(options, dtype=dtype)
    x = make_input(200, dtype=dtype)
    activation = {None: lambda y: y, "relu": F.relu, "silu": F.silu}[options.get("activation")]
    assert sqnr(layer(x), activation(double(linear)(x))) > 35


@every_option
def test_gradient_of_the_input(options):
    """That of the layer with the weight that the integers stand for."""
    _, layer = make({**options, "activation": None})
    x = make_input(33).requires_grad_()
    grad = torch.randn(33, N)
    (actual,) = torch.autograd.grad(layer(x), x, grad)
    scale = layer.weight_scale.double().view(N, -1)  # [N, groups]
    weight = layer.weight_q * scale.repeat_interleave(layer.group_size or K, 1)[:, :K]
    if layer.input_factor is not None:
        weight = weight * layer.input_factor
    if layer.outlier_columns is not None:
        weight[:, layer.outlier_columns] += layer.outlier_weight
    assert_as_accurate(actual, grad.double() @ weight, grad @ weight.float(), factor=3.0)


@every_option
def test_forward_backward_and_state_on_each_device(options, device):
    linear = nn.Linear(K, N).to(device)
    layer = Int8Linear.from_linear(linear, **options)
    x = make_input(9).to(device).requires_grad_()
    activation = {None: lambda y: y, "relu": F.relu, "silu": F.silu}[options.get("activation")]
    y = layer(x)
    assert sqnr(y, activation(double(linear)(x))) > 35
    assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()
    loaded = constructed(options, device)
    loaded.load_state_dict(layer.state_dict())
    for other in (loaded, copy.deepcopy(layer)):
        assert torch.equal(other(x), y)


@every_option
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_moves_to_a_gpu_and_back(options, device):
    """The weight is packed otherwise there."""
    _, layer = make(options)
    x = make_input(9)
    expected = layer(x)
    assert sqnr(layer.to(device)(x.to(device)), expected.to(device)) > 80
    assert torch.equal(layer.to("cpu")(x), expected)


# Its state


@every_option
def test_state_dict(options):
    _, layer = make(options)
    x = make_input(5)
    state = layer.state_dict()
    assert state["weight_q"].dtype == torch.int8
    assert state["weight_q"].shape == (N, K)
    assert not [name for name in state if "packed" in name]
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    for device, assign in ((None, False), (None, True), ("meta", True)):
        loaded = constructed(options, device)
        assert loaded.load_state_dict(state, assign=assign) == ([], [])
        assert torch.equal(loaded(x), layer(x))
        assert loaded.state_dict().keys() == state.keys()
    nested, source = nn.Sequential(constructed(options)), nn.Sequential(layer)
    nested.load_state_dict(source.state_dict())
    assert torch.equal(nested(x), layer(x))


def test_state_of_another_shape_or_kind_is_refused():
    _, layer = make()
    with pytest.raises(RuntimeError, match="size mismatch for weight_q"):
        Int8Linear(K, N + 1).load_state_dict(layer.state_dict())
    with pytest.raises(RuntimeError, match=r'Missing key.*"x_scale"'):
        Int8Linear(K, N, mode="static").load_state_dict(layer.state_dict())
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"weight"'):
        layer.load_state_dict(nn.Linear(K, N).state_dict())


@every_option
def test_copies_and_pickles(options):
    _, layer = make(options)
    x = make_input(5)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    copies = [
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(file, weights_only=False),
    ]
    for other in copies:
        assert repr(other) == repr(layer)
        assert torch.equal(other(x), layer(x))
        for mine, theirs in zip(
            layer.state_dict().values(), other.state_dict().values(), strict=True
        ):
            assert torch.equal(mine, theirs)
            assert mine.data_ptr() != theirs.data_ptr()


@every_option
def test_the_weight_is_held_once(options):
    linear = nn.Linear(512, 512, bias=False)
    kept = {name: x for name, x in options.items() if name in ("mode", "group_size")}
    layer = Int8Linear.from_linear(linear, **kept, input_range=torch.ones(512))
    held = sum(x.nbytes for x in layer.buffers())
    assert 512 * 512 <= held < 1.2 * 512 * 512


@every_option
def test_scales_stay_float32_in_other_dtypes(options):
    _, layer = make(options)
    scales = {"weight_scale", "x_scale", "input_factor"}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        cast = copy.deepcopy(layer).to(dtype)
        for name, x in cast.state_dict().items():
            if name in scales:
                assert torch.equal(x, layer.state_dict()[name])
            elif x.is_floating_point():
                assert x.dtype == dtype
        x = make_input(9, dtype=dtype)
        assert cast(x).dtype == dtype
        assert sqnr(cast(x), layer(x.float())) > 35
    assert torch.equal(layer.to("cpu")(x), layer(x))


def test_is_no_parameter_of_training():
    linear, layer = make()
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == []
    assert layer.bias.data_ptr() != linear.bias.data_ptr()
    assert not Int8Linear.from_linear(linear.eval()).training


# Under torch's transformations


@every_option
def test_compiles_whole(options):
    torch._dynamo.reset()
    _, layer = make(options)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (5, 9):
        x = make_input(rows).requires_grad_()
        grads = []
        for module in (layer, compiled):
            y = module(x)
            grads.append(torch.autograd.grad(y.square().sum(), x)[0])
            assert torch.equal(y, layer(x))
        assert torch.equal(*grads)
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))


def test_compiles_to_code():
    _, layer = make({"activation": "gelu"})
    model = nn.Sequential(layer, nn.Linear(N, 3))
    x = make_input(5)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x))


@every_option
def test_exports(options):
    _, layer = make(options)
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(
        nn.Sequential(layer), (make_input(5),), dynamic_shapes=({0: rows},)
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    x = make_input(9)
    assert torch.equal(torch.export.load(file).module()(x), layer(x))
    assert torch.equal(torch.export.export(layer, (x,)).module()(x), layer(x))


@every_option
def test_autocast(options):
    _, layer = make(options)
    x = make_input(9)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert sqnr(y, layer(x)) > 35


# Bad input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"linear": nn.Linear(3, 4).double()}, TypeError, "linear.weight must be torch.float32 or"),
        ({"linear": nn.Conv2d(3, 4, 1)}, TypeError, "linear must be a torch.nn.Linear, got <class"),
        ({"mode": "int4"}, ValueError, "mode must be one of dynamic, static, weight_only, got 'i"),
        ({"mode": "static"}, ValueError, "mode static needs input_range"),
        ({"alpha": 0.5}, ValueError, "alpha needs input_range"),
        ({"outlier_threshold": 6.0}, ValueError, "outlier_threshold needs input_range"),
        (
            {"alpha": 1.5, "input_range": torch.ones(3)},
            ValueError,
            "alpha must be from 0 to 1, got",
        ),
        (
            {"outlier_threshold": 0.0, "input_range": torch.ones(3)},
            ValueError,
            "outlier_threshold must be a positive number, got 0.0",
        ),
        (
            {"mode": "static", "input_range": torch.ones(4)},
            ValueError,
            r"input_range must have shape \[3\], got \[4\]",
        ),
        (
            {"mode": "static", "input_range": torch.tensor([1.0, torch.inf, 1.0])},
            ValueError,
            "input_range must be finite and not negative, got",
        ),
        ({"group_size": 2}, ValueError, "group_size is an option of mode weight_only, got mode"),
        (
            {"mode": "weight_only", "group_size": -1},
            ValueError,
            "group_size must be 0 or positive, got -1",
        ),
        (
            {"mode": "weight_only", "alpha": 0.5, "input_range": torch.ones(3)},
            ValueError,
            "are of no use to mode weight_only",
        ),
        ({"activation": "tanh"}, ValueError, "activation must be one of .*, got 'tanh'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_options(change, error, message):
    with pytest.raises(error, match=message):
        Int8Linear.from_linear(**{"linear": nn.Linear(3, 4), **change})


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(value):
    linear = nn.Linear(3, 4)
    with torch.no_grad():
        linear.weight[1, 2] = value
    with pytest.raises(ValueError, match=r"linear\.weight must be finite, got inf or NaN"):
        Int8Linear.from_linear(linear)


@pytest.mark.parametrize("mode", ["dynamic", "weight_only"])
def test_bad_inputs(mode):
    layer = Int8Linear.from_linear(nn.Linear(3, 4), mode)
    with pytest.raises(ValueError, match=r"x must .*float64"):
        layer(torch.ones(2, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"x .*\[2, 4\]"):
        layer(torch.ones(2, 4))
    with pytest.raises(ValueError, match="input must be on cpu, like the weight, got meta"):
        layer(torch.ones(2, 3, device="meta"))
    with pytest.raises(ValueError, match=r"input must be on meta, like the weight, got cpu"):
        layer.to("meta")(torch.ones(2, 3))
    with pytest.raises(TypeError, match=r"dtype must be torch\.float32 or"):
        Int8Linear(3, 4, mode=mode, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"bias must be .*float64"):
        Int8Linear.from_linear(nn.Linear(3, 4), mode).double()(torch.ones(2, 3))
