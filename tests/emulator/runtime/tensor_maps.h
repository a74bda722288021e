// What cuTensorMapEncodeTiled writes into its 128 bytes, here: a tensor in global memory of which boxes are copied.
#pragma once

#include <cstdint>

#pragma GCC visibility push(hidden)
namespace emulator {

struct TensorMap {
  static constexpr uint32_t kMark = 0x7e4507a9;
  static constexpr int kMaxRank = 5;
  uint64_t base;
  uint64_t sizes[kMaxRank];    // of the innermost dimension first; 1 beyond the rank
  uint64_t strides[kMaxRank];  // in bytes
  uint16_t box[kMaxRank];
  uint8_t rank, element_bytes, swizzle_bytes /* 0, 32, 64, 128 */, fills_nan;
  uint32_t mark;

  uint32_t box_bytes() const {
    uint32_t bytes = element_bytes;
    for (const uint32_t size : box) bytes *= size;
    return bytes;
  }
};
static_assert(sizeof(TensorMap) <= 128);

// Where the byte at this offset of shared memory goes: bits 4 to 6 are those of the row in 1024, 512 or 256 bytes.
inline uint32_t swizzled(uint32_t offset, uint32_t swizzle_bytes) {
  const uint32_t mask = swizzle_bytes ? swizzle_bytes / 16 - 1 : 0;
  return offset ^ ((offset >> 7 & mask) << 4);
}

}  // namespace emulator
#pragma GCC visibility pop
