// int8_conv2d on the CPU: quantises the images, channels last within a group and padded, and multiplies the patches that
// it gathers from them.
#include "../int8_conv2d_call.h"
#include "int8_epilogue.h"
#include "int8_gemm.h"
#include "quantize.h"
#include "units.h"
#include "workspace.h"

namespace bigkern {

using LargestMagnitude = float (*)(const void* x, int64_t n);

}  // namespace bigkern

#define BK_KERNELS "int8_conv2d_kernels.h"
#include "each_isa.h"

namespace bigkern {

namespace {

constexpr double kQuantiseWork = 8;  // for an element, in multiplications

int64_t element_size(ScalarType dtype) { return dtype == ScalarType::Float ? 4 : 2; }

// The images [N, groups, padded height, padded width, C / groups] in int8, and their scales [N].
class QuantisedImages {
 public:
  QuantisedImages(const Conv2dShape& s, const void* x, ScalarType dtype, bool channels_last, const float* static_scale,
                  int64_t static_scale_stride)
      : s_(s), scale_(s.batch) {
    const int64_t image = s.channels * s.input_pixels();
    // Where rows of x are adjacent: a plane of a channel, or a line of all channels.
    const int64_t rows_per_image = channels_last ? s.input.height : s.channels;
    rows_.data = x;
    rows_.dtype = dtype;
    rows_.rows = s.batch * rows_per_image;
    rows_.cols = rows_.row = rows_per_image == 0 ? 0 : image / rows_per_image;
    find_scales(rows_per_image, static_scale, static_scale_stride);

    const int64_t bytes = s.batch * s.channels * s.padded_pixels();
    data_ = Workspace::of_this_call().take<int8_t>(bytes);
    if (s.padded_pixels() != s.input_pixels()) std::memset(data_, 0, bytes);
  }

 private:
  const Conv2dShape& s_;
  FloatRows rows_;
  std::vector<float> scale_;
  int8_t* data_;
};

}  // namespace

}  // namespace bigkern
