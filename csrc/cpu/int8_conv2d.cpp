// int8_conv2d on the CPU: quantizes the images to int8, padded and with the channels of a group adjacent, and
// multiplies the patches gathered from them.
#include "int8_conv2d_weight.h"
#include "int8_epilogue.h"
#include "int8_gemm.h"
#include "int8_transpose.h"
#include "int8_vec.h"
#include "quantize.h"
#include "rounding.h"
#include "units.h"
#include "workspace.h"

namespace bigkern {

// max|x|, NaN if one isn't finite.
using RowMagnitude = float (*)(const void* x, int64_t n);

}  // namespace bigkern

#define BK_KERNELS "int8_conv2d_kernels.h"
#include "each_isa.h"

namespace bigkern {

namespace {

constexpr double kQuantizeWork = 16;  // of an element, in multiplications
constexpr int64_t kChannelBlock = 16;

// int8 images [N, groups, padded height, padded width, C / groups] and their scales [N].
class QuantizedImages {
 public:
  // x's rows, of adjacent elements: [N, C] of an image's pixels, or [N, H] of W * C if channels_last. A static scale
  // has one element for each image, or a stride of 0.
  QuantizedImages(const Conv2dShape& s, const void* x, ScalarType dtype, bool channels_last, const float* static_scale,
                  int64_t static_scale_stride)
      : s_(s),
        scale_(s.batch),
        rows_per_image_(channels_last ? s.input.height : s.channels),
        quantize_row_(quantize_row_kernel(dtype)) {
    rows_.data = x;
    rows_.dtype = dtype;
    rows_.rows = s.batch * rows_per_image_;
    rows_.cols = rows_.row = channels_last ? s.input.width * s.channels : s.input_pixels();
    for (int64_t n = 0; n < s.batch && static_scale != nullptr; ++n) scale_[n] = static_scale[n * static_scale_stride];
    if (static_scale == nullptr) find_scales();

    row_scale_.resize(rows_.rows);
    for (int64_t i = 0; i < rows_.rows; ++i) row_scale_[i] = scale_[i / rows_per_image_];
    rows_.static_scale = row_scale_.data();
    rows_.static_scale_stride = 1;
    const int64_t bytes = s.batch * s.channels * s.padded_pixels();
    thread_local std::vector<int8_t> kept;  // since new memory is slow
    if (static_cast<int64_t>(kept.size()) < bytes) kept.resize(bytes);
    data_ = kept.data();
    if (s.padded_pixels() != s.input_pixels()) std::memset(data_, 0, bytes);
    is_finite_.resize(rows_.rows);
    channels_last ? quantize_lines() : quantize_planes();
    for (int64_t i = 0; i < rows_.rows; ++i) {
      if (!is_finite_[i]) scale_[i / rows_per_image_] = std::numeric_limits<float>::quiet_NaN();
    }
  }

  const std::vector<float>& scale() const { return scale_; }
  const int8_t* group(int64_t n, int64_t g) const {
    return data_ + (n * s_.groups + g) * s_.padded_pixels() * s_.group_channels();
  }

 private:
  void find_scales() {
    const int64_t element_size = rows_.dtype == ScalarType::Float ? 4 : 2;
    const RowMagnitude magnitude =
        select(scalar::row_magnitude_of, avx2::row_magnitude_of, avx512::row_magnitude_of)(rows_.dtype);
    std::vector<float> largest(rows_.rows);
    const int64_t grain = std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(1, rows_.cols));
    torch::stable::parallel_for(0, rows_.rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        largest[i] = magnitude(static_cast<const char*>(rows_.data) + i * rows_.row * element_size, rows_.cols);
      }
    });
    for (int64_t i = 0; i < rows_.rows; ++i) {
      float& scale = scale_[i / rows_per_image_];
      if (!(largest[i] <= scale)) scale = std::isnan(scale) ? scale : largest[i];
    }
    for (float& scale : scale_) scale /= 127;
  }

  int8_t* pixel(int64_t n, int64_t g, int64_t h, int64_t w) const {
    return data_ + (((n * s_.groups + g) * s_.padded.height + s_.top + h) * s_.padded.width + s_.left + w) *
                       s_.group_channels();
  }

  void quantize(int64_t row, int8_t* values) { is_finite_[row] = !std::isnan(quantize_row_(rows_, row, values)); }

  // Blocks of channels of a group: from planes to pixels.
  void quantize_planes() {
    struct Block {
      int64_t n, g, c, size;
    };
    std::vector<Block> blocks;
    for (int64_t n = 0; n < s_.batch; ++n) {
      for (int64_t g = 0; g < s_.groups; ++g) {
        for (int64_t c = 0; c < s_.group_channels(); c += kChannelBlock) {
          blocks.push_back({n, g, c, std::min(kChannelBlock, s_.group_channels() - c)});
        }
      }
    }
    run_units(blocks, kQuantizeWork * rows_.rows * rows_.cols, [&](const Block& block) {
      int8_t* const planes = Workspace::of_this_thread().take<int8_t>(block.size * s_.input_pixels());
      const int64_t first = block.n * s_.channels + block.g * s_.group_channels() + block.c;
      for (int64_t c = 0; c < block.size; ++c) quantize(first + c, planes + c * s_.input_pixels());
      // Lines one after another where nothing is between them.
      const int64_t lines = s_.padded.width == s_.input.width ? 1 : s_.input.height;
      const int64_t width = lines == 0 ? 0 : s_.input_pixels() / lines;
      for (int64_t h = 0; h < lines; ++h) {
        transpose_bytes(planes + h * width, s_.input_pixels(), block.size, width,
                        pixel(block.n, block.g, h, 0) + block.c, s_.group_channels());
      }
    });
  }

  // Lines of an image, which have all channels.
  void quantize_lines() {
    std::vector<int64_t> lines(rows_.rows);
    for (int64_t i = 0; i < rows_.rows; ++i) lines[i] = i;
    run_units(lines, kQuantizeWork * rows_.rows * rows_.cols, [&](int64_t line) {
      const int64_t n = line / s_.input.height, h = line % s_.input.height;
      if (s_.groups == 1) return quantize(line, pixel(n, 0, h, 0));
      int8_t* const values = Workspace::of_this_thread().take<int8_t>(rows_.cols);
      quantize(line, values);
      for (int64_t g = 0; g < s_.groups; ++g) {
        for (int64_t w = 0; w < s_.input.width; ++w) {
          std::memcpy(pixel(n, g, h, w), values + w * s_.channels + g * s_.group_channels(), s_.group_channels());
        }
      }
    });
  }

  const Conv2dShape& s_;
  FloatRows rows_;
  std::vector<float> scale_, row_scale_;
  std::vector<char> is_finite_;  // of rows
  const int64_t rows_per_image_;
  const QuantizeRow quantize_row_;
  int8_t* data_;
};

// Few bytes faster than by a call of memcpy.
void copy(const int8_t* from, int64_t n, int8_t* to) {
  if (n > 8) {
    std::memcpy(to, from, n);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = from[i];
  }
}

// The patch that output pixel i meets, [kH, kW, C / groups].
Int8Row gather(const Conv2dShape& s, const int8_t* image, int64_t i, int8_t* patch) {
  const int64_t pixel = s.group_channels(), line = s.padded.width * pixel;
  const int8_t* from =
      image + i / s.output.width * s.stride.height * line + i % s.output.width * s.stride.width * pixel;
  const bool is_adjacent = s.dilation.width == 1;
  const int64_t run = is_adjacent ? s.kernel.width * pixel : pixel;
  if (s.kernel.height == 1 && run == s.depth()) return {from, 1};
  int8_t* to = patch;
  for (int64_t y = 0; y < s.kernel.height; ++y, from += s.dilation.height * line) {
    for (int64_t x = 0; x < (is_adjacent ? 1 : s.kernel.width); ++x, to += run) {
      copy(from + x * s.dilation.width * pixel, run, to);
    }
  }
  return {patch, 1};
}

// Where the sums of a group's products go: outputs [N, O, H, W] in memory, or [N, H, W, O] if channels_last.
struct Conv2dOutput {
  const Conv2dShape& s;
  const float *image_scale, *weight_scale, *bias;  // [N], [O], [O] or nullptr
  Activation activation;
  char* out;
  int64_t element_size;
  bool channels_last;
  FinishUnit finish;

  void store(int64_t group, const Int8Unit& unit, const int32_t* tile) const {
    const int64_t first = group * s.group_outputs() + unit.j_begin;
    for (int64_t i = 0; i < unit.num_rows; i += kPixels, tile += kPixels * kTileCols) {
      const int64_t n = std::min(kPixels, unit.num_rows - i), pixel = unit.i_begin + i;
      float scale[kPixels];
      std::fill_n(scale, kPixels, image_scale[unit.b]);
      alignas(64) char block[kPixels * kTileCols * sizeof(float)];  // [kPixels, kTileCols]
      LinearProblem problem{scale, weight_scale + first, bias ? bias + first : nullptr, activation, block, kTileCols};
      if (channels_last) {
        problem.out = out + ((unit.b * s.output_pixels() + pixel) * s.outputs + first) * element_size;
        problem.cols = s.outputs;
      }
      finish(problem, {0, 0, n, 0, unit.num_cols}, tile);
      if (channels_last) continue;
      char* const to = out + ((unit.b * s.outputs + first) * s.output_pixels() + pixel) * element_size;
      element_size == 4 ? transpose<uint32_t>(block, n, unit.num_cols, to)
                        : transpose<uint16_t>(block, n, unit.num_cols, to);
    }
  }

 private:
  static constexpr int64_t kPixels = 16;

  template <class Bits>
  void transpose(const char* block, int64_t pixels, int64_t cols, char* to) const {
    const Bits* const from = reinterpret_cast<const Bits*>(block);
    for (int64_t j = 0; j < cols; ++j) {
      Bits* const plane = reinterpret_cast<Bits*>(to) + j * s.output_pixels();
      for (int64_t i = 0; i < pixels; ++i) plane[i] = from[i * kTileCols + j];
    }
  }
};

Tensor int8_conv2d_op(Tensor x, Tensor weight_q, Tensor weight_scale, OptionalTensor bias, OptionalTensor x_scale,
                      std::vector<int64_t> kernel_size, std::vector<int64_t> stride, std::vector<int64_t> padding,
                      std::vector<int64_t> dilation, int64_t groups, std::optional<std::string> activation,
                      std::optional<ScalarType> out_dtype, bool channels_last) {
  TensorList keep;
  BK_CHECK(weight_scale.dim() == 1, "weight_scale must have shape [O], got ", shape(weight_scale));
  const int64_t O = weight_scale.size(0);
  Conv2dShape s = read_conv2d_shape(x, O, kernel_size, stride, padding, dilation, groups);
  const Conv2dWeight weight(weight_q, x, s);
  FloatRows scales;
  if (x_scale) read_image_scale(*x_scale, x, scales, keep);
  check_scale_values("x_scale", x_scale, scales);
  const ScalarType dtype = out_dtype.value_or(x.scalar_type());
  check_float("out_dtype", dtype);
  const Activation act = read_activation(activation);
  const float* const w_scale = read_weight_scale(weight_scale, x, keep);
  const float* const b = read_bias(bias, x, O, keep);
  const FinishUnit finish = finish_unit_kernel(dtype, act);

  // Channels last is the order of [N, H, W, O], seen as [N, O, H, W].
  const int64_t N = s.batch, H = s.output.height, W = s.output.width;
  Tensor out = torch::stable::new_empty(
      x, channels_last ? std::vector<int64_t>{N, H, W, O} : std::vector<int64_t>{N, O, H, W}, dtype);
  const QuantizedImages images(s, read_images(x, channels_last, keep), x.scalar_type(), channels_last,
                               scales.static_scale, scales.static_scale_stride);
  const Conv2dOutput output{s,
                            images.scale().data(),
                            w_scale,
                            b,
                            act,
                            static_cast<char*>(out.data_ptr()),
                            dtype == ScalarType::Float ? 4 : 2,
                            channels_last,
                            finish};
  for (int64_t g = 0; g < s.groups; ++g) {
    Int8Gemm gemm;
    gemm.batch = N;
    gemm.rows = s.output_pixels();
    gemm.depth = s.depth();
    gemm.cols = s.group_outputs();
    gemm.panels = weight.panels(g);
    gemm.plain = [&](int64_t) { return weight.plain(g); };
    gemm.row_of = [&](int64_t n, int64_t i, int8_t* patch) { return gather(s, images.group(n, g), i, patch); };
    gemm.finish = [&](const Int8Unit& unit, const int32_t* tile) { output.store(g, unit, tile); };
    int8_gemm(gemm);
  }
  if (!channels_last) return out;
  return torch::stable::transpose(torch::stable::transpose(out, 2, 3), 1, 2);
}

}  // namespace

}  // namespace bigkern

STABLE_TORCH_LIBRARY_IMPL(bigkern, CPU, m) { m.impl("int8_conv2d", TORCH_BOX(&bigkern::int8_conv2d_op)); }
