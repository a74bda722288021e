// int8_mm, pack_weight and unpack_weight on the CPU.
#include "../int8_mm_call.h"
#include "int8_gemm.h"
#include "int8_packed.h"

namespace bigkern {

namespace {

Tensor int8_mm_op(Tensor a, Tensor b) {
  check_mm(a, b);
  const int64_t dim = a.dim();
  const bool is_batch = dim == 3;
  Int8Gemm gemm;
  gemm.batch = is_batch ? a.size(0) : 1;
  gemm.rows = a.size(dim - 2);
  gemm.depth = a.size(dim - 1);
  gemm.cols = b.size(dim - 1);
  const int64_t M = gemm.rows, N = gemm.cols;
  Tensor out = torch::stable::new_empty(a, with_last(a, N), ScalarType::Int);
  const auto matrix_of = [dim, is_batch](const Tensor& t) {
    const Int8Matrix matrix{static_cast<const int8_t*>(t.data_ptr()), t.stride(dim - 2), t.stride(dim - 1)};
    return [matrix, step = is_batch ? t.stride(0) : 0](int64_t entry) {
      return Int8Matrix{matrix.data + entry * step, matrix.row, matrix.col};
    };
  };
  gemm.out = out.data_ptr();
  gemm.out_bytes = sizeof(int32_t);
  gemm.plain = matrix_of(b);
  gemm.row_of = [a_of = matrix_of(a)](int64_t entry, int64_t i, int8_t*) {
    const Int8Matrix matrix = a_of(entry);
    return Int8Row{matrix.at(i, 0), matrix.col};
  };
  gemm.finish = [M, N, to = static_cast<int32_t*>(out.data_ptr())](const Int8Unit& unit, const int32_t* tile) {
    for (int64_t i = 0; i < unit.num_rows; ++i) {
      std::memcpy(to + (unit.b * M + unit.i_begin + i) * N + unit.j_begin, tile + i * kTileCols,
                  unit.num_cols * sizeof(int32_t));
    }
  };
  int8_gemm(gemm);
  return out;
}

Tensor pack_weight_op(Tensor weight_q) {
  check_pack(weight_q);
  const PackedShape packed{weight_q.size(1), weight_q.size(0)};
  const PackedHeader header{PackedHeader::kMagic, packed.depth, packed.cols, {}};
  Tensor out = torch::stable::new_empty(weight_q, {static_cast<int64_t>(sizeof(header)) + packed.bytes()});
  char* const to = static_cast<char*>(out.data_ptr());
  std::memcpy(to, &header, sizeof(header));
  const Int8Matrix b{static_cast<const int8_t*>(weight_q.data_ptr()), weight_q.stride(1), weight_q.stride(0)};
  pack_panels(b, packed, to + sizeof(header));
  return out;
}

Tensor unpack_weight_op(Tensor packed, int64_t N, int64_t K) {
  check_unpack(packed);
  const PackedHeader header = read_packed_header(packed);
  BK_CHECK(header.cols == N && header.depth == K, "packed must be of shape [", N, ", ", K, "], got one of [",
           header.cols, ", ", header.depth, "]");
  Tensor out = torch::stable::new_empty(packed, {N, K});
  const PackedShape packed_shape{K, N};
  const char* const panels = static_cast<const char*>(packed.data_ptr()) + sizeof(header);
  int8_t* const to = static_cast<int8_t*>(out.data_ptr());
  torch::stable::parallel_for(
      0, N, std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(K, 1)), [&](int64_t begin, int64_t end) {
        for (int64_t j = begin; j < end; ++j) {
          for (int64_t k = 0; k < K; ++k) {
            const char* block = panels + j / kPanelCols * packed_shape.panel_bytes() +
                                PackedShape::block_begin(k / kBlockDepth) + kBlockHeader;
            const int64_t group = k % kBlockDepth / kGroupDepth;
            const char b = block[group * kGroupBytes + j % kPanelCols * kGroupDepth + k % kGroupDepth];
            to[j * K + k] = static_cast<int8_t>(static_cast<uint8_t>(b) - 128);
          }
        }
      });
  return out;
}

}  // namespace

}  // namespace bigkern

STABLE_TORCH_LIBRARY_IMPL(bigkern, CPU, m) {
  m.impl("int8_mm", TORCH_BOX(&bigkern::int8_mm_op));
  m.impl("pack_weight", TORCH_BOX(&bigkern::pack_weight_op));
  m.impl("unpack_weight", TORCH_BOX(&bigkern::unpack_weight_op));
}
