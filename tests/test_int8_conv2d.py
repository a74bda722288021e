"""int8_conv2d against the reference."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bigkern import backends
from bigkern.ops import reference_int8_conv2d as reference
from bigkern.ops.int8_conv2d import int8_conv2d, pack_conv2d_weight, unpack_conv2d_weight
from bigkern.ops.reference_int8 import ACTIVATIONS
from bigkern.testing import assert_as_accurate

pytestmark = pytest.mark.usefixtures("one_thread")
DEVICES = ["cpu", "emulated", "triton", "cuda"]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def make_weight(outputs, channels, kernel=(3, 3), groups=1):
    """int8 weight and scales; the extremes are among the values."""
    shape = (outputs, channels // groups, *kernel)
    return torch.randint(-127, 128, shape, dtype=torch.int8), torch.rand(outputs) + 0.1


def on(device, t):
    """Where it isn't yet, in the order in memory that it has."""
    return None if t is None else t.to(device)


def assert_like_reference(x, weight_q, weight_scale, bias=None, x_scale=None, **options):
    """Of the plain and the packed weight, and the order of the result in memory."""
    raw = {"stride": [1, 1], "padding": [0] * 4, "dilation": [1, 1], "groups": 1} | options
    expected, baseline = (
        reference.int8_conv2d(x, weight_q, weight_scale, bias, x_scale, **raw | changes)
        for changes in ({"dtype": torch.float64, "out_dtype": torch.float64}, {})
    )
    raw |= {"kernel_size": list(weight_q.shape[2:])}
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    weights = [weight_q]
    if backends.has("pack_weight", x.device.type):
        weights.append(pack_conv2d_weight(weight_q, raw["groups"]))
    for weight in weights:
        ops = backends.select("int8_conv2d", x.device.type)
        arguments = (x, weight, weight_scale, bias, x_scale)
        actual = ops.int8_conv2d.default(*arguments, **raw, channels_last=last)
        assert_as_accurate(actual, expected, baseline)
        memory_format = torch.channels_last if last else torch.contiguous_format
        assert actual.is_contiguous(memory_format=memory_format)


@st.composite
def problems(draw):
    def pair(values):
        return [draw(values), draw(values)]

    groups = draw(st.integers(1, 3))
    channels, outputs = (groups * draw(st.sampled_from([1, 3, 16, 17])) for _ in range(2))
    kernel, dilation = pair(st.integers(1, 3)), pair(st.integers(1, 2))
    batch = draw(st.integers(0, 3))
    size = [d * (k - 1) + draw(st.integers(1, 9)) for k, d in zip(kernel, dilation, strict=True)]
    weight_q, weight_scale = make_weight(outputs, channels, kernel, groups)
    x = torch.randn(batch, channels, *size).to(draw(st.sampled_from(FLOATS)))
    if draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last)
    bias = draw(st.sampled_from([None, torch.randn(outputs), torch.randn(outputs).half()]))
    x_scale = draw(st.sampled_from([None, torch.tensor(0.01), torch.rand(batch)]))
    return (x, weight_q, weight_scale, bias, x_scale), {
        "stride": pair(st.integers(1, 3)),
        "padding": [draw(st.integers(0, 2)) for _ in range(4)],
        "dilation": dilation,
        "groups": groups,
        "activation": draw(st.sampled_from(list(ACTIVATIONS))),
        "out_dtype": draw(st.sampled_from([None, *FLOATS])),
    }


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # `device` holds nothing of a case
)
@given(problem=problems())
def test_is_the_reference(problem, device):
    arguments, options = problem
    assert_like_reference(*(on(device, t) for t in arguments), **options)


@pytest.mark.parametrize("channels_last", [False, True])
def test_extreme_values_and_many_terms(channels_last, device):
    """Sums of 127 * 127 over 3 * 3 * 1000 channels, and of many blocks of output pixels."""
    weight_q = torch.full((70, 1000, 3, 3), -127, dtype=torch.int8, device=device)
    weight_q[::2] = 127
    x = torch.ones(1, 1000, 4, 4, device=device)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = x.contiguous(memory_format=memory_format)
    assert_like_reference(x, weight_q, torch.ones(70, device=device), padding=[1] * 4)
    x = torch.randn(2, 5, 40, 33, device=device).contiguous(memory_format=memory_format)
    weight = (on(device, t) for t in make_weight(7, 5))
    assert_like_reference(x, *weight, padding=[1] * 4)


def test_any_strides(device):
    x = torch.randn(9, 7, 4, 6, device=device).permute(2, 3, 1, 0)  # [4, 6, 7, 9]
    weight_q, scale = (on(device, t) for t in make_weight(9, 6))
    strided = weight_q.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    assert torch.equal(strided, weight_q)
    assert torch.equal(
        int8_conv2d(x[::2], strided, scale), int8_conv2d(x[::2].contiguous(), weight_q, scale)
    )
    if backends.has("pack_weight", weight_q.device.type):
        assert torch.equal(pack_conv2d_weight(strided), pack_conv2d_weight(weight_q))


# Groups, and outputs of a group: those that are packed as one, by up to 16, and those that aren't.
@pytest.mark.parametrize(("groups", "outputs"), [(1, 51), (3, 17), (34, 1), (23, 1), (6, 2)])
@pytest.mark.sanitize
def test_small_groups(groups, outputs, device):
    weight = make_weight(groups * outputs, groups * 3, (2, 3), groups)
    weight_q, scale = (on(device, t) for t in weight)
    if backends.has("pack_weight", weight_q.device.type):
        packed = pack_conv2d_weight(weight_q, groups)
        assert torch.equal(unpack_conv2d_weight(packed, weight_q.shape, groups), weight_q)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, groups * 3, 5, 6, device=device).contiguous(memory_format=memory_format)
        assert_like_reference(x, weight_q, scale, groups=groups)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("x_scale", [None, 0.1])
@pytest.mark.parametrize("channels_last", [False, True])
def test_images_that_are_not_finite(value, x_scale, channels_last, device):
    x = torch.randn(3, 5, 6, 7, device=device)
    x[1, 3, 2, 4] = value
    x[2] = 0
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    weight_q, scale = (on(device, t) for t in make_weight(4, 5))
    y = int8_conv2d(x, weight_q, scale, torch.ones(4, device=device), x_scale=x_scale)
    assert y[0].isfinite().all()
    assert y[1].isnan().all()
    assert (y[2] == 1).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_gradients(dtype, activation):
    """Those of a convolution with the weight that the integers stand for."""
    weight_q, scale = make_weight(6, 4, (2, 3), groups=2)
    options = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "groups": 2}
    x = torch.randn(2, 4, 9, 11).to(dtype).requires_grad_()
    bias = torch.randn(6, requires_grad=True)
    weight = weight_q.double() * scale.double().view(-1, 1, 1, 1) / 300
    y = int8_conv2d(x, weight_q, scale / 300, bias, **options, activation=activation)
    grad = torch.randn(y.shape).to(dtype)
    actual = torch.autograd.grad(y, (x, bias), grad)
    packed = pack_conv2d_weight(weight_q, 2)
    y = int8_conv2d(
        x, packed, scale / 300, bias, **options, activation=activation, kernel_size=(2, 3)
    )
    for a, b in zip(actual, torch.autograd.grad(y, (x, bias), grad), strict=True):
        assert torch.equal(a, b)

    raw = {"stride": [2, 1], "padding": [1, 1, 2, 2], "dilation": [1, 2], "groups": 2}
    found = []
    for wide in (torch.float64, torch.float32):
        inner = reference.int8_conv2d(
            x.detach(), weight_q, scale / 300, bias, **raw, dtype=wide, out_dtype=wide
        )
        leaf = inner.detach().requires_grad_()
        (inner_grad,) = torch.autograd.grad(ACTIVATIONS[activation](leaf), leaf, grad.to(wide))
        grad_x = torch.nn.grad.conv2d_input(x.shape, weight.to(wide), inner_grad, **options)
        found.append((grad_x, inner_grad.sum((0, 2, 3))))
    for a, expected, baseline in zip(actual, *found, strict=True):
        assert_as_accurate(a, expected, baseline.to(a.dtype), factor=3.0)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even")
@pytest.mark.parametrize("kernel", [(1, 1), (2, 4), (3, 3)])
def test_gradient_under_same_padding(kernel):
    weight_q, scale = make_weight(3, 2, kernel)
    x = torch.randn(2, 2, 5, 6, requires_grad=True)
    y = int8_conv2d(x, weight_q, scale, padding="same")
    assert y.shape == (2, 3, 5, 6)
    grad = torch.randn(y.shape)
    weight = weight_q.double() * scale.view(-1, 1, 1, 1)
    found = []
    for wide in (torch.float64, torch.float32):
        leaf = x.detach().to(wide).requires_grad_()
        out = F.conv2d(leaf, weight.to(wide), padding="same")
        found += torch.autograd.grad(out, leaf, grad.to(wide))
    assert_as_accurate(torch.autograd.grad(y, x, grad)[0], *found, factor=3.0)


def test_opcheck():
    options = {"kernel_size": [3, 3], "stride": [2, 1], "padding": [1] * 4, "dilation": [1, 1]}
    weight_q, scale = make_weight(6, 4)
    x = torch.randn(2, 4, 7, 8)
    op = torch.ops.bigkern.int8_conv2d.default
    torch.library.opcheck(op, (x, weight_q, scale), options)
    last = x.contiguous(memory_format=torch.channels_last)
    packed = pack_conv2d_weight(weight_q)
    arguments = (last, packed, scale, torch.ones(6), torch.tensor(0.1))
    torch.library.opcheck(op, arguments, options | {"channels_last": True})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_q": torch.ones(4, 3, 3, 3)}, "weight_q must be torch.int8, got torch.float32"),
        ({"weight_q": torch.zeros(99, dtype=torch.int8)}, "kernel_size must be given for a pack"),
        (
            {"weight_q": torch.zeros(99, dtype=torch.int8), "kernel_size": 3},
            "weight_q of one dimension must come from pack_conv2d_weight",
        ),
        ({"weight_scale": torch.ones(5)}, r"weight_q must have shape \[5, 3, 3, 3\] for this x"),
        ({"bias": torch.ones(3)}, r"bias must have shape \[4\], got \[3\]"),
        ({"x_scale": torch.ones(3)}, r"x_scale must have one element, or one for each of the 2"),
        ({"x_scale": -1.0}, "x_scale must be finite and not negative, got -1"),
        ({"stride": 0}, "stride must be one or two positive integers, got 0"),
        ({"stride": (1, 1, 1)}, r"stride must be one or two positive integers, got \(1, 1, 1\)"),
        ({"padding": -1}, "padding must be 'same', 'valid', or one or two integers from 0"),
        ({"padding": "full"}, "padding must be 'same', 'valid', or one or two .* got 'full'"),
        ({"padding": "same", "stride": 2}, r"padding 'same' needs stride 1, got \[2, 2\]"),
        ({"groups": 2}, "groups must divide the channels of x and of the output, 3 and 4, got 2"),
        ({"activation": "tanh"}, "activation must be relu, gelu, gelu_tanh, silu or None, got ta"),
        ({"out_dtype": torch.float64}, "out_dtype must be float32, bfloat16 or float16, got"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments(change, message):
    weight_q, scale = make_weight(4, 3)
    arguments = {"x": torch.ones(2, 3, 5, 5), "weight_q": weight_q, "weight_scale": scale}
    with pytest.raises(ValueError, match=message):
        int8_conv2d(**arguments | change)
    with pytest.raises(ValueError, match="weight_q must have shape"):
        pack_conv2d_weight(weight_q, groups=3)
