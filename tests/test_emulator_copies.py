"""The emulator's barriers in shared memory and bulk copies, of sm_90."""

import re

import pytest
import torch
from emulator import build
from emulator_helpers import SCHEDULES, Kernels, tensor_map

KERNELS = build.HERE / "kernels"


@pytest.fixture(scope="module")
def copies():
    source = KERNELS / "bulk_copies.cu"
    return Kernels("bulk_copies", source, architectures=["90a"])


@pytest.fixture(params=SCHEDULES, ids=lambda s: "-".join(map(str, s)))
def run(copies, request):
    copies.controls.set_schedule(*request.param)
    yield copies
    copies.controls.find_races(False)


def ring(run, bug, tiles=7):
    x = torch.randn(tiles, 256)
    out = torch.zeros_like(x)
    run("ring", x, out, tiles, bug, block=(64, 1, 1))
    return torch.equal(out, 2 * x)


def stores(run, bug, tiles=3):
    x = torch.randn(tiles, 256)
    out = torch.zeros_like(x)
    run("stores", x, out, tiles, bug, block=(64, 1, 1))
    return torch.equal(out, 3 * x)


@pytest.mark.parametrize("kernel", [ring, stores])
@pytest.mark.parametrize("finds_races", [False, True])
def test_copies(run, kernel, finds_races):
    run.controls.find_races(finds_races)
    assert all(kernel(run, 0, tiles) for tiles in (1, 2, 7))


ON_ITS_WAY = r"but the bytes of cp.async.bulk\S* at .* are on their way"
MISTAKES = {
    (ring, 1): r"deadlock: (.*\n)*  mbarrier at offset \d+: 0 of 1 arrivals and 16 bytes to come",
    (ring, 2): r"race: ld.shared\S* at \S+.* cp.async.bulk|deadlock: ",
    (ring, 3): r"race: |more arrivals than the 1 of the mbarrier",
    (ring, 4): r"race: |deadlock: ",
    (ring, 5): r"race: mbarrier\S* .* which mbarrier.init|there is no mbarrier at offset",
    (ring, 6): r"race: |more arrivals than the 16 of the mbarrier|deadlock: ",
    (stores, 1): r"cp.async.bulk\S* at .*: no fence.proxy.async since st.shared\S* at \S+ wrote",
    (stores, 2): rf"race: st.shared\S* at \S+, {ON_ITS_WAY}",
}  # fmt: skip


@pytest.mark.parametrize(("kernel", "bug"), MISTAKES)
def test_a_mistake_is_named_under_any_schedule(run, kernel, bug):
    run.controls.find_races(True)
    with pytest.raises(RuntimeError) as error:
        kernel(run, bug)
    assert re.search(MISTAKES[kernel, bug], str(error.value)), str(error.value)


def test_a_copy_that_nobody_waits_for(copies):
    copies.controls.set_schedule("asc")
    with pytest.raises(RuntimeError, match=r"cp.async.bulk\S* at .* the block has exited before"):
        stores(copies, 3)


@pytest.mark.parametrize(("kernel", "bug"), [(ring, 2), (ring, 3), (stores, 2)])
def test_mistakes_show_under_some_schedule(copies, kernel, bug):
    def is_right(schedule):
        copies.controls.set_schedule(*schedule)
        try:
            return kernel(copies, bug)
        except RuntimeError:
            return False

    assert not all(is_right(schedule) for schedule in SCHEDULES)


# ---- Boxes of tensors ----


def position(*at):
    return torch.tensor([*at[::-1], *[0] * (5 - len(at))], dtype=torch.int32).numpy().tobytes()


def swizzle_bytes(data, swizzle):
    """The chunks of 16 bytes of each 128 change places, by the number of their 128."""
    chunks = data.view(-1, 16)
    i = torch.arange(len(chunks))
    mask = swizzle // 16 - 1 if swizzle else 0
    place = i ^ (i // 8 & mask)
    moved = torch.empty_like(chunks)
    moved[place] = chunks
    return moved.flatten()


BOXES = [
    # The tensor's shape and type, the box, where it begins, the swizzle.
    ((100,), torch.float32, (64,), (10,), 0),
    ((100,), torch.float32, (64,), (-5,), 0),
    ((100, 48), torch.float16, (16, 16), (90, 40), 32),
    ((100, 48), torch.float16, (24, 32), (7, 8), 64),
    ((100, 72), torch.float16, (64, 64), (-3, 16), 128),
    ((33, 160), torch.int8, (8, 128), (30, 64), 128),
    ((7, 20, 12), torch.float32, (2, 5, 8), (5, 17, 6), 32),
    ((3, 5, 6, 8), torch.float32, (2, 2, 3, 4), (1, -1, 2, 0), 0),
    ((2, 3, 4, 5, 6), torch.float64, (1, 2, 3, 2, 4), (1, 1, 2, 4, 3), 32),
]


def box_of(x, box, at):
    """Zeros where the tensor isn't."""
    padded = torch.zeros([s + 2 * b for s, b in zip(x.shape, box, strict=True)], dtype=x.dtype)
    inner = tuple(slice(b, b + s) for s, b in zip(x.shape, box, strict=True))
    padded[inner] = x
    return padded, tuple(slice(b + a, 2 * b + a) for a, b in zip(at, box, strict=True)), inner


@pytest.mark.parametrize(("shape", "dtype", "box", "at", "swizzle"), BOXES)
def test_boxes(run, shape, dtype, box, at, swizzle):
    x = torch.randint(-100, 100, shape).to(dtype)
    padded, place, inner = box_of(x, box, at)
    expected = swizzle_bytes(padded[place].contiguous().flatten().view(torch.int8), swizzle)
    out = torch.zeros_like(expected)
    size = out.numel()
    run.controls.add_buffer(x.data_ptr(), x.nbytes, "x")
    try:
        arguments = (tensor_map(run, x, box, swizzle), position(*at))
        run("load_box", *arguments, out, size, len(shape), block=(64, 1, 1), smem=size + 1024)
        assert torch.equal(out, expected)
        padded[place] = 7
        expected = swizzle_bytes(padded[place].contiguous().flatten().view(torch.int8), swizzle)
        run("store_box", *arguments, expected, size, len(shape), block=(64, 1, 1), smem=size + 1024)
        assert torch.equal(x, padded[inner])
    finally:
        run.controls.remove_buffer(x.data_ptr())


def test_a_tensor_map_of_unknown_memory(copies):
    x, out = torch.zeros(64, 32), torch.zeros(1024, dtype=torch.int8)
    copies.controls.set_schedule("asc")
    copies.controls.add_buffer(x.data_ptr(), x.nbytes // 2, "half of x")
    with pytest.raises(RuntimeError, match=r"cp.async.bulk.tensor.* after the end of half of x"):
        copies("load_box", tensor_map(copies, x, (8, 32)), position(28, 0), out, 1024, 2, smem=2048)
    copies.controls.remove_buffer(x.data_ptr())


@pytest.mark.parametrize(
    ("shape", "box", "swizzle"),
    [
        ((64, 33), (8, 8), 0),
        ((64, 32), (8, 3), 0),
        ((64, 32), (8, 16), 32),
        ((64, 32), (257, 8), 0),
    ],
)
def test_tensor_maps_that_the_driver_refuses(copies, shape, box, swizzle):
    with pytest.raises(ValueError, match="cuTensorMapEncodeTiled: invalid argument"):
        tensor_map(copies, torch.zeros(shape), box, swizzle)


def test_elections(run):
    out = torch.zeros(2, 32, dtype=torch.int32)
    run("elections", out)
    assert out[0].tolist() == [0] * 5 + [5] * 27
    assert out[1].nonzero().flatten().tolist() == [0, 5]
