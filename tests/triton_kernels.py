"""Kernels whose PTX, as Triton compiles them, the emulator runs."""

import triton
import triton.language as tl


@triton.jit
def matmul(
    a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr
):
    """c [M, N] = a [M, K] @ b [N, K]^T, by pointers; K is a multiple of BK."""
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), dtype=ACC)
    for k in range(0, K, BK):
        x = tl.load(a + rm[:, None] * K + (k + rk)[None, :], mask=rm[:, None] < M, other=0)
        y = tl.load(b + rn[None, :] * K + (k + rk)[:, None], mask=rn[None, :] < N, other=0)
        acc = tl.dot(x, y, acc, out_dtype=ACC)
    tl.store(c + rm[:, None] * N + rn[None, :], acc, mask=(rm[:, None] < M) & (rn[None, :] < N))


@triton.jit
def matmul_of_descriptors(
    a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr
):
    """The same by bulk copies."""
    m, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    acc = tl.zeros((BM, BN), dtype=ACC)
    for k in range(0, K, BK):
        acc = tl.dot(a.load([m, k]), b.load([n, k]).T, acc, out_dtype=ACC)
    c.store([m, n], acc)


@triton.jit
def hundreds_of_registers(x, BLOCK: tl.constexpr):
    """Of a thread of the one warp, for a block of 8192."""
    i = tl.arange(0, BLOCK)
    values = tl.load(x + i)
    tl.debug_barrier()
    tl.store(x + i, values * tl.max(values, 0))


@triton.jit
def arguments(out, x, pair, nothing, n, step, large, flag, number, BLOCK: tl.constexpr):
    """out = x + pair[0] * pair[1] + step + large + flag + number."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(x + i, i < n).to(tl.float64) + tl.load(pair[0] + i, i < n) * pair[1]
    if nothing is None:
        y += step + large.to(tl.float64) + flag.to(tl.float64) + number
    tl.store(out + i, y, i < n)


@triton.jit
def increment(x, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + i, tl.load(x + i, i < n) + 1, i < n)


@triton.jit
def shift(x, BLOCK: tl.constexpr):
    """What each thread writes another one reads, which nothing orders."""
    i = tl.arange(0, BLOCK)
    tl.store(x + i, i)
    tl.store(x + i, tl.load(x + BLOCK - 1 - i))
