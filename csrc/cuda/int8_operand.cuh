// Operands of an int8 product on a GPU: read as they lie where whole chunks of 16 bytes can be, else copied.
#pragma once

#include "int8_gemm_call.cuh"

namespace bigkern {

constexpr int64_t whole_chunks(int64_t bytes) { return (bytes + kChunkBytes - 1) / kChunkBytes * kChunkBytes; }

// A matrix [rows, depth] of each entry of a batch, with strides.
struct Int8Batch {
  const int8_t* data;
  int64_t entries, rows, depth;
  int64_t entry, row, col;
};

// Rows of whole_chunks(depth) bytes, zeros beyond `depth`. `keep` holds a copy, where one is made.
Int8Operand chunked_rows(const Int8Batch& x, const Tensor& like, TensorList& keep);

// B [K, N] of a product, from its transpose: left row-major where it can be read so.
void set_b(const Int8Batch& b_transposed, const Tensor& like, Int8Gemm& gemm, TensorList& keep);

// Copies to rows of whole chunks, one after another.
void copy_rows(const Int8Batch& x, int8_t* to, Device device);

// A packed weight on a GPU: the rows of [N, K], of whole chunks each. Its size, an odd multiple of 32, tells it from
// that of a CPU, a multiple of 64.
constexpr int64_t packed_bytes(int64_t N, int64_t K) { return (N * whole_chunks(K) + 63) / 64 * 64 + 32; }

inline bool is_packed(const Tensor& packed, int64_t bytes) {
  return packed.size(0) == bytes && packed.stride(0) == 1 &&
         reinterpret_cast<uintptr_t>(packed.data_ptr()) % kChunkBytes == 0;
}

}  // namespace bigkern
