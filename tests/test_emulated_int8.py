"""The int8 products' kernels in the emulator: each tile and path, and what they read and write."""

import pytest
import torch
from emulator import ops

import bigkern
from bigkern.ops import reference_int8 as reference
from bigkern.ops import reference_int8_conv2d
from bigkern.ops.int8_autograd import packed_size
from bigkern.ops.int8_conv2d import int8_conv2d, pack_conv2d_weight
from bigkern.testing import assert_as_accurate

pytestmark = pytest.mark.usefixtures("one_thread")

# Sizes [M, N] for which one SM takes each tile; the last rows and columns are missing.
TILES = {"128, 256": (120, 240), "128, 128": (120, 112), "64, 64": (60, 48)}
every_tile = pytest.mark.parametrize("tile", TILES)
LAYOUTS = {"b_of_columns": lambda b: b.T.contiguous().T, "b_of_rows": lambda b: b.contiguous()}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def integers(*shape):
    return torch.randint(-128, 128, shape, dtype=torch.int8)


@pytest.fixture
def controls(emulated_ops):
    """Of a card with one SM, where small problems take large tiles."""
    emulated_ops.set_device("one_sm")
    emulated_ops.set_schedule("random", 1)
    emulated_ops.take_launches()
    with ops.backend():
        yield emulated_ops
    emulated_ops.set_device("h100")


def launched(controls):
    launches = controls.take_launches()
    names = [launch["kernel"].replace("(anonymous namespace)::", "") for launch in launches]
    return launches, [name.removeprefix("void ").removeprefix("bigkern::") for name in names]


@every_layout
@every_tile
@pytest.mark.parametrize("K", [16, 1040])
def test_each_tile_is_exact(controls, tile, layout, K):
    """Also where K ends within a tile, and stages of copies are taken in turn."""
    M, N = TILES[tile]
    for values in (integers(M, K), torch.full((M, K), -128, dtype=torch.int8)):
        b = integers(K, N)
        out = bigkern.int8_mm(values, LAYOUTS[layout](b))
        assert torch.equal(out, reference.int8_mm(values, b))
        _, names = launched(controls)
        assert len(names) == 1  # none is copied first
        assert f"Int8Tile<{tile}" in names[0]


@every_layout
@every_tile
@pytest.mark.parametrize("activation", [None, "relu"])
def test_each_tile_scales_its_rows_and_columns(controls, tile, layout, activation):
    M, N = TILES[tile]
    x, weight, scale, bias = torch.randn(M, 48), integers(N, 48), torch.rand(N), torch.randn(N)
    arguments = (x, LAYOUTS[layout](weight.T).T, scale, bias)
    actual = bigkern.int8_linear(*arguments, activation=activation)
    assert any(f"Int8Tile<{tile}" in name for name in launched(controls)[1])
    baseline = reference.int8_linear(*arguments, activation=activation)
    expected = reference.int8_linear(*arguments, activation=activation, dtype=torch.float64)
    assert_as_accurate(actual, expected, baseline)


@pytest.mark.usefixtures("controls")
def test_too_many_groups_are_an_error():
    x, scale = (torch.zeros(1, 1).expand(1, 2**31) for _ in range(2))
    weight = torch.zeros(1, 1, dtype=torch.int8).expand(1, 2**31)
    with pytest.raises(ValueError, match=r"less than 2\^31 groups a row .* got 2147483648"):
        bigkern.weight_only_linear(x, weight, scale, group_size=1)


@every_tile
@pytest.mark.parametrize("order", ["asc", "desc", "random"])
def test_order_of_threads_changes_nothing(controls, tile, order):
    M, N = TILES[tile]
    a, b = integers(M, 520), integers(520, N)
    controls.set_schedule(order, 7)
    for layout in LAYOUTS.values():
        assert torch.equal(bigkern.int8_mm(a, layout(b)), reference.int8_mm(a, b))


@every_layout
@every_tile
def test_shared_memory_has_no_bank_conflicts(controls, tile, layout):
    M, N = TILES[tile]
    a, b = integers(M, 512), LAYOUTS[layout](integers(512, N))
    controls.count_conflicts(True)
    try:
        bigkern.int8_mm(a, b)
    finally:
        controls.count_conflicts(False)
    (launch,), _ = launched(controls)
    assert launch["shared_accesses"] > 0
    assert launch["bank_conflicts"] == 0


@every_tile
def test_operands_are_read_once_a_tile(controls, tile):
    M, N = TILES[tile]
    bigkern.int8_mm(integers(M, 512), integers(512, N))
    (launch,), _ = launched(controls)
    assert launch["global_read"] == 512 * (M + N)
    assert launch["global_written"] == 4 * M * N


@pytest.mark.parametrize("M", [1, 2, 3, 8])
def test_few_rows_read_the_weight_once(controls, M):
    """And a's rows for each four columns."""
    N, K, rows = 12, 2064, {3: 4}.get(M, M)
    a, b = integers(M, K), integers(N, K)
    assert torch.equal(bigkern.int8_mm(a, b.T), reference.int8_mm(a, b.T))
    (launch,), (name,) = launched(controls)
    assert name.startswith(f"int8_gemv_kernel<{rows}>(")
    assert launch["global_read"] == N * K + N // 4 * rows * K


@every_layout
def test_long_sums_are_split(controls, layout):
    """Over the SMs of a whole card, and what follows is applied to the whole sum."""
    controls.set_device("h100")
    a, b = integers(33, 4100), integers(4100, 48)
    assert torch.equal(bigkern.int8_mm(a, LAYOUTS[layout](b)), reference.int8_mm(a, b))
    x, weight, scale = torch.randn(33, 4096), integers(50, 4096), torch.rand(50)
    options = {"bias": torch.randn(50), "activation": "gelu"}
    out = bigkern.int8_linear(x, weight, scale, **options)
    torch.testing.assert_close(out, reference.int8_linear(x, weight, scale, **options))
    _, names = launched(controls)
    assert sum(name.startswith("int8_finish_kernel(") for name in names) == 2


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("channels", "outputs"), [(32, 120), (16, 40), (5, 120)])
def test_convolutions_take_each_tile(controls, channels, outputs, channels_last):
    """Channels in whole chunks of 16 bytes are gathered while they are copied to shared memory."""
    x = torch.randn(2, channels, 9, 8)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    weight, scale = integers(outputs, channels, 3, 2), torch.rand(outputs)
    packed = pack_conv2d_weight(weight)
    controls.take_launches()
    out = int8_conv2d(
        x.contiguous(memory_format=memory_format), packed, scale, padding=1, kernel_size=(3, 2)
    )
    expected = reference_int8_conv2d.int8_conv2d(
        x, weight, scale, stride=[1, 1], padding=[1] * 4, dilation=[1, 1], groups=1
    )
    torch.testing.assert_close(out, expected)
    _, names = launched(controls)
    layout = "(bigkern::Int8Layout)" + ("2" if channels % 16 == 0 else "0")
    assert any("gather_patches_kernel" in name for name in names) == (channels % 16 != 0)
    assert layout in names[-1]


def test_static_scales_that_are_no_scales_give_nan(controls):
    """The host can't look at them without waiting."""
    x, weight, scale = torch.randn(4, 40), integers(9, 40), torch.rand(9)
    x_scale = torch.tensor([0.1, -0.1, torch.inf, torch.nan])
    values, found = bigkern.quantize_rows(x, static_scale=x_scale)
    assert found.isnan().tolist() == [False, True, True, True]
    assert not values[1:].any()
    y = bigkern.int8_linear(x, weight, scale, x_scale=x_scale)
    assert y.isnan().all(1).tolist() == [False, True, True, True]


@pytest.mark.parametrize("shape", [(1, 1), (7, 127), (65, 1000), (3, 0), (0, 5)])
def test_packed_weights_have_the_size_of_their_fakes(controls, shape):
    assert bigkern.pack_weight(integers(*shape)).numel() == packed_size(*shape, "cuda")


def test_weights_that_are_packed_otherwise_are_refused(controls):
    x, scale = torch.ones(2, 3), torch.ones(4)
    packed = bigkern.pack_weight(integers(4, 3))
    for other in (packed[:-1], packed[16:], integers(64 + 64 * 2), integers(12)):
        with pytest.raises(ValueError, match=r"come from pack_weight .* \[4, 3\], got \d+ other"):
            bigkern.int8_linear(x, other, scale)
    with pytest.raises(ValueError, match="of one dimension must come from pack_conv2d_weight"):
        int8_conv2d(torch.ones(1, 3, 1, 1), packed[32:], scale, kernel_size=1)
    unpack = torch.ops.bigkern_emulated.unpack_weight
    with pytest.raises(ValueError, match=r"packed must come from pack_weight .* \[40, 3\], got 96"):
        unpack(packed, 40, 3)
