"""What the emulator counts and knows while the package's ops run in it."""

import pytest
import torch
from emulator import ops
from helpers import OPTIONS, Problem

from bigkern import scaled_dot_product_attention
from bigkern.ops import adam_, grad_norm


@pytest.mark.parametrize("n", [1, 7, 127, 1000, 4096])
def test_adam_moves_each_byte_once(emulated_ops, n):
    problem = Problem(torch.float32, shapes=[(n,)])
    emulated_ops.take_launches()
    with ops.backend():
        adam_(*problem.lists(), **OPTIONS)
    prepare, adam = emulated_ops.take_launches()
    assert "prepare_step_kernel" in prepare["kernel"]
    assert "adam_kernel<float, float, false, false>" in adam["kernel"]
    coefficients = 8 * 8 * adam["grid"][0]  # float64, once a block
    assert adam["global_read"] == 4 * 4 * n + coefficients
    assert adam["global_written"] == 3 * 4 * n


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grad_norm_has_no_bank_conflicts(emulated_ops, dtype):
    emulated_ops.take_launches()
    emulated_ops.count_conflicts(True)
    try:
        with ops.backend():
            grad_norm([torch.ones(100_000, dtype=dtype)])
    finally:
        emulated_ops.count_conflicts(False)
    launches = emulated_ops.take_launches()
    assert all(launch["shared_accesses"] > 0 for launch in launches)
    assert all(launch["bank_conflicts"] == 0 for launch in launches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [2**15, 5000])
def test_warps_ask_for_whole_sectors(emulated_ops, dtype, n):
    problem = Problem(dtype, shapes=[(n,)])
    emulated_ops.take_launches()
    emulated_ops.count_sectors(True)
    try:
        with ops.backend():
            adam_(*problem.lists(), **OPTIONS)
            grad_norm(problem.grads)
    finally:
        emulated_ops.count_sectors(False)
    _, adam, sums, _ = emulated_ops.take_launches()
    sectors = -(-n * dtype.itemsize // 32)
    coefficients = 8 * adam["grid"][0]  # one by one
    assert adam["sectors_read"] == 4 * sectors + coefficients
    assert adam["sectors_written"] == 3 * sectors
    # The last chunk, where it isn't whole, is read by elements, which the L1 cache gathers.
    repeated = 1 if n == 2**15 else 16 // dtype.itemsize
    assert sectors * repeated <= sums["sectors_read"] <= (sectors + 2) * repeated


@pytest.mark.parametrize("features", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_has_no_bank_conflicts(emulated_ops, dtype, features):
    inputs = [torch.randn(1, 1, 150, features, dtype=dtype, requires_grad=True) for _ in range(3)]
    emulated_ops.take_launches()
    emulated_ops.count_conflicts(True)
    try:
        with ops.backend():
            scaled_dot_product_attention(*inputs).sum().backward()
    finally:
        emulated_ops.count_conflicts(False)
    launches = emulated_ops.take_launches()
    by_kernel = {launch["kernel"].split("<")[0]: launch["bank_conflicts"] for launch in launches}
    assert any("attention_kernel" in kernel for kernel in by_kernel)
    assert all(conflicts == 0 for conflicts in by_kernel.values()), by_kernel


@pytest.mark.parametrize("causal", [False, True])
def test_attention_reads_keys_once_for_a_tile_of_queries(emulated_ops, causal):
    L, E, tile = 256, 128, 128  # queries, features, queries of a tile
    q, k, v = (torch.randn(1, 1, L, E, dtype=torch.bfloat16) for _ in range(3))
    emulated_ops.take_launches()
    with ops.backend():
        scaled_dot_product_attention(q, k, v, is_causal=causal)
    (launch,) = emulated_ops.take_launches()
    rows = sum(range(tile, L + 1, tile)) if causal else L // tile * L
    assert launch["grid"][0] == L // tile
    assert launch["global_read"] == 2 * E * (L + 2 * rows)
    assert launch["global_written"] == 2 * E * L + 2 * 4 * L


def test_tensors_are_known_for_the_time_of_a_call(emulated_ops):
    problem = Problem(torch.float32, shapes=[(7,)])
    with ops.backend():
        adam_(*problem.lists(), **OPTIONS)
    assert not any(emulated_ops.remove_buffer(t.data_ptr()) for t in problem.tensors())


@pytest.mark.parametrize("model", ["a100", "h100"])
@pytest.mark.parametrize("schedule", ["asc", "desc", "random"])
def test_same_bits_on_every_card_and_schedule(emulated_ops, model, schedule):
    grads = [torch.randn(n) for n in (1, 5000, 0, 129)]
    emulated_ops.set_schedule("asc")
    with ops.backend():
        expected = grad_norm(grads)
        emulated_ops.set_schedule(schedule, 1)
        emulated_ops.set_device(model)
        assert torch.equal(grad_norm(grads), expected)
