"""Each bad input of the int8 ops is named, with what was wanted and what came."""

import re

import pytest
import torch
from emulator import ops

import bigkern
from bigkern import backends

INT8 = torch.int8


@pytest.fixture(params=["native", "emulated", "triton"])
def _each_backend(request):
    """The GPU's ops have the CPU's door, but for what the host can't read."""
    if request.param == "native":
        yield
        return
    if request.param == "triton":
        with request.getfixturevalue("triton_driver").backend(80):
            yield
        return
    request.getfixturevalue("emulated_ops")
    with ops.backend():
        yield


each_backend = pytest.mark.usefixtures("_each_backend")


def ints(*shape, dtype=INT8):
    return torch.ones(shape, dtype=dtype)


def assert_refused(message, function, *args, error=ValueError, **options):
    with pytest.raises(error, match=re.escape(message)):
        function(*args, **options)


@each_backend
@pytest.mark.parametrize(
    ("message", "a", "b"),
    [
        ("a must have 2 dimensions at least, got shape [3]", ints(3), ints(3, 4)),
        ("b must have 2 dimensions at least, got shape []", ints(3, 4), ints()),
        ("a must be torch.int8, got ", ints(2, 3, dtype=torch.uint8), ints(3, 4)),
        ("b must be torch.int8, got torch.float32", ints(2, 3), torch.ones(3, 4)),
        (
            "b must have as many rows as a has columns, 3, got shape [4, 3]",
            ints(2, 3),
            ints(4, 3),
        ),
        (
            "leading dimensions that broadcast, got shapes [2, 1, 3] and [3, 3, 4]",
            ints(2, 1, 3),
            ints(3, 3, 4),
        ),
    ],
)
def test_int8_mm(message, a, b):
    assert_refused(message, bigkern.int8_mm, a, b)


@each_backend
def test_raw_int8_mm():
    op = backends.select("int8_mm", "cpu").int8_mm
    assert_refused(
        "2 dimensions, or 3, got shapes [2, 3] and [1, 3, 4]", op, ints(2, 3), ints(1, 3, 4)
    )
    assert_refused(
        "b must have the batch size of a, 2, got shape [3, 3, 4]", op, ints(2, 2, 3), ints(3, 3, 4)
    )


@each_backend
@pytest.mark.parametrize(
    ("message", "x", "static_scale"),
    [
        (
            "x must be float32, bfloat16 or float16, got torch.float64",
            torch.ones(2, 3).double(),
            None,
        ),
        ("x must be float32, bfloat16 or float16, got ", ints(2, 3), None),
        ("x must have shape [..., K], got []", torch.ones(()), None),
        (
            "static_scale must have one element, or one for each row of x [2, 3], got shape [3]",
            torch.ones(2, 3),
            torch.ones(3),
        ),
        (
            "static_scale must be torch.float32, got torch.float64",
            torch.ones(2, 3),
            torch.ones(2).double(),
        ),
    ],
)
def test_quantize_rows(message, x, static_scale):
    assert_refused(message, bigkern.quantize_rows, x, static_scale=static_scale)


@pytest.mark.parametrize("scale", [-1.0, torch.inf, torch.nan])
def test_static_scale(scale):
    message = f"static_scale must be finite and not negative, got {scale:g}"
    assert_refused(message, bigkern.quantize_rows, torch.ones(2, 3), static_scale=scale)


def test_pack_weight():
    assert_refused(
        "weight_q must be torch.int8, got torch.float32", bigkern.pack_weight, torch.ones(2, 3)
    )
    assert_refused("weight_q must have shape [N, K], got [3]", bigkern.pack_weight, ints(3))
    unpack = torch.ops.bigkern.unpack_weight
    packed = bigkern.pack_weight(ints(4, 3))
    assert_refused("packed must be of shape [3, 4], got one of [4, 3]", unpack, packed, 3, 4)
    assert_refused("must come from pack_weight, got 7 other bytes", unpack, ints(7), 3, 4)
    assert_refused("packed must have one dimension, got shape [2, 3]", unpack, ints(2, 3), 2, 3)


def linear_arguments(**changed):
    arguments = {
        "x": torch.ones(2, 3),
        "weight_q": ints(4, 3),
        "weight_scale": torch.ones(4),
        "bias": torch.ones(4),
    }
    return arguments | changed


SHARED = {
    "x must be float32, bfloat16 or float16, got torch.float64": {"x": torch.ones(2, 3).double()},
    "x must have shape [..., K], got []": {"x": torch.ones(())},
    "weight_q must be torch.int8, got torch.float32": {"weight_q": torch.ones(4, 3)},
    "weight_scale must have shape [4], got [5]": {"weight_scale": torch.ones(5)},
    "weight_scale must be torch.float32, got torch.bfloat16": {
        "weight_scale": torch.ones(4).bfloat16()
    },
    "bias must have shape [4], got [2]": {"bias": torch.ones(2)},
    "bias must be float32, bfloat16 or float16, got torch.float64": {
        "bias": torch.ones(4).double()
    },
}
LINEAR = {
    "weight_q must have shape [N, K] or be packed, got [1, 4, 3]": {"weight_q": ints(1, 4, 3)},
    "x must have the K of weight_q [4, 3] as its last size, got [2, 5]": {"x": torch.ones(2, 5)},
    "weight_scale must have shape [N], got [4, 1]": {"weight_scale": torch.ones(4, 1)},
    "activation must be relu, gelu, gelu_tanh, silu or None, got tanh": {"activation": "tanh"},
    "out_dtype must be float32, bfloat16 or float16, got torch.float64": {
        "out_dtype": torch.float64
    },
    "x_scale must have one element, or one for each row of x [2, 3], got shape [2, 1]": {
        "x_scale": torch.ones(2, 1)
    },
    "K must be at most 132104, or sums might not fit int32, got 132105": {
        "x": torch.ones(2, 132105),
        "weight_q": ints(4, 132105),
    },
}
# What the host reads to know.
VALUES = {
    "x must have the K of the packed weight_q [4, 5] as its last size, got [2, 3]": {
        "weight_q": bigkern.pack_weight(ints(4, 5))
    },
    "weight_scale must have shape [6], got [4]": {"weight_q": bigkern.pack_weight(ints(6, 3))},
    "weight_q of one dimension must come from pack_weight, got 12 other bytes": {
        "weight_q": ints(12)
    },
    "weight_q of one dimension must come from pack_weight, got 300 other bytes": {
        "weight_q": ints(300)
    },
    "x_scale must be finite and not negative, got -0.5": {"x_scale": -0.5},
}
WEIGHT_ONLY = {
    "weight_q must have shape [N, K] with the last size of x [2, 5] as K, got [4, 3]": {
        "x": torch.ones(2, 5)
    },
    "weight_q must have shape [N, K] with the last size of x [2, 3] as K, got [12]": {
        "weight_q": ints(12)
    },
    "group_size must be 0 (whole rows) or positive, got -1": {"group_size": -1},
    "weight_scale must have shape [4, 2] for group_size 2, got [4]": {"group_size": 2},
}


@each_backend
@pytest.mark.parametrize("message", SHARED | LINEAR)
def test_int8_linear(message):
    assert_refused(message, bigkern.int8_linear, **linear_arguments(**(SHARED | LINEAR)[message]))


@pytest.mark.parametrize("message", VALUES)
def test_int8_linear_on_the_cpu(message):
    assert_refused(message, bigkern.int8_linear, **linear_arguments(**VALUES[message]))


@each_backend
@pytest.mark.parametrize("message", SHARED | WEIGHT_ONLY)
def test_weight_only_linear(message):
    changed = (SHARED | WEIGHT_ONLY)[message]
    assert_refused(message, bigkern.weight_only_linear, **linear_arguments(**changed))


@pytest.mark.parametrize("function", [bigkern.int8_linear, bigkern.weight_only_linear])
def test_scales_have_no_gradient(function):
    scale = torch.ones(4, requires_grad=True)
    message = "weight_scale can't have a gradient: detach() it"
    arguments = linear_arguments(weight_scale=scale)
    assert_refused(message, function, **arguments, error=NotImplementedError)
    with torch.no_grad():
        function(**arguments)


def test_triton_reads_no_packed_weight(triton_driver):
    packed = bigkern.pack_weight(ints(4, 3))
    message = "weight_q must be the plain weight [N, K]: the backend triton reads no packed one"
    with triton_driver.backend(80):
        assert_refused(message, bigkern.int8_linear, torch.ones(2, 3), packed, torch.ones(4))


def test_packed_weight_that_was_cut_off():
    packed = bigkern.pack_weight(ints(4, 3))
    cut = packed[:-1]
    message = f"must come from pack_weight, got {cut.numel()} other bytes"
    assert_refused(message, bigkern.int8_linear, torch.ones(2, 3), cut, torch.ones(4))
