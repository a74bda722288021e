// Packed weights in the host's memory: their header is read.
#pragma once

#include <cstring>

#include "../int8_mm_call.h"

namespace bigkern {

inline PackedHeader read_packed_header(const Tensor& packed) {
  PackedHeader header{};
  const int64_t bytes = packed.size(0);
  if (bytes >= static_cast<int64_t>(sizeof(header))) std::memcpy(&header, packed.data_ptr(), sizeof(header));
  const bool holds = header.magic == PackedHeader::kMagic && packed.stride(0) == 1 &&
                     bytes == static_cast<int64_t>(sizeof(header)) + PackedShape{header.depth, header.cols}.bytes();
  BK_CHECK(holds, "weight_q of one dimension must come from pack_weight, got ", bytes, " other bytes");
  return header;
}

// Where the panels of a packed weight [N, K] begin.
inline const char* read_panels(const Tensor& weight_q, const Tensor& x, int64_t N, int64_t K) {
  const PackedHeader header = read_packed_header(weight_q);
  BK_CHECK(header.depth == K, "x must have the K of the packed weight_q [", header.cols, ", ", header.depth,
           "] as its last size, got ", shape(x));
  BK_CHECK(header.cols == N, "weight_scale must have shape [", header.cols, "], got [", N, "]");
  return static_cast<const char*>(weight_q.data_ptr()) + sizeof(header);
}

}  // namespace bigkern
