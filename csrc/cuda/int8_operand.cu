#include "int8_operand.cuh"

#include "launch.cuh"

namespace bigkern {

namespace {

constexpr int kTile = 64, kPitch = kTile + 4, kThreads = 256;  // the pitch keeps rows apart in the banks

// A tile of [64 rows, 64 bytes], read along the rows, or along the columns where those are adjacent, and written in
// chunks. blockIdx.x: [entry, row tile, column tile].
__global__ void __launch_bounds__(kThreads)
    copy_rows_kernel(const Int8Batch x, int8_t* to, int64_t depth, uint32_t row_tiles, uint32_t col_tiles) {
  __shared__ int8_t tile[kTile * kPitch];
  const int64_t entry = blockIdx.x / col_tiles / row_tiles;
  const int64_t i_begin = int64_t{blockIdx.x / col_tiles % row_tiles} * kTile;
  const int64_t k_begin = int64_t{blockIdx.x % col_tiles} * kTile;
  const bool by_column = x.row < x.col;
#pragma unroll 4
  for (int n = threadIdx.x; n < kTile * kTile; n += kThreads) {
    const int row = by_column ? n % kTile : n / kTile, col = by_column ? n / kTile : n % kTile;
    const int64_t i = i_begin + row, k = k_begin + col;
    const bool is_there = i < x.rows && k < x.depth;
    tile[row * kPitch + col] = is_there ? x.data[entry * x.entry + i * x.row + k * x.col] : int8_t{0};
  }
  __syncthreads();
  const int row = threadIdx.x / (kTile / kChunkBytes), col = threadIdx.x % (kTile / kChunkBytes) * kChunkBytes;
  if (i_begin + row >= x.rows || k_begin + col >= depth) return;
  const int32_t* const from = reinterpret_cast<const int32_t*>(tile + row * kPitch + col);
  *reinterpret_cast<int4*>(to + (entry * x.rows + i_begin + row) * depth + k_begin + col) = {from[0], from[1], from[2],
                                                                                             from[3]};
}
static_assert(kTile * kTile == kThreads * kChunkBytes);

// Whether the rows can be read in chunks where they are.
bool is_chunked(const int8_t* data, int64_t entries, int64_t entry, int64_t rows, int64_t row, int64_t row_bytes) {
  return reinterpret_cast<uintptr_t>(data) % kChunkBytes == 0 && row_bytes % kChunkBytes == 0 &&
         (entries < 2 || entry % kChunkBytes == 0) && (rows < 2 || row % kChunkBytes == 0);
}

}  // namespace

void copy_rows(const Int8Batch& x, int8_t* to, Device device) {
  const int64_t depth = whole_chunks(x.depth);
  const int64_t row_tiles = ceil_div<int64_t>(x.rows, kTile), col_tiles = ceil_div<int64_t>(depth, kTile);
  const int64_t blocks = x.entries * row_tiles * col_tiles;
  if (blocks == 0) return;
  launch(device.index, copy_rows_kernel, grid_of(blocks), kThreads, 0, x, to, depth, static_cast<uint32_t>(row_tiles),
         static_cast<uint32_t>(col_tiles));
}

Int8Operand chunked_rows(const Int8Batch& x, const Tensor& like, TensorList& keep) {
  const bool is_adjacent = x.col == 1 || x.depth < 2;
  if (is_adjacent && is_chunked(x.data, x.entries, x.entry, x.rows, x.row, x.depth)) return {x.data, x.row, x.entry};
  const int64_t depth = whole_chunks(x.depth);
  keep.push_back(torch::stable::new_empty(like, {x.entries, x.rows, depth}));
  auto* const copy = static_cast<int8_t*>(keep.back().data_ptr());
  copy_rows(x, copy, device_of(like));
  return {copy, depth, x.rows * depth};
}

void set_b(const Int8Batch& b, const Tensor& like, Int8Gemm& gemm, TensorList& keep) {
  gemm.b_depth = b.depth;
  gemm.b_is_row_major = b.row == 1 && b.col != 1 && is_chunked(b.data, b.entries, b.entry, b.depth, b.col, b.rows);
  gemm.b = gemm.b_is_row_major ? Int8Operand{b.data, b.col, b.entry} : chunked_rows(b, like, keep);
}

}  // namespace bigkern
