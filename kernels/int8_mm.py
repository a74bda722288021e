"""int8_mm, int8_scaled_mm and int8_linear: products of 8-bit integers, exact, and what follows.

One kernel multiplies. Its operands lie in rows of whole chunks of 16 bytes, so that copies to
shared memory are as wide as can be; what lies otherwise is copied to such rows first. Where there
are fewer tiles than processors K is split in parts, whose sums a second kernel adds. What follows
the sums is the same function in both, and its kinds are arguments: what is compiled depends on the
tile and the layout alone.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from bigkern.kernels import quantize_rows as quantization
from bigkern.kernels import tuning
from bigkern.kernels.int8_call import (
    as_rows,
    check_float,
    check_linear_weight,
    check_mm,
    check_scaled_mm,
    read_activation,
    read_bias,
    read_static_scale,
    read_weight_scale,
)
from torch import Tensor

CHUNK = tl.constexpr(16)
KINDS = {None: 0, torch.int32: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


@triton.jit
def activate(x, activation):
    """NaN stays NaN. gelu_tanh is x sigmoid(2 u), since tanh(u) = 2 sigmoid(2 u) - 1."""
    if activation == 1:
        x = tl.where(x < 0.0, 0.0, x)
    elif activation == 2:
        x = x * (0.5 * tl.erf(x * 0.70710678) + 0.5)
    elif activation >= 3:
        slope = tl.where(activation == 3, x * x * (0.044715 * 1.59576912) + 1.59576912, 1.0)
        x = x / (1.0 + tl.exp(-x * slope))
    return x


@triton.jit
def load_floats(x, kind, offsets, mask):
    """Elements of a kind; zeros of no kind. A load whose mask is false costs nothing."""
    float32 = tl.load(x.to(tl.pointer_type(tl.float32)) + offsets, mask & (kind == 1), other=0.0)
    bfloat16 = tl.load(x.to(tl.pointer_type(tl.bfloat16)) + offsets, mask & (kind == 2), other=0.0)
    float16 = tl.load(x.to(tl.pointer_type(tl.float16)) + offsets, mask & (kind == 3), other=0.0)
    return float32 + bfloat16.to(tl.float32) + float16.to(tl.float32)


@triton.jit
def finish(
    sums, i, j, M, N,  # [rows, columns], int32, and where they are in [M, N]
    out, begin, out_row,  # the first element, and from a row to the next
    row_scale, col_scale, bias, first_col,  # of which a batch's entry begins at first_col
    out_kind, has_col_scale, bias_kind, activation,
):  # fmt: skip
    """Y = act(sums * (row_scale x col_scale) + bias), rounded once; or the sums."""
    if out_kind == 0:
        store(out.to(tl.pointer_type(tl.int32)), sums, i, j, M, N, begin, out_row)
    else:
        is_col, col = j < N, first_col + j
        row_factor = tl.load(row_scale + i, mask=i < M, other=0.0)
        col_factor = tl.load(col_scale + col, mask=is_col & (has_col_scale != 0), other=1.0)
        y = sums.to(tl.float32) * (row_factor[:, None] * col_factor[None, :])
        y = activate(y + load_floats(bias, bias_kind, col, is_col)[None, :], activation)
        if out_kind == 1:
            store(out.to(tl.pointer_type(tl.float32)), y, i, j, M, N, begin, out_row)
        elif out_kind == 2:
            store(out.to(tl.pointer_type(tl.bfloat16)), y, i, j, M, N, begin, out_row)
        else:
            store(out.to(tl.pointer_type(tl.float16)), y, i, j, M, N, begin, out_row)


@triton.jit
def store(out, y, i, j, M, N, begin, out_row):
    out += begin + i.to(tl.int64)[:, None] * out_row + j[None, :]
    tl.store(out, y, mask=(i < M)[:, None] & (j < N)[None, :])


@triton.jit
def tile_at(index, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Tiles in groups of GROUP_M rows, column after column in a group: those at work at a time
    share their rows and columns in the L2 cache."""
    group, in_group = index // (GROUP_M * tiles_n), index % (GROUP_M * tiles_n)
    group_rows = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    return group * GROUP_M + in_group % group_rows, in_group // group_rows


SIZES = ["M", "N", "K", "b_rows", "a_batch", "a_row", "b_batch", "b_row", "out_batch", "out_row"]
FINISH = ["out_kind", "has_col_scale", "bias_kind", "activation"]


@triton.jit(
    do_not_specialize=[*SIZES, *FINISH, "num_parts", "part_depth"],
    do_not_specialize_on_alignment=["row_scale", "col_scale", "bias"],
)
def int8_mm_kernel(
    a, b, out,  # A [batch, M, K]; B as [batch, N, K], or [batch, b_rows, N] where b_is_row_major
    M, N, K, b_rows,  # K in chunks, N in units of ALIGN
    a_batch, a_row, b_batch, b_row,  # strides in chunks
    out_batch, out_row,  # strides in units of ALIGN
    num_parts, part_depth,  # parts of K, the second in tiles
    row_scale, col_scale, bias, out_kind, has_col_scale, bias_kind, activation,
    B_IS_ROW_MAJOR: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    N, K = N * ALIGN, K * CHUNK
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    index = tl.program_id(0)
    tile_m, tile_n = tile_at(index % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP_M)
    entry = index // (tiles_m * tiles_n)  # [batch, part]
    part, batch = entry % num_parts, (entry // num_parts).to(tl.int64)
    i, j = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = part * part_depth * BLOCK_K
    end = tl.minimum(begin + part_depth * BLOCK_K, K)

    # Beyond the last row or column, the last: what comes of them isn't stored.
    k = begin + tl.arange(0, BLOCK_K)
    row = tl.minimum(i, M - 1).to(tl.int64)[:, None] * (a_row.to(tl.int64) * CHUNK)
    a += batch * (a_batch.to(tl.int64) * CHUNK) + row + k[None, :]
    b += batch * (b_batch.to(tl.int64) * CHUNK)
    b_stride = b_row.to(tl.int64) * CHUNK
    if B_IS_ROW_MAJOR:
        b += k.to(tl.int64)[:, None] * b_stride + j[None, :]
    else:
        b += tl.minimum(j, N - 1).to(tl.int64)[None, :] * b_stride + k[:, None]

    # S = A @ B  [BLOCK_M, BLOCK_N]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for k_begin in range(begin, end, BLOCK_K):
        k = k_begin + tl.arange(0, BLOCK_K)
        a_tile = tl.load(a, mask=(k < K)[None, :], other=0)
        if B_IS_ROW_MAJOR:
            b_tile = tl.load(b, mask=(k < b_rows)[:, None] & (j < N)[None, :], other=0)
            b += BLOCK_K * b_stride
        else:
            b_tile = tl.load(b, mask=(k < K)[:, None], other=0)
            b += BLOCK_K
        sums = tl.dot(a_tile, b_tile, sums, out_dtype=tl.int32)
        a += BLOCK_K

    # Y = act(S * (row_scale x col_scale) + bias); a quarter of many columns at a time, since
    # registers are few
    begin, row = entry.to(tl.int64) * out_batch * ALIGN, out_row.to(tl.int64) * ALIGN
    if BLOCK_M * BLOCK_N < 128 * 128:
        finish(
            sums, i, j, M, N, out, begin, row,
            row_scale, col_scale, bias, batch * N, out_kind, has_col_scale, bias_kind, activation,
        )  # fmt: skip
    else:
        halves = halve(sums)
        for n in tl.static_range(4):
            j = tile_n * BLOCK_N + n * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
            finish(
                halve(halves[n // 2])[n % 2], i, j, M, N, out, begin, row,
                row_scale, col_scale, bias, batch * N,
                out_kind, has_col_scale, bias_kind, activation,
            )  # fmt: skip


@triton.jit
def halve(x):
    """The first and the second half of the columns."""
    return x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit(
    do_not_specialize=["M", "N", "num_parts", "out_batch", "out_row", *FINISH],
    do_not_specialize_on_alignment=["row_scale", "col_scale", "bias"],
)
def add_parts_kernel(
    parts, out, M, N, num_parts, out_batch, out_row,  # PARTS [batch, part, M, N]
    row_scale, col_scale, bias, out_kind, has_col_scale, bias_kind, activation,
    ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    N *= ALIGN
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tile, batch = tl.program_id(0) % (tiles_m * tiles_n), tl.program_id(0) // (tiles_m * tiles_n)
    i = tile // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (i < M)[:, None] & (j < N)[None, :]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for part in range(0, num_parts):
        row = (batch.to(tl.int64) * num_parts + part) * M + i
        sums += tl.load(parts + row[:, None] * N + j[None, :], mask=mask, other=0)
    finish(
        sums, i, j, M, N,
        out, batch.to(tl.int64) * out_batch * ALIGN, out_row.to(tl.int64) * ALIGN,
        row_scale, col_scale, bias, batch.to(tl.int64) * N,
        out_kind, has_col_scale, bias_kind, activation,
    )  # fmt: skip


# ---- Host ----


def is_chunked(x: Tensor) -> bool:
    """Whether rows [batch, rows, depth] lie in whole chunks."""
    sizes = [x.size(2), *(s for n, s in zip(x.shape[:2], x.stride()[:2], strict=True) if n > 1)]
    return (
        (x.stride(2) == 1 or x.size(2) == 0)
        and all(n % CHUNK.value == 0 for n in sizes)
        and x.data_ptr() % CHUNK.value == 0
    )


def chunked(x: Tensor) -> Tensor:
    """The rows of [batch, rows, depth] in whole chunks, with zeros at their ends."""
    if is_chunked(x):
        return x
    batch, rows, depth = x.shape
    copy = x.new_zeros(batch, rows, round_up(depth))
    copy[:, :, :depth] = x
    return copy


def round_up(depth: int) -> int:
    return -(-depth // CHUNK.value) * CHUNK.value


def parts_of(K: int, num_tiles: int) -> int:
    """Parts of K, of 512 at least, where there are fewer tiles than processors."""
    return max(1, min(tuning.num_sms() // num_tiles, K // 512, 16))


class Epilogue(NamedTuple):
    """What follows the sums, which are the result themselves where there is no row_scale."""

    row_scale: Tensor | None = None  # [M]
    col_scale: Tensor | None = None  # [batch * N]
    bias: Tensor | None = None  # [batch * N]
    activation: int = 0

    def arguments(self, out: Tensor) -> tuple[Tensor | int, ...]:
        """Of the kernels. Types are the same for any: what isn't there is another's memory."""
        row_scale = out.view(torch.float32) if self.row_scale is None else self.row_scale
        return (
            row_scale,
            row_scale if self.col_scale is None else self.col_scale,
            (row_scale if self.bias is None else self.bias).view(torch.int8),
            KINDS[out.dtype],
            int(self.col_scale is not None),
            KINDS[None if self.bias is None else self.bias.dtype],
            self.activation,
        )


def multiply(
    a: Tensor, b: Tensor, out: Tensor, strides: tuple[int, int], epilogue: Epilogue
) -> None:
    """out = epilogue(a @ b) for int8 a [batch, M, K] and b [batch, K, N]; out has no gaps, and the
    strides of a batch's entry and of a row."""
    batch, M, _ = a.shape
    N = b.size(2)
    if batch * M * N == 0:
        return
    a = chunked(a)
    b_is_row_major = is_chunked(b) and not is_chunked(b.mT)
    b_rows = b if b_is_row_major else chunked(b.mT)
    K, tile = a.size(2), tuning.lookup("int8_mm", torch.int8, M=M, N=N)
    num_tiles = triton.cdiv(M, tile["BLOCK_M"]) * triton.cdiv(N, tile["BLOCK_N"])
    k_tiles = triton.cdiv(K, tile["BLOCK_K"])
    part_depth = max(triton.cdiv(k_tiles, parts_of(K, num_tiles * batch)), 1)
    num_parts = max(triton.cdiv(k_tiles, part_depth), 1)

    def launch(out: Tensor, strides: tuple[int, int], epilogue: Epilogue) -> None:
        align = CHUNK.value if all(n % CHUNK.value == 0 for n in (N, *strides)) else 1
        int8_mm_kernel[(num_tiles * batch * num_parts,)](
            a,
            b_rows,
            out.view(torch.int8),
            M,
            N // align,
            K // CHUNK.value,
            b.size(1),
            *(stride // CHUNK.value for x in (a, b_rows) for stride in x.stride()[:2]),
            *(stride // align for stride in strides),
            num_parts,
            part_depth,
            *epilogue.arguments(out),
            B_IS_ROW_MAJOR=b_is_row_major,
            ALIGN=align,
            **tile,
        )

    if num_parts == 1:
        launch(out, strides, epilogue)
    else:
        parts = torch.empty((batch, num_parts, M, N), dtype=torch.int32, device=a.device)
        launch(parts, (M * N, N), Epilogue())
        add_parts(parts, out, strides, epilogue)


def add_parts(parts: Tensor, out: Tensor, strides: tuple[int, int], epilogue: Epilogue) -> None:
    batch, num_parts, M, N = parts.shape
    align = CHUNK.value if all(n % CHUNK.value == 0 for n in (N, *strides)) else 1
    BLOCK_M, BLOCK_N = 8, 128
    add_parts_kernel[(triton.cdiv(M, BLOCK_M) * triton.cdiv(N, BLOCK_N) * batch,)](
        parts,
        out.view(torch.int8),
        M,
        N // align,
        num_parts,
        *(stride // align for stride in strides),
        *epilogue.arguments(out),
        ALIGN=align,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        num_warps=4,
    )


def int8_mm(a: Tensor, b: Tensor) -> Tensor:
    check_mm(a, b)
    out = torch.empty((*a.shape[:-1], b.size(-1)), dtype=torch.int32, device=a.device)
    batches = (a, b) if a.dim() == 3 else (a[None], b[None])
    M, N = out.shape[-2:]
    multiply(*batches, out.flatten(), (M * N, N), Epilogue())
    return out


def int8_scaled_mm(
    a: Tensor, b: Tensor, row_scale: Tensor, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    dtype = check_scaled_mm(a, b, row_scale, out_dtype)
    M, N = a.size(0), b.size(1)
    out = torch.empty((M, N), dtype=dtype, device=a.device)
    multiply(a[None], b[None], out, (M * N, N), Epilogue(row_scale.contiguous()))
    return out


def int8_linear(
    x: Tensor,
    weight_q: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    x_scale: Tensor | None = None,
    *,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The input is quantized by a pass of its own, which moves 4 bytes an element of bfloat16: in
    the product, every tile would do it again."""
    rows = as_rows("x", x)
    check_linear_weight(weight_q, weight_scale, x)
    x_scale = read_static_scale("x_scale", x_scale, x)
    out_dtype = out_dtype or x.dtype
    check_float("out_dtype", out_dtype)
    N, (M, K) = weight_q.size(0), rows.shape
    epilogue = Epilogue(
        torch.empty(M, dtype=torch.float32, device=x.device),
        read_weight_scale(weight_scale, x),
        read_bias(bias, x, N),
        read_activation(activation),
    )
    values = torch.empty((M, round_up(K)), dtype=torch.int8, device=x.device)
    quantization.quantize(rows, values, epilogue.row_scale, x_scale)
    out = torch.empty((*x.shape[:-1], N), dtype=out_dtype, device=x.device)
    weight = chunked(weight_q[None])
    multiply(values[None], weight.mT, out, (M * N, N), epilogue)
    return out
