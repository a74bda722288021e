// The product of int8 matrices on a GPU, as its callers see it.
#pragma once

#include "../tensors.h"
#include "int8_epilogue.cuh"

namespace bigkern {

// Bytes of K that one copy moves: rows begin at multiples of it, and are as long.
constexpr int64_t kChunkBytes = 16;

// A matrix of each batch entry, with strides in bytes.
struct Int8Operand {
  const int8_t* data = nullptr;
  int64_t row = 0, batch = 0;
};

// The rows of a convolution's left operand: the patches of images [images, height, width, channels], padded, that
// output pixels meet. Strides in bytes; a patch is in the order [kernel height, kernel width, channels of the group].
struct Im2col {
  int64_t output_height, output_width;
  int64_t image, line, pixel;             // strides of the images
  int64_t stride_line, stride_pixel;      // from an output pixel to the next
  int64_t dilation_line, dilation_pixel;  // from a tap to the next
  int32_t kernel_width, chunks_of_tap;
};

// The first byte of the patch that output pixel i meets.
__device__ inline int64_t patch_offset(const Im2col& im2col, int64_t i) {
  const int64_t line = i / im2col.output_width, image = line / im2col.output_height;
  return image * im2col.image + line % im2col.output_height * im2col.stride_line +
         i % im2col.output_width * im2col.stride_pixel;
}

// out = epilogue(A @ B) with A [batch, M, K], and B as [batch, N, K], or as [batch, K, N] if b_is_row_major.
struct Int8Gemm {
  Int8Operand a, b;
  int64_t batch = 1, rows = 0, cols = 0;  // batch, M, N
  int64_t depth = 0;                      // K, a multiple of kChunkBytes
  int64_t b_depth = 0;                    // rows of a row-major b: what A has beyond is 0
  bool b_is_row_major = false;
  bool is_im2col = false;  // then a.data are the images, a.batch is from group to group
  Im2col im2col{};
  Int8Epilogue epilogue;
};

void int8_gemm(const Int8Gemm& problem, Device device);

}  // namespace bigkern
