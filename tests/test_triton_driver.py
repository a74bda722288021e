"""The Triton driver over the emulator: launches as on a card, and what it finds."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="torch for CPUs comes without Triton")

import triton
import triton_driver
import triton_kernels
from triton.language import float32, int32
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from bigkern.ops import adam_, grad_norm


@pytest.fixture
def card(request):
    """Of sm_80, if the test doesn't say which."""
    driver = triton_driver.Driver(getattr(request, "param", 80))
    with driver.active():
        yield driver


both = pytest.mark.parametrize("card", [80, 90], indirect=True)


@both
def test_arguments_of_all_kinds(card):
    n = 127
    x, y = torch.randn(n), torch.randn(n, dtype=torch.float64)
    out = torch.zeros(n, dtype=torch.float64)
    grid = (triton.cdiv(n, 256),)
    for step in (1, 2):  # one is a constant to Triton
        for flag in (True, False):  # but not this
            triton_kernels.arguments[grid](
                out, x, (y, 0.5), None, n, step, 2**40, flag, 0.1, BLOCK=256
            )
            expected = x.double() + 0.5 * y + step + 2**40 + flag + 0.1
            torch.testing.assert_close(out, expected, rtol=0, atol=1e-3)
    launches = card.take_launches()
    assert [launch["grid"] for launch in launches] == [(*grid, 1, 1)] * 4
    assert launches[0]["block"] == (128, 1, 1)
    assert card.take_launches() == []


@both
def test_products_and_schedules(card):
    card.find_races(True)
    a, b = (torch.randint(-9, 9, (rows, 128)).half() for rows in (100, 72))
    for schedule in ("asc", "desc", "random"):
        card.set_schedule(schedule)
        c = torch.zeros(100, 72)
        triton_kernels.matmul[(2, 3)](a, b, c, 100, 72, 128, 64, 32, 64, float32)
        assert torch.equal(c, a.float() @ b.float().T)


@pytest.mark.parametrize("blocks", [2, 4])
def test_programs_of_several_blocks(blocks):
    card = triton_driver.Driver(90)
    card.find_races(True)
    a, b = (torch.randint(-9, 9, (rows, 128)).half() for rows in (100, 72))
    c = torch.zeros(100, 72)
    with card.active():
        launch = triton_kernels.matmul[(2, 3)]
        launch(a, b, c, 100, 72, 128, 64, 32, 64, float32, num_ctas=blocks)
    assert torch.equal(c, a.float() @ b.float().T)
    (launched,) = card.take_launches()
    assert (launched["grid"], launched["cluster"]) == ((2 * blocks, 3, 1), (blocks, 1, 1))


def test_descriptors():
    a, b = (torch.randint(-9, 9, (rows, 192)).half() for rows in (100, 72))
    c = torch.zeros(100, 72)
    tensors, boxes = (a, b, c), ([64, 64], [32, 64], [64, 32])
    arguments = [
        TensorDescriptor.from_tensor(x, box) for x, box in zip(tensors, boxes, strict=True)
    ]
    launch = triton_kernels.matmul_of_descriptors[(2, 3)]
    with triton_driver.Driver(90).active():
        launch(*arguments, 100, 72, 192, 64, 32, 64, float32)
    assert torch.equal(c, a.float() @ b.float().T)
    with triton_driver.Driver(80).active(), pytest.raises(NotImplementedError, match="for sm_90"):
        launch(*arguments, 100, 72, 192, 64, 32, 64, float32)


def test_accesses_beyond_a_tensor_are_errors(card):
    x = torch.zeros(1000, dtype=torch.int32)
    triton_kernels.increment[(4,)](x, 1000, BLOCK=256)
    assert (x == 1).all()
    with pytest.raises(RuntimeError, match=r"ends \d+ bytes after the end of a tensor of shape"):
        triton_kernels.increment[(4,)](x[:900], 1000, BLOCK=256)
    triton_kernels.increment[(4,)](x, 1000, BLOCK=256)  # it is forgotten what was wrong


def test_races_are_found(card):
    x = torch.zeros(256, dtype=torch.int32)
    triton_kernels.shift[(1,)](x, BLOCK=256)
    card.find_races(True)
    with pytest.raises(RuntimeError, match="race"):
        triton_kernels.shift[(1,)](x, BLOCK=256)


@pytest.mark.parametrize(("architecture", "limit"), [(80, 166912), (90, 232448)])
def test_too_much_shared_memory(architecture, limit):
    a, b = (torch.zeros(256, 128, dtype=torch.int8) for _ in range(2))
    c = torch.zeros(256, 256, dtype=torch.int32)
    launch = triton_kernels.matmul[(1, 1)]
    with (
        triton_driver.Driver(architecture).active(),
        pytest.raises(OutOfResources, match=rf"shared memory, Required: \d+, .*limit: {limit}"),
    ):
        launch(a, b, c, 256, 256, 128, 256, 256, 128, int32, num_warps=8, num_stages=5)


def test_an_ops_tensors_are_known_by_their_addresses_while_it_runs():
    """Adam's kernels find them in a table."""
    params = [torch.randn(n) for n in (1000, 7)]
    others = [[torch.zeros_like(p) for p in params] for _ in range(3)]
    steps = [torch.zeros(()) for _ in params]
    options = {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    with triton_driver.backend(80) as card:
        card.find_races(True)
        adam_(params, *others, [], steps, **options)
        assert not card.known
        assert [launch["kernel"] for launch in card.take_launches()][-2:] == ["_prepare", "_adam"]
        adam_(params, *others, [], steps, **options)  # the tables are kept
        assert [launch["kernel"] for launch in card.take_launches()] == ["_prepare", "_adam"]
    assert grad_norm(params).device.type == "cpu"  # and the driver is gone


def test_few_programs_keep_the_stacks_of_their_threads(card, monkeypatch):
    """Hundreds are loaded by the tests; each stack takes two memory mappings."""

    def mappings_after(*widths):
        for width in widths:
            a, c = torch.zeros(64, 64).half(), torch.ones(64, width)
            triton_kernels.matmul[(1, 1)](a, a[:width], c, 64, width, 64, 64, width, 64, float32)
            assert not c.any()
        return len(Path("/proc/self/maps").read_text().splitlines())

    monkeypatch.setattr(triton_driver, "MOST_WITH_STACKS", 2)
    of_both = mappings_after(32, 64)
    monkeypatch.setattr(triton_driver, "MOST_WITH_STACKS", 1)
    assert mappings_after(64) < of_both - 200  # of 128 threads
    assert mappings_after(32, 64, 32) < of_both - 200
