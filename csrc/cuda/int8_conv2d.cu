// int8_conv2d on a GPU: the images to int8, padded and with their channels adjacent, then a product whose left rows
// are the patches in them that output pixels meet.
#include "../int8_conv2d_call.h"
#include "int8_operand.cuh"
#include "launch.cuh"
#include "quantize.cuh"

namespace bigkern {

namespace {

constexpr int kThreads = 256, kMagnitudeRuns = 8;

// Images [N, C, H, W] and what becomes of them, [N, padded H, padded W, C].
struct Images {
  Conv2dShape s;
  const void* x;
  int64_t elements;                   // of an image of x
  int64_t padded_pixels, pixel_runs;  // of a padded image; each pixel's runs of 16 channels
  int64_t channel, line, pixel;       // strides of an image of x, in elements
  bool is_channels_last, is_aligned;
  const float* static_scale;  // nullptr: max|x| / 127
  int64_t static_scale_stride;
  uint32_t* largest;  // [N], 0 at first
  float* scale;       // [N]
  int8_t* values;
};

// The part blockIdx.x, [image, part], of an image's max|x|. Magnitudes are ordered as integers: any order of the
// atomics gives the same.
template <class T>
__global__ void __launch_bounds__(kThreads)
    image_magnitude_kernel(const __grid_constant__ Images p, uint32_t parts_of_image) {
  const int64_t image = blockIdx.x / parts_of_image, elements = p.elements;
  const T* const x = static_cast<const T*>(p.x) + image * elements;
  const int64_t begin = int64_t{blockIdx.x % parts_of_image} * (kThreads * kRun<T> * kMagnitudeRuns);
  uint32_t largest = 0;
#pragma unroll 2
  for (int n = 0; n < kMagnitudeRuns; ++n) {
    float v[kRun<T>];
    load_run(v, x, begin + (n * kThreads + threadIdx.x) * kRun<T>, elements, p.is_aligned);
#pragma unroll
    for (int e = 0; e < kRun<T>; ++e) largest = max(largest, magnitude(v[e]));
  }
  largest = __reduce_max_sync(~0u, largest);
  if (threadIdx.x % 32 == 0) atomicMax(p.largest + image, largest);
}

__global__ void __launch_bounds__(kThreads) image_scale_kernel(const __grid_constant__ Images p) {
  const int64_t image = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (image >= p.s.batch) return;
  const float* const fixed = p.static_scale;
  p.scale[image] = to_scale(p.largest[image], fixed ? fixed + image * p.static_scale_stride : nullptr);
}

// A pixel's run of 16 channels a thread; neighbouring threads have neighbours in the memory of x.
template <class T>
__global__ void __launch_bounds__(kThreads)
    quantize_images_kernel(const __grid_constant__ Images p, uint32_t blocks_of_image) {
  const int64_t image = blockIdx.x / blocks_of_image;
  const int64_t index = int64_t{blockIdx.x % blocks_of_image} * kThreads + threadIdx.x;
  if (index >= p.padded_pixels * p.pixel_runs) return;
  const int64_t run = p.is_channels_last ? index % p.pixel_runs : index / p.padded_pixels;
  const int64_t pixel = p.is_channels_last ? index / p.pixel_runs : index % p.padded_pixels;
  const int64_t h = pixel / p.s.padded.width - p.s.top, w = pixel % p.s.padded.width - p.s.left;
  const bool is_inside = h >= 0 && h < p.s.input.height && w >= 0 && w < p.s.input.width;
  const int64_t c = run * kChunkBytes;
  const T* const x = static_cast<const T*>(p.x) + image * p.elements + c * p.channel + h * p.line + w * p.pixel;
  int8_t* const to = p.values + (image * p.padded_pixels + pixel) * p.s.channels + c;
  const float scale = p.scale[image];
  alignas(16) int8_t q[kChunkBytes];
#pragma unroll
  for (int n = 0; n < kChunkBytes; ++n) {
    q[n] = is_inside && c + n < p.s.channels ? to_int8(static_cast<float>(x[n * p.channel]), scale) : int8_t{0};
  }
  if (p.s.channels % kChunkBytes == 0) {
    *reinterpret_cast<int4*>(to) = *reinterpret_cast<const int4*>(q);
    return;
  }
#pragma unroll
  for (int n = 0; n < kChunkBytes; ++n) {
    if (c + n < p.s.channels) to[n] = q[n];
  }
}

// Patches [groups, images * output pixels, depth in whole chunks], where the channels of a group aren't whole chunks
// and so can't be copied into a product's tiles from where they lie. A chunk a thread.
struct Gather {
  Im2col im2col;
  int64_t groups, rows, chunks;  // of the patches
  int64_t depth, channels;       // of a group
};

__global__ void __launch_bounds__(kThreads)
    gather_patches_kernel(const __grid_constant__ Gather p, const int8_t* images, int8_t* patches) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= p.groups * p.rows * p.chunks) return;
  const int64_t i = index / p.chunks % p.rows, group = index / p.chunks / p.rows;
  const int8_t* const patch = images + patch_offset(p.im2col, i) + group * p.channels;
  alignas(16) int8_t bytes[kChunkBytes];
#pragma unroll
  for (int n = 0; n < kChunkBytes; ++n) {
    const int k = static_cast<int>(index % p.chunks * kChunkBytes) + n;
    const int channels = static_cast<int>(p.channels), tap = k / channels;
    const int64_t line = tap / p.im2col.kernel_width * p.im2col.dilation_line;
    const int64_t pixel = tap % p.im2col.kernel_width * p.im2col.dilation_pixel;
    bytes[n] = k < p.depth ? patch[line + pixel + k % channels] : int8_t{0};
  }
  *reinterpret_cast<int4*>(patches + index * kChunkBytes) = *reinterpret_cast<const int4*>(bytes);
}

// ---- Host ----

template <class T>
void launch_images(const Images& p, Device device) {
  const int64_t parts = ceil_div<int64_t>(p.elements, kThreads * kRun<T> * kMagnitudeRuns);
  const int64_t blocks = ceil_div<int64_t>(p.padded_pixels * p.pixel_runs, kThreads), batch = p.s.batch;
  const auto run = [&](auto kernel, int64_t blocks_of_image) {
    if (blocks_of_image == 0) return;
    launch(device.index, kernel, grid_of(batch * blocks_of_image), kThreads, 0, p,
           static_cast<uint32_t>(blocks_of_image));
  };
  run(image_magnitude_kernel<T>, parts);
  launch(device.index, image_scale_kernel, grid_of(ceil_div<int64_t>(batch, kThreads)), kThreads, 0, p);
  run(quantize_images_kernel<T>, blocks);
}

// Fills values and scale.
void quantize_images(const Conv2dShape& s, const void* x, ScalarType dtype, bool channels_last, const FloatRows& scales,
                     const Tensor& values, const Tensor& scale, const Tensor& largest, Device device) {
  Images p{s, x, s.channels * s.input_pixels(), s.padded_pixels(), ceil_div(s.channels, kChunkBytes)};
  p.is_channels_last = channels_last;
  p.channel = channels_last ? 1 : s.input_pixels();
  p.pixel = channels_last ? s.channels : 1;
  p.line = p.pixel * s.input.width;
  p.is_aligned = reinterpret_cast<uintptr_t>(x) % 16 == 0 && p.elements % 8 == 0;
  p.static_scale = scales.static_scale;
  p.static_scale_stride = scales.static_scale_stride;
  p.largest = static_cast<uint32_t*>(largest.data_ptr());
  p.scale = static_cast<float*>(scale.data_ptr());
  p.values = static_cast<int8_t*>(values.data_ptr());
  switch (dtype) {
    case ScalarType::Half: return launch_images<Half>(p, device);
    case ScalarType::BFloat16: return launch_images<BFloat16>(p, device);
    default: return launch_images<float>(p, device);
  }
}

Im2col im2col_of(const Conv2dShape& s) {
  const int64_t pixel = s.channels, line = s.padded.width * pixel;
  return {s.output.height,
          s.output.width,
          s.padded.height * line,
          line,
          pixel,
          s.stride.height * line,
          s.stride.width * pixel,
          s.dilation.height * line,
          s.dilation.width * pixel,
          static_cast<int32_t>(s.kernel.width),
          static_cast<int32_t>(s.group_channels() / kChunkBytes)};
}

// How many small groups pack_conv2d_weight packs as one.
int64_t merged_groups(const Conv2dShape& s) {
  for (int64_t n = std::max<int64_t>(1, 16 / std::max<int64_t>(s.group_outputs(), 1));; --n) {
    if (s.groups % n == 0) return n;
  }
}

// B of each group; s becomes that of the groups as they are packed.
Int8Operand read_weight(const Tensor& weight_q, const Tensor& x, Conv2dShape& s, TensorList& keep) {
  if (check_conv2d_weight(weight_q, x, s)) {
    const Tensor rows = torch::stable::transpose(torch::stable::transpose(weight_q, 1, 2), 2, 3);
    keep.push_back(torch::stable::contiguous(rows));  // [O, kH, kW, C / groups]
    const int64_t N = s.group_outputs(), K = s.depth();
    return chunked_rows({static_cast<const int8_t*>(keep.back().data_ptr()), s.groups, N, K, N * K, K, 1}, x, keep);
  }
  Conv2dShape dense = s;
  dense.groups = s.groups / merged_groups(s);
  const int64_t bytes = packed_bytes(dense.group_outputs(), dense.depth());
  check_packed_conv2d(is_packed(weight_q, dense.groups * bytes), s);
  s = dense;
  return {static_cast<const int8_t*>(weight_q.data_ptr()), whole_chunks(s.depth()), bytes};
}

// A: the images themselves, or the patches gathered from them.
void set_a(const Tensor& images, const Conv2dShape& s, Int8Gemm& gemm, TensorList& keep, Device device) {
  const auto* const data = static_cast<const int8_t*>(images.data_ptr());
  const Im2col im2col = im2col_of(s);
  if (s.group_channels() % kChunkBytes == 0 && gemm.depth > 0) {
    gemm.is_im2col = true;
    gemm.im2col = im2col;
    gemm.a = {data, 0, s.group_channels()};
    return;
  }
  const int64_t chunks = s.groups * gemm.rows * gemm.depth / kChunkBytes;
  keep.push_back(torch::stable::new_empty(images, {s.groups, gemm.rows, gemm.depth}));
  auto* const patches = static_cast<int8_t*>(keep.back().data_ptr());
  if (chunks > 0) {
    launch(device.index, gather_patches_kernel, grid_of(ceil_div<int64_t>(chunks, kThreads)), kThreads, 0,
           Gather{im2col, s.groups, gemm.rows, gemm.depth / kChunkBytes, s.depth(), s.group_channels()}, data, patches);
  }
  gemm.a = {patches, gemm.depth, gemm.rows * gemm.depth};
}

void set_output(const Tensor& out, const Conv2dShape& s, bool channels_last, Int8Epilogue& p) {
  const int64_t pixels = s.output_pixels(), O = s.outputs;
  p.out = out.data_ptr();
  p.dtype = out.scalar_type();
  p.image_rows = std::max<int64_t>(pixels, 1);
  p.image = pixels * O;
  p.row = channels_last ? O : 1;
  p.col = channels_last ? 1 : pixels;
  p.batch = s.group_outputs() * p.col;
  p.scale_is_of_image = true;
}

Tensor int8_conv2d_cuda(Tensor x, Tensor weight_q, Tensor weight_scale, OptionalTensor bias, OptionalTensor x_scale,
                        std::vector<int64_t> kernel_size, std::vector<int64_t> stride, std::vector<int64_t> padding,
                        std::vector<int64_t> dilation, int64_t groups, std::optional<std::string> activation,
                        std::optional<ScalarType> out_dtype, bool channels_last) {
  TensorList keep;
  BK_CHECK(weight_scale.dim() == 1, "weight_scale must have shape [O], got ", shape(weight_scale));
  const int64_t O = weight_scale.size(0);
  Conv2dShape s = read_conv2d_shape(x, O, kernel_size, stride, padding, dilation, groups);
  Int8Gemm gemm;
  gemm.b = read_weight(weight_q, x, s, keep);
  FloatRows scales;
  if (x_scale) read_image_scale(*x_scale, x, scales, keep);
  const ScalarType dtype = out_dtype.value_or(x.scalar_type());
  check_float("out_dtype", dtype);
  gemm.epilogue.activation = read_activation(activation);
  gemm.epilogue.col_scale = read_weight_scale(weight_scale, x, keep);
  check_bias(bias, x, O);
  if (bias) {
    keep.push_back(torch::stable::contiguous(*bias));
    gemm.epilogue.bias = keep.back().data_ptr();
    gemm.epilogue.bias_dtype = bias->scalar_type();
  }

  // Channels last is the order of [N, H, W, O], seen as [N, O, H, W].
  const int64_t N = s.batch, H = s.output.height, W = s.output.width;
  const Device device = device_of(x);
  const Tensor out = torch::stable::new_empty(
      x, channels_last ? std::vector<int64_t>{N, H, W, O} : std::vector<int64_t>{N, O, H, W}, dtype);
  if (N > 0) {
    const Tensor images =
        torch::stable::new_empty(x, {N, s.padded.height, s.padded.width, s.channels}, ScalarType::Char);
    const Tensor scale = torch::stable::new_empty(x, {N}, ScalarType::Float);
    const Tensor largest = torch::stable::new_zeros(x, {N}, ScalarType::Int);
    quantize_images(s, read_images(x, channels_last, keep), x.scalar_type(), channels_last, scales, images, scale,
                    largest, device);
    gemm.batch = s.groups;
    gemm.rows = N * s.output_pixels();
    gemm.cols = s.group_outputs();
    gemm.depth = whole_chunks(s.depth());
    set_a(images, s, gemm, keep, device);
    set_output(out, s, channels_last, gemm.epilogue);
    gemm.epilogue.row_scale = static_cast<const float*>(scale.data_ptr());
    int8_gemm(gemm, device);
  }
  if (!channels_last) return out;
  return torch::stable::transpose(torch::stable::transpose(out, 2, 3), 1, 2);
}

}  // namespace

}  // namespace bigkern

STABLE_TORCH_LIBRARY_IMPL(bigkern, CUDA, m) { m.impl("int8_conv2d", TORCH_BOX(&bigkern::int8_conv2d_cuda)); }
