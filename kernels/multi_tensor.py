"""Many tensors in one launch: a table on the device says where they lie, and each program takes a
chunk of one."""

import functools
from collections.abc import Callable
from itertools import accumulate, chain
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Of a launch that writes a table. As many parameters of 8 bytes fit a launch four times; each is a
# store in the code.
_VALUES = 128


@triton.jit
def _write(table, values):
    for i in tl.static_range(len(values)):
        tl.store(table + i, (values[i] ^ (1 << 62)) >> 1)


def _new_table(values: tuple[int, ...], device: torch.device) -> Tensor:
    """[len(values)] int64, each less than 2^60. Written by kernels, whose parameters a CUDA graph
    captures; a copy from the host would have to keep its source as long as the graph."""
    # Odd and beyond 2^32, so that all are int64 to Triton, with nothing known of them: one kernel.
    encoded = [value << 1 | 1 | 1 << 62 for value in values]
    encoded += [1 | 1 << 62] * (-len(values) % _VALUES)
    table = torch.empty(len(encoded), dtype=torch.int64, device=device)
    for i in range(0, len(encoded), _VALUES):
        _write[(1,)](table[i:], tuple(encoded[i : i + _VALUES]))
    return table[: len(values)]


@triton.jit
def _number(counts, chunks):
    """chunks[chunk] = tensor, for the chunks of a program's tensor."""
    BLOCK: tl.constexpr = 1024
    tensor = tl.program_id(0)
    first = tl.load(counts + 2 * tensor)
    count = tl.load(counts + 2 * tensor + 1)
    for begin in range(0, count, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        tl.store(chunks + first + i, tl.zeros([BLOCK], tl.int64) + tensor, i < count)


def _new_chunks(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """The tensor that each chunk is of, [sum(counts)] int64."""
    firsts = accumulate(counts, initial=0)
    firsts_and_counts = chain.from_iterable(zip(firsts, counts, strict=False))
    chunks = torch.empty(sum(counts), dtype=torch.int64, device=device)
    _number[(len(counts),)](_new_table(tuple(firsts_and_counts), device), chunks)
    return chunks


def _kept(make: Callable) -> Callable:
    """Results are kept for the next step: by content, so that they can't go stale, and by stream,
    on which they were written. Not while a graph is captured, whose kernels haven't run."""
    kept: dict[Any, Tensor] = {}

    @functools.wraps(make)
    def call(values: tuple[int, ...], device: torch.device) -> Tensor:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return make(values, device)
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        key = (values, device, stream)
        if key not in kept:
            if len(kept) >= 64:
                kept.clear()
            kept[key] = make(values, device)
        return kept[key]

    return call


table, chunks = _kept(_new_table), _kept(_new_chunks)


@triton.jit
def pointer(address, dtype: tl.constexpr):
    return address.to(tl.pointer_type(dtype), bitcast=True)


# A float32 or float64 in memory is handed over as its address, plus one if it is a float64.
def scalar(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr() + (tensor.dtype == torch.float64)


@triton.jit
def load_scalar(encoded, mask=True):
    """As float64; 0 where there is none."""
    encoded = encoded.to(tl.int64)  # the interpreter has made int32 of a small one
    is_double = (encoded & 1) != 0
    mask = mask & (encoded != 0)
    wide = tl.load(pointer(encoded & -2, tl.float64), mask & is_double, other=0.0)
    narrow = tl.load(pointer(encoded & -2, tl.float32), mask & ~is_double, other=0.0)
    return tl.where(is_double, wide, narrow.to(tl.float64))


@triton.jit
def store_scalar(encoded, value, mask=True):
    encoded = encoded.to(tl.int64)
    is_double = (encoded & 1) != 0
    mask = mask & (encoded != 0)
    tl.store(pointer(encoded & -2, tl.float64), value, mask & is_double)
    tl.store(pointer(encoded & -2, tl.float32), value.to(tl.float32), mask & ~is_double)
