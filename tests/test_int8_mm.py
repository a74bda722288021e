"""int8_mm, quantize_rows, int8_linear and weight_only_linear against the reference: integers
exactly, floats as the same steps in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from int8_helpers import plain_and_packed

import bigkern
from bigkern import backends
from bigkern.ops import reference_int8 as reference
from bigkern.testing import assert_as_accurate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICES = ["cpu", "emulated", "triton", "triton sm_90", "cuda"]

pytestmark = pytest.mark.usefixtures("one_thread")

# The same cases each time: a failure is seen by whoever made it.
draw = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    print_blob=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # `device` holds nothing of a case
)

# Around the sizes of groups, registers, panels, tiles and blocks.
sizes = st.one_of(st.integers(0, 9), st.sampled_from([15, 17, 48, 63, 65, 127, 130, 200]))
depths = st.one_of(sizes, st.sampled_from([511, 512, 513, 1000, 1025]))
LAYOUTS = ["rows", "columns", "strided", "unaligned", "flipped", "expanded"]
VALUES = ["random", "lowest", "highest", "both"]


def integers(shape, layout="rows", values="random", seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    if values == "both":
        x = torch.where(x < 0, -128, 127).to(torch.int8)
    elif values != "random":
        x.fill_(-128 if values == "lowest" else 127)
    return laid_out(x.to(device), layout)


def laid_out(x, layout):
    if layout == "columns":
        return x.mT.contiguous().mT
    if layout == "strided":
        return torch.stack([x, x], -1)[..., 1]
    if layout == "unaligned":
        return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)
    if layout == "flipped":
        return x.mT.contiguous().flip(0).mT
    if layout == "expanded":
        return x[..., :1].expand_as(x)
    return x.contiguous()


def assert_equal(actual, expected):
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected)


def test_worked_example(device):
    a = torch.tensor([[1, -2, 3]], dtype=torch.int8, device=device)
    b = torch.tensor([[127, 0], [-128, 1], [5, -1]], dtype=torch.int8, device=device)
    assert_equal(bigkern.int8_mm(a, b), torch.tensor([[398, -5]], dtype=torch.int32, device=device))


@draw
@given(
    M=sizes,
    N=sizes,
    K=depths,
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    values=st.tuples(st.sampled_from(VALUES), st.sampled_from(VALUES)),
    seed=st.integers(0, 99),
)
def test_product(device, M, N, K, layouts, values, seed):
    a = integers((M, K), layouts[0], values[0], seed, device)
    b = integers((K, N), layouts[1], values[1], seed + 1, device)
    assert_equal(bigkern.int8_mm(a, b), reference.int8_mm(a, b))


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("shape", [(400, 33, 70), (193, 130, 520), (1, 1000, 127)])
def test_product_of_many_rows(device, shape, layout):
    """Those for which b is packed beforehand, and shared by all threads."""
    M, N, K = shape
    a, b = integers((M, K), device=device), integers((K, N), layout, seed=1, device=device)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert_equal(bigkern.int8_mm(a, b), reference.int8_mm(a, b))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("a", "b"), list(itertools.product((-128, 127), repeat=2)))
def test_longest_sums_that_fit_int32(device, a, b):
    """Also those of the smallest and largest products, which overflow 16 bits at each step."""
    K = 131_071
    x = torch.full((5, K), a, dtype=torch.int8, device=device)
    y = torch.full((K, 17), b, dtype=torch.int8, device=device)
    expected = torch.full((5, 17), a * b * K, dtype=torch.int64, device=device)
    assert_equal(bigkern.int8_mm(x, y).long(), expected)


def test_longer_sums_are_modulo_2_to_the_32(device):
    K = 2**17 + 3
    x = torch.full((2, K), -128, dtype=torch.int8, device=device)
    expected = torch.full((2, 2), 2**14 * K - 2**32, dtype=torch.int64, device=device)
    assert_equal(bigkern.int8_mm(x, x.T).long(), expected)


@pytest.mark.parametrize(
    ("lead_a", "lead_b"),
    [((3,), (3,)), ((2, 3), (3,)), ((), (4,)), ((2, 1), (1, 3)), ((5,), (1,))],
)
@pytest.mark.sanitize
def test_batches_broadcast(device, lead_a, lead_b):
    a = integers((*lead_a, 7, 19), device=device)
    b = integers((*lead_b, 19, 33), "columns", seed=1, device=device)
    assert_equal(bigkern.int8_mm(a, b), reference.int8_mm(a, b))


def test_batches_of_many_rows(device):
    a, b = integers((3, 200, 20), device=device), integers((3, 20, 18), seed=1, device=device)
    assert_equal(bigkern.int8_mm(a, b), reference.int8_mm(a, b))


def floats(*shape, dtype=torch.float32, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


@pytest.mark.one_architecture
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(5, 1), (3, 7), (4, 127), (2, 3, 1000), (5, 0), (64,), (2, 1100)]
)
def test_quantize_rows(device, shape, dtype):
    x = 10 * floats(*shape, dtype=dtype, device=device)
    for y in (x, torch.stack([x, x], -1)[..., 0]):
        for static in (None, 0.1, torch.rand(x.shape[:-1], device=device)):
            values, scale = bigkern.quantize_rows(y, static_scale=static)
            tensor = torch.tensor(static, device=device) if isinstance(static, float) else static
            expected_values, expected_scale = reference.quantize_rows(y, tensor)
            assert_equal(values, expected_values)
            assert_equal(scale, expected_scale)


def test_quantize_rounds_half_to_even(device):
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.49]], device=device)
    values, scale = bigkern.quantize_rows(x)
    assert values.tolist() == [[127, 0, 2, 2, 0, -2, -2, 0]]
    assert scale.tolist() == [1.0]


@pytest.mark.parametrize("exponent", [-44, -30, -15, 0, 15, 30])
def test_quantize_rounds_right_beside_a_half(device, exponent):
    """Where a quotient that is wrong in its last bit is rounded to the wrong side."""
    largest = 10.0**exponent * (1 + torch.rand(500, 1, device=device))
    scale = largest / 127
    halves = (torch.arange(-127, 127, device=device) + 0.5) * scale
    up, down = (halves.nextafter(torch.tensor(x, device=device)) for x in (torch.inf, -torch.inf))
    x = torch.cat([largest, halves, up, down], 1)
    values, scale = bigkern.quantize_rows(x)
    expected_values, expected_scale = reference.quantize_rows(x)
    assert_equal(values, expected_values)
    assert_equal(scale, expected_scale)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("at", [0, 17, 99])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_not_finite_are_nan_and_others_are_not(device, bad, at, dtype):
    x = floats(3, 100, dtype=dtype, device=device)
    x[1, at] = bad
    for static in (None, 0.5):
        values, scale = bigkern.quantize_rows(x, static_scale=static)
        assert scale.isnan().tolist() == [False, True, False]
        assert not values[1].any()
        weight, weight_scale = bigkern.quantize_rows(floats(20, 100, device=device))
        for activation in ACTIVATIONS:
            y = bigkern.int8_linear(x, weight, weight_scale, x_scale=static, activation=activation)
            assert y.isnan().all(1).tolist() == [False, True, False]
            assert not y[0].isnan().any()


def test_rows_of_zeros_and_tiny_rows(device):
    x = torch.zeros(3, 40, device=device)
    x[1] = 1e-45  # whose scale is 0 in float32
    x[2] = 2e-38
    values, scale = bigkern.quantize_rows(x)
    assert values.tolist() == [[0] * 40, [0] * 40, [127] * 40]
    assert scale[:2].tolist() == [0.0, 0.0]
    expected_values, expected_scale = reference.quantize_rows(x)
    assert_equal(values, expected_values)
    assert_equal(scale, expected_scale)


def test_static_scale_saturates(device):
    x = torch.tensor([[1e30, -1e30, 200.0, -200.0, 1.0] * 8], device=device)
    values, scale = bigkern.quantize_rows(x, static_scale=1.0)
    assert values.tolist() == [[127, -127, 127, -127, 1] * 8]
    assert scale.tolist() == [1.0]


ACTIVATIONS = [None, "relu", "gelu", "gelu_tanh", "silu"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 127, 1000), (7, 33, 70), (60, 1, 129), (200, 100, 600)])
def test_linear(device, shape, activation, dtype):
    """Plain and packed weights, with and without bias, from and to each dtype."""
    M, N, K = shape
    x = 3 * floats(M, K, dtype=dtype, device=device)
    weight, weight_scale = bigkern.quantize_rows(0.1 * floats(N, K, seed=1, device=device))
    first, *others = plain_and_packed(weight)
    for bias, out_dtype in zip((None, torch.float32, dtype, dtype), (None, *DTYPES), strict=True):
        bias = None if bias is None else floats(N, dtype=bias, seed=2, device=device)
        options = {"activation": activation, "out_dtype": out_dtype}
        actual = bigkern.int8_linear(x, first, weight_scale, bias, **options)
        for other in others:
            assert_equal(bigkern.int8_linear(x, other, weight_scale, bias, **options), actual)
        arguments = (x, weight, weight_scale, bias)
        baseline = reference.int8_linear(*arguments, **options)
        options["out_dtype"] = torch.float64
        expected = reference.int8_linear(*arguments, **options, dtype=torch.float64)
        assert_as_accurate(actual, expected, baseline)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_activations_near_and_far_from_zero(device, activation):
    """Sums of 1 and -1 by scales from 1e-30 to 1e30, on a relative scale."""
    scale = torch.logspace(-30, 30, 1001, device=device)
    weight = torch.ones(1001, 1, dtype=torch.int8, device=device)
    for sign in (1.0, -1.0):
        x = torch.full((1, 1), sign, device=device)
        y = bigkern.int8_linear(x, weight, scale, activation=activation, x_scale=1.0)
        expected = reference.ACTIVATIONS[activation](sign * scale.double())[None]
        error = (y - expected).abs() / scale
        torch_error = (reference.ACTIVATIONS[activation](sign * scale) - expected).abs() / scale
        assert error.max() <= max(2 * torch_error.max(), 2 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.sanitize
def test_linear_with_static_scale(device, per_row):
    x = floats(2, 5, 60, device=device)
    weight, weight_scale = bigkern.quantize_rows(floats(20, 60, seed=1, device=device))
    x_scale = 0.01 + 0.02 * torch.rand((2, 5) if per_row else (1,), device=device)
    actual = bigkern.int8_linear(x, weight, weight_scale, x_scale=x_scale)
    baseline = reference.int8_linear(x, weight, weight_scale, x_scale=x_scale)
    expected = reference.int8_linear(
        x, weight, weight_scale, x_scale=x_scale, dtype=torch.float64, out_dtype=torch.float64
    )
    assert_as_accurate(actual, expected, baseline)
    if not per_row:
        number = bigkern.int8_linear(x, weight, weight_scale, x_scale=x_scale.item())
        assert_equal(number, actual)


@pytest.mark.one_architecture
def test_signal_to_quantisation_noise(device):
    """Above 35 dB on normal data, against the float layer."""
    x, weight = floats(64, 1024, device=device), floats(256, 1024, seed=1, device=device)
    weight_q, weight_scale = bigkern.quantize_rows(weight)
    expected = F.linear(x.double(), weight.double())
    for linear in (bigkern.int8_linear, bigkern.weight_only_linear):
        noise = linear(x, weight_q, weight_scale) - expected
        ratio = 10 * (expected.square().sum() / noise.square().sum()).log10()
        print(f"{linear.__name__}: {ratio:.1f} dB")
        assert ratio > 35


def test_same_bits_for_any_number_of_threads():
    x, weight = floats(70, 300), floats(200, 300, seed=1)
    weight, weight_scale = bigkern.quantize_rows(weight)
    packed = bigkern.pack_weight(weight)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            y = bigkern.int8_linear(x, packed, weight_scale, activation="gelu")
            results.append((y, bigkern.weight_only_linear(x, weight, weight_scale)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert_equal(a, b)


def unpack(packed, N, K):
    ops = backends.select("unpack_weight", packed.device.type)
    return ops.unpack_weight.default(packed, N, K)


@pytest.mark.parametrize("shape", [(1, 1), (7, 127), (64, 512), (100, 1000)])
@pytest.mark.parametrize(
    "device", ["cpu", "emulated", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)
@pytest.mark.sanitize
def test_pack_and_unpack(device, shape):
    for N, K in (shape, (5, 0), (0, 5)):
        weight = integers((N, K), device=device)
        for layout in ("rows", "columns", "strided"):
            packed = bigkern.pack_weight(laid_out(weight, layout))
            assert packed.dim() == 1
            assert_equal(unpack(packed, N, K), weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [0, 1, 32, 50, 128, 10_000])
@pytest.mark.one_architecture
@pytest.mark.parametrize("shape", [(1, 127, 1000), (3, 33, 70), (6, 5, 128), (9, 1, 7)])
def test_weight_only(device, shape, group_size, dtype):
    M, N, K = shape
    x = floats(M, K, dtype=dtype, device=device)
    weight = integers((N, K), seed=1, device=device)
    groups = (-(-K // group_size),) if group_size else ()
    scale = torch.rand(N, *groups, generator=torch.Generator().manual_seed(2)).to(device)
    for bias in (None, floats(N, dtype=dtype, seed=3, device=device)):
        arguments = (weight, scale, bias)
        actual = bigkern.weight_only_linear(x, *arguments, group_size=group_size)
        baseline = reference.weight_only_linear(x, *arguments, group_size=group_size)
        expected = reference.weight_only_linear(
            x.double(), *arguments, group_size=group_size, dtype=torch.float64
        )
        assert_as_accurate(actual, expected, baseline)


@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (0,), (2, 0)])
@pytest.mark.sanitize
def test_leading_dimensions(device, lead):
    x = floats(*lead, 30, device=device)
    weight, scale = bigkern.quantize_rows(floats(20, 30, seed=1, device=device))
    for linear in (bigkern.int8_linear, bigkern.weight_only_linear):
        y = linear(x, weight, scale)
        assert y.shape == (*lead, 20)
        assert_equal(y, linear(x.reshape(-1, 30), weight, scale).reshape(y.shape))


@pytest.mark.parametrize("shape", [(3, 5, 0), (3, 0, 5), (0, 5, 5)])
@pytest.mark.sanitize
def test_empty(device, shape):
    M, N, K = shape
    x, bias = torch.ones(M, K, device=device), torch.arange(N, device=device).float()
    weight = torch.ones(N, K, dtype=torch.int8, device=device)
    scale = torch.ones(N, device=device)
    expected = (K + bias).expand(M, N)
    for w in plain_and_packed(weight):
        torch.testing.assert_close(bigkern.int8_linear(x, w, scale, bias), expected)
    torch.testing.assert_close(bigkern.weight_only_linear(x, weight, scale, bias), expected)
    grouped = torch.ones(N, -(-K // 4), device=device)
    actual = bigkern.weight_only_linear(x, weight, grouped, bias, group_size=4)
    torch.testing.assert_close(actual, expected)
    for lead in ((), (2,), (0,)):
        a, b = integers((*lead, M, K), device=device), integers((*lead, K, N), device=device)
        assert_equal(bigkern.int8_mm(a, b), reference.int8_mm(a, b))
    assert [t.shape for t in bigkern.quantize_rows(x[:0])] == [(0, K), (0,)]
    assert [t.shape for t in bigkern.quantize_rows(bias)] == [(N,), ()]
