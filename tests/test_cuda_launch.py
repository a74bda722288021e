"""csrc/cuda/launch.cuh: what a launch may have, and what is said where it can't be."""

import re

import pytest
import torch
from cuda_compiler import NoCompilerError
from emulator import build

KB = 1024
KERNEL = r"^count_kernel<\(Step\)1> "


@pytest.fixture(scope="module")
def controls():
    try:
        return build.load("launches", build.Sources([build.HERE / "kernels/launches.cu"]))
    except NoCompilerError as obstacle:
        pytest.skip(str(obstacle))


@pytest.fixture
def on(controls):
    """Chooses the card."""
    yield controls.set_device
    controls.set_device("h100")


def count(blocks=1, threads=32, smem_bytes=4):
    out = torch.zeros(1, dtype=torch.int32)
    torch.ops.bigkern_launches.count(out, blocks, threads, smem_bytes)
    return out.item()


@pytest.mark.parametrize(
    ("card", "most"), [("a100", 163 * KB), ("rtx4090", 99 * KB), ("h100", 227 * KB)]
)
def test_a_launch_may_have_all_shared_memory_of_a_card(on, card, most):
    on(card)
    for smem_bytes in (4, 48 * KB, 48 * KB + 4, most, 64 * KB, 4):
        assert count(threads=33, smem_bytes=smem_bytes) == 33
    with pytest.raises(RuntimeError) as error:
        count(smem_bytes=most + 4)
    assert re.search(
        rf"{KERNEL}wasn't launched with grid \[1, 1, 1\], block \[32, 1, 1\] and "
        rf"{most + 4} bytes of dynamic shared memory \(a block has at most {most}\)\n.*"
        r"invalid argument",
        str(error.value),
    ), str(error.value)
    assert count() == 32  # what has failed doesn't disturb the next


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"threads": 1025}, r"grid \[1, 1, 1\], block \[1025, 1, 1\] (.|\n)*invalid configuration"),
        ({"threads": 257}, r"grid \[1, 1, 1\], block \[257, 1, 1\] (.|\n)*invalid argument"),
        ({"blocks": 0}, r"grid \[0, 1, 1\], block \[32, 1, 1\] (.|\n)*invalid configuration"),
    ],
)
def test_an_error_names_kernel_and_shape(on, shape, message):
    with pytest.raises(RuntimeError, match=KERNEL + "wasn't launched with " + message):
        count(**shape)


@pytest.mark.parametrize("smem_bytes", [4, 60 * KB])
def test_an_older_card_is_told_what_serves_it(on, smem_bytes):
    on("t4")
    message = (
        r"needs a GPU of compute capability 8.0 or later, and device 0 has 7.5: "
        r"use torch's own functions on it\n.*no kernel image"
    )
    with pytest.raises(RuntimeError, match=KERNEL + message):
        count(smem_bytes=smem_bytes)
