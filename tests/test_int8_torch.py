"""The int8 ops under torch's transformations, and their gradients."""

import pytest
import torch
import torch.nn.functional as F

import bigkern
from bigkern.ops import reference_int8 as reference
from bigkern.testing import assert_as_accurate

ops = torch.ops.bigkern
ACTIVATIONS = list(reference.ACTIVATIONS)


def quantized(N=20, K=70):
    return bigkern.quantize_rows(torch.randn(N, K))


def test_opcheck():
    a, b = (torch.randint(-128, 128, s, dtype=torch.int8) for s in ((2, 5, 7), (2, 7, 3)))
    torch.library.opcheck(ops.int8_mm, (a, b))
    torch.library.opcheck(ops.int8_mm, (a[0], b[0]))
    weight, scale = quantized()
    packed = bigkern.pack_weight(weight)
    torch.library.opcheck(ops.pack_weight, (weight,))
    torch.library.opcheck(ops.pack_weight, (torch.ones(3, 1030, dtype=torch.int8),))
    torch.library.opcheck(ops.unpack_weight, (packed, 20, 70))
    for dtype in (torch.float32, torch.bfloat16):
        x, bias = torch.randn(2, 3, 70, dtype=dtype), torch.randn(20, dtype=dtype)
        torch.library.opcheck(ops.quantize_rows, (x,))
        torch.library.opcheck(ops.quantize_rows, (x, torch.rand(2, 3)))
        for w in (weight, packed):
            torch.library.opcheck(ops.int8_linear, (x, w, scale))
            torch.library.opcheck(
                ops.int8_linear,
                (x, w, scale, bias, torch.rand(1)),
                {"activation": "gelu", "out_dtype": torch.float16},
            )
        torch.library.opcheck(ops.weight_only_linear, (x, weight, scale, bias))
        torch.library.opcheck(
            ops.weight_only_linear, (x, weight, torch.rand(20, 3)), {"group_size": 32}
        )


def gradients(function, x, bias):
    y = function(x, bias)
    return y, *torch.autograd.grad(y.float().square().sum(), (x, bias))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_without_graph_breaks(backend):
    weight, scale = quantized()
    packed, other = bigkern.pack_weight(weight), quantized(20, 20)

    def function(x, bias):
        y = bigkern.int8_linear(x, packed, scale, bias, activation="silu", x_scale=0.03)
        return bigkern.int8_linear(y, *other) + bigkern.weight_only_linear(x, weight, scale, bias)

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    x, bias = torch.randn(3, 70, requires_grad=True), torch.randn(20, requires_grad=True)
    actual, expected = gradients(compiled, x, bias), gradients(function, x, bias)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a / b.abs().max(), b / b.abs().max())


def test_compile_for_sizes_that_change():
    def function(a, x, weight, scale):
        values, s = bigkern.quantize_rows(x)
        return bigkern.int8_mm(a, values), s, bigkern.int8_linear(x, weight, scale)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for M, N, K in ((3, 4, 5), (7, 9, 11), (20, 2, 33)):
        a = torch.randint(-128, 128, (M, N), dtype=torch.int8)
        arguments = (a, torch.randn(N, K), *quantized(M, K))
        for x, y in zip(compiled(*arguments), function(*arguments), strict=True):
            assert torch.equal(x, y)


def test_export():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            weight, scale = quantized()
            self.register_buffer("weight", weight)
            self.register_buffer("scale", scale)

        def forward(self, x):
            return bigkern.int8_linear(x, self.weight, self.scale, activation="relu")

    layer, x = Layer(), torch.randn(3, 70)
    exported = torch.export.export(layer, (x,))
    assert torch.equal(exported.module()(x), layer(x))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_packed", [False, True])
def test_gradient_is_that_of_the_weight_that_the_integers_stand_for(activation, dtype, is_packed):
    weight, scale = quantized()
    given = bigkern.pack_weight(weight) if is_packed else weight
    x = torch.randn(2, 5, 70, dtype=dtype, requires_grad=True)
    bias = torch.randn(20, dtype=dtype, requires_grad=True)
    grad = torch.randn(2, 5, 20, dtype=dtype)
    y = bigkern.int8_linear(x, given, scale, bias, activation=activation)
    actual = torch.autograd.grad(y, (x, bias), grad)

    def expected(wide):
        """Through the layer before its activation, at what int8_linear gives there."""
        inner = reference.int8_linear(
            x.detach(), weight, scale, bias.detach(), out_dtype=wide, dtype=wide
        ).requires_grad_()
        (grad_inner,) = torch.autograd.grad(
            reference.ACTIVATIONS[activation](inner), inner, grad.to(wide)
        )
        grad_x = grad_inner @ reference.dequantize(weight, scale, dtype=wide)
        return grad_x, grad_inner.flatten(0, 1).sum(0)

    baselines = [g.to(dtype) for g in expected(torch.float32)]
    for a, b, c in zip(actual, expected(torch.float64), baselines, strict=True):
        assert_as_accurate(a, b, c, factor=3.0)


@pytest.mark.parametrize("group_size", [0, 32])
def test_gradient_of_weight_only(group_size):
    weight, scale = quantized()
    if group_size:
        scale = torch.rand(20, 3)
    x, bias = torch.randn(4, 70, requires_grad=True), torch.randn(20, requires_grad=True)
    grad = torch.randn(4, 20)
    y = bigkern.weight_only_linear(x, weight, scale, bias, group_size=group_size)
    actual = torch.autograd.grad(y, (x, bias), grad)
    plain = F.linear(x, reference.dequantize(weight, scale, group_size), bias)
    baseline = torch.autograd.grad(plain, (x, bias), grad)
    wide = reference.dequantize(weight, scale, group_size, torch.float64)
    expected = (grad.double() @ wide, grad.double().sum(0))
    for a, b, c in zip(actual, expected, baseline, strict=True):
        assert_as_accurate(a, b, c, factor=3.0)


def test_second_derivative():
    """Of the activation alone: without it the layer is linear."""
    weight, scale = quantized()
    x = torch.randn(3, 70, requires_grad=True)

    def first(function):
        (g,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
        return g

    def second(function):
        (g,) = torch.autograd.grad(first(function).square().sum(), x)
        return g

    weight_wide = reference.dequantize(weight, scale)
    values, x_scale = bigkern.quantize_rows(x)
    rounded = values * x_scale[:, None]

    def straight_through(x):
        return F.silu(F.linear(x + (rounded - x).detach(), weight_wide))

    actual = second(lambda x: bigkern.int8_linear(x, weight, scale, activation="silu"))
    torch.testing.assert_close(actual, second(straight_through), rtol=1e-4, atol=1e-4)


def test_no_gradient_is_recorded_where_none_is_needed():
    weight, scale = quantized()
    x = torch.randn(3, 70, requires_grad=True)
    with torch.no_grad():
        assert not bigkern.int8_linear(x, weight, scale).requires_grad
    assert not bigkern.int8_linear(x.detach(), weight, scale).requires_grad
    values, x_scale = bigkern.quantize_rows(x)
    assert not values.requires_grad
    assert not x_scale.requires_grad
