"""int8_conv2d: images to int8, the patches that output pixels meet as rows, and their product with
the weight."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from bigkern.kernels import tuning
from bigkern.kernels.int8_call import (
    check,
    check_float,
    check_int8,
    check_same_device,
    check_terms,
    read_activation,
    read_bias,
    read_static_scale,
    read_weight_scale,
)
from bigkern.kernels.int8_mm import Epilogue, multiply, round_up
from bigkern.kernels.quantize_rows import chunk_of, magnitude, to_int8, to_scale
from torch import Tensor


class Shape(NamedTuple):
    """Of a convolution; pairs are of heights and widths."""

    batch: int
    channels: int
    outputs: int
    groups: int
    input: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    output: tuple[int, int]
    begin: tuple[int, int]  # padding at the top and at the left

    @property
    def depth(self) -> int:
        """Of a group's products."""
        return self.channels // self.groups * self.kernel[0] * self.kernel[1]

    @property
    def rows(self) -> int:
        """Output pixels."""
        return self.batch * self.output[0] * self.output[1]


@triton.jit(do_not_specialize=["size", "parts"])
def image_magnitude_kernel(
    x, largest,  # [N, size], [N]
    size, parts,  # the first in units of CHUNK
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A part of an image's max|x|; magnitudes are ordered as integers: any order gives the same."""
    size *= CHUNK
    image, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    n = part.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + image.to(tl.int64) * size + n, mask=n < size, other=0.0).to(tl.float32)
    tl.atomic_max(largest + image, tl.max(magnitude(v), 0))


@triton.jit(do_not_specialize=["size", "parts", "static_stride"])
def quantize_images_kernel(
    x, values, scale, largest, static_scale,  # [N, size], [N, size], [N], [N], [N] or [1]
    size, parts, static_stride, is_static,  # the first in units of CHUNK
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    size *= CHUNK
    image, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    n = part.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    fixed = tl.load(static_scale + image * static_stride)
    s = to_scale(tl.load(largest + image), fixed, is_static)
    v = tl.load(x + image * size + n, mask=n < size, other=0.0).to(tl.float32)
    tl.store(values + image * size + n, to_int8(v, s), mask=n < size)
    if part == 0:
        tl.store(scale + image, s)


SIZES = "rows depth K image channel line pixel height width out_height out_width stride_h stride_w"
SIZES += " begin_h begin_w dilation_h dilation_w kernel_w channels row_tiles depth_tiles"


@triton.jit(do_not_specialize=SIZES.split())
def gather_patches_kernel(
    images, patches,  # [N, ...] of these strides; [groups, rows, K], of whole chunks
    rows, depth, K,  # zeros from depth on
    image, channel, line, pixel,  # strides
    height, width, out_height, out_width,
    stride_h, stride_w, begin_h, begin_w, dilation_h, dilation_w,
    kernel_w, channels,  # of a group
    row_tiles, depth_tiles,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A patch is in the order [kernel height, kernel width, channels of the group]."""
    index = tl.program_id(0)
    group = (index // depth_tiles // row_tiles).to(tl.int64)
    i = (index // depth_tiles % row_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = index % depth_tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    c, tap = k % channels, k // channels
    out_line = i // out_width
    out_h, out_w = (out_line % out_height).to(tl.int32), (i % out_width).to(tl.int32)
    h = (out_h * stride_h - begin_h)[:, None] + tap // kernel_w * dilation_h
    w = (out_w * stride_w - begin_w)[:, None] + tap % kernel_w * dilation_w
    is_inside = (h >= 0) & (h < height) & (w >= 0) & (w < width) & (k < depth)
    x = images + (out_line // out_height * image)[:, None] + (group * channels + c) * channel
    x += h.to(tl.int64) * line + w.to(tl.int64) * pixel
    values = tl.load(x, mask=is_inside & (i < rows)[:, None], other=0)
    to = patches + (group * rows + i)[:, None] * K + k
    tl.store(to, values, mask=(i < rows)[:, None] & (k < K))


# ---- Host ----


def int8_conv2d(
    x: Tensor,
    weight_q: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    x_scale: Tensor | None = None,
    *,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int = 1,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
    channels_last: bool = False,
) -> Tensor:
    got = list(weight_scale.shape)
    check(weight_scale.dim() == 1, f"weight_scale must have shape [O], got {got}")
    s = read_shape(x, got[0], kernel_size, stride, padding, dilation, groups)
    check_weight(weight_q, x, s)
    out_dtype = out_dtype or x.dtype
    check_float("out_dtype", out_dtype)
    col_scale, bias = read_weight_scale(weight_scale, x), read_bias(bias, x, s.outputs)
    activation = read_activation(activation)
    images, scale = quantize_images(x, x_scale, channels_last)
    height, width = s.output
    out = torch.empty((s.batch, height, width, s.outputs), dtype=out_dtype, device=x.device)
    if out.numel():
        patches = gather_patches(images, s, channels_last)
        rows = weight_q.permute(0, 2, 3, 1).reshape(groups, s.outputs // groups, s.depth)
        row_scale = scale.repeat_interleave(height * width)
        epilogue = Epilogue(row_scale, col_scale, bias, activation)
        multiply(patches, rows.mT, out, (s.outputs // groups, s.outputs), epilogue)
    out = out.permute(0, 3, 1, 2)
    return out if channels_last else out.contiguous()


def read_pair(name: str, values: list[int]) -> tuple[int, int]:
    check(len(values) == 2 and min(values) > 0, f"{name} must be two positive integers")
    return values[0], values[1]


def read_shape(
    x: Tensor, outputs: int, kernel_size: list[int], stride: list[int], padding: list[int],
    dilation: list[int], groups: int,
) -> Shape:  # fmt: skip
    check_float("x", x.dtype)
    check(x.dim() == 4, f"x must have shape [N, C, H, W], got {list(x.shape)}")
    N, C, H, W = x.shape
    check(
        groups > 0 and C % groups == 0 and outputs % groups == 0,
        f"groups must divide the channels of x and of the output, {C} and {outputs}, got {groups}",
    )
    check(len(padding) == 4, f"padding must be of four sides, got {len(padding)}")
    for side in padding:
        check(side >= 0, f"padding must not be negative, got {side}")
    top, bottom, left, right = padding
    kernel = read_pair("kernel_size", kernel_size)
    strides, dilations = read_pair("stride", stride), read_pair("dilation", dilation)
    output = []
    for n, (name, size) in enumerate((("height", H + top + bottom), ("width", W + left + right))):
        reach = dilations[n] * (kernel[n] - 1) + 1
        check(
            size >= reach,
            f"kernel_size must fit the padded x: its {name} is {reach} with dilation, x's {size}",
        )
        output.append((size - reach) // strides[n] + 1)
    return Shape(
        N, C, outputs, groups, (H, W), kernel, strides, dilations, tuple(output), (top, left)
    )


def check_weight(weight_q: Tensor, x: Tensor, s: Shape) -> None:
    check_int8("weight_q", weight_q)
    check_same_device("weight_q", weight_q, "x", x)
    check_terms("C / groups * kH * kW", s.depth)
    got, wanted = list(weight_q.shape), [s.outputs, s.channels // s.groups, *s.kernel]
    check(
        weight_q.dim() != 1,
        "weight_q must be the plain weight [O, C / groups, kH, kW]: the backend triton reads no "
        f"packed one, got {got}",
    )
    check(
        got == wanted,
        f"weight_q must have shape {wanted} for this x, weight_scale and groups, got {got}",
    )


def quantize_images(
    x: Tensor, x_scale: Tensor | None, channels_last: bool
) -> tuple[Tensor, Tensor]:
    """int8 [N, ...] in x's order in memory, and scales [N]."""
    N = x.size(0)
    if x_scale is not None:
        check(
            x_scale.numel() == 1 or x_scale.shape == (N,),
            f"x_scale must have one element, or one for each of the {N} images, got shape "
            f"{list(x_scale.shape)}",
        )
        x_scale = read_static_scale("x_scale", x_scale, x.new_empty(N, 0))
    if channels_last:
        x = x.permute(0, 2, 3, 1)
        check(x.is_contiguous(), "x must be channels last in memory")
    x = x.contiguous()
    values = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(N, dtype=torch.float32, device=x.device)
    largest = torch.zeros(N, dtype=torch.int32, device=x.device)
    if N == 0:
        return values, scale
    tile = tuning.lookup("int8_conv2d", x.dtype)
    size = x[0].numel()
    parts, chunk = max(triton.cdiv(size, tile["BLOCK"]), 1), chunk_of(x.view(N, size), size)
    image_magnitude_kernel[(N * parts,)](x, largest, size // chunk, parts, CHUNK=chunk, **tile)
    quantize_images_kernel[(N * parts,)](
        x,
        values,
        scale,
        largest,
        scale if x_scale is None else x_scale,
        size // chunk,
        parts,
        int(x_scale is not None and x_scale.numel() > 1),
        x_scale is not None,
        CHUNK=chunk,
        **tile,
    )
    return values, scale


def gather_patches(images: Tensor, s: Shape, channels_last: bool) -> Tensor:
    """[groups, rows, depth], the last in whole chunks."""
    height, width = s.input
    K, size = round_up(s.depth), s.channels * height * width
    channel, pixel = (1, s.channels) if channels_last else (height * width, 1)
    patches = torch.empty((s.groups, s.rows, K), dtype=torch.int8, device=images.device)
    BLOCK_M, BLOCK_K = 16, 64
    tiles = triton.cdiv(s.rows, BLOCK_M), triton.cdiv(K, BLOCK_K)
    if patches.numel():
        gather_patches_kernel[(s.groups * tiles[0] * tiles[1],)](
            *(images, patches, s.rows, s.depth, K),
            *(size, channel, width * pixel, pixel),
            *(height, width, *s.output, *s.stride, *s.begin, *s.dilation),
            *(s.kernel[1], s.channels // s.groups, *tiles),
            BLOCK_M=BLOCK_M,
            BLOCK_K=BLOCK_K,
            num_warps=4,
        )
    return patches
