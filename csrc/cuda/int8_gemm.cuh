// A tile of an int8 product by tensor cores: copies run stages ahead of the products, through shared memory.
#pragma once

#include "int8_gemm_call.cuh"
#include "launch.cuh"

namespace bigkern {

// Of K, a tile has 64 bytes: two steps of mma.m16n8k32.
constexpr int BLOCK_K = 64, kStepK = 32;
constexpr int kTileChunks = BLOCK_K / kChunkBytes, kSteps = BLOCK_K / kStepK;

template <int M, int N, int WarpsM, int WarpsN, int Stages>
struct Int8Tile {
  static constexpr int BLOCK_M = M, BLOCK_N = N, kWarpsN = WarpsN, kStages = Stages;
  static constexpr int WARP_M = M / WarpsM, WARP_N = N / WarpsN;
  static constexpr int kThreads = 32 * WarpsM * WarpsN;
  static constexpr int kStageBytes = (M + N) * BLOCK_K;
  static constexpr int kSmemBytes = Stages * kStageBytes;
};

// Where the operands come from. That of a row-major B is transposed between shared memory and registers.
enum class Int8Layout { kDense, kRowMajorB, kIm2col };

// A chunk's place in a tile of rows of 64 bytes: 8 rows at the same chunk lie in different banks, two rows in a line
// of all of them.
__device__ inline int place_in_rows(int row, int chunk) {
  return row * BLOCK_K + ((chunk ^ ((row >> 1) & 3)) * static_cast<int>(kChunkBytes));
}

// The same in a tile of a row-major B, rows k of BLOCK_N bytes: those that one load_matrices_transposed reads together
// are k = 0, 1, 4, 5, ... 13.
template <int BLOCK_N>
__device__ int place_in_columns(int k, int chunk) {
  const int swizzle = BLOCK_N == 64 ? k >> 2 & 3 : (k >> 1 & 6) | (k & 1);
  return k * BLOCK_N + (chunk ^ swizzle) * static_cast<int>(kChunkBytes);
}

// Where a chunk of each patch lies, from its first byte on.
__device__ inline int64_t tap_offset(const Im2col& im2col, int chunk) {
  const int tap = chunk / im2col.chunks_of_tap;
  return tap / im2col.kernel_width * im2col.dilation_line + tap % im2col.kernel_width * im2col.dilation_pixel +
         chunk % im2col.chunks_of_tap * kChunkBytes;
}

// Copies rows of K-adjacent bytes: a thread those at one chunk of the tile's K, of every kRowsAtOnce-th row. Beyond the
// last one are zeros.
template <int BLOCK_ROWS, int kThreads>
struct RowLoader {
  static constexpr int kRowsAtOnce = kThreads / kTileChunks, kNumRows = BLOCK_ROWS / kRowsAtOnce;

  // `row_of(n)`: the n-th row of this thread, which need not be one of the matrix if it isn't among `rows_left`.
  template <class RowOf>
  static __device__ void copy(int8_t* smem, int64_t offset, bool chunk_is_there, int rows_left, const int8_t* matrix,
                              const RowOf& row_of) {
#pragma unroll
    for (int n = 0; n < kNumRows; ++n) {
      const int i = n * kRowsAtOnce + threadIdx.x / kTileChunks;
      const bool is_there = chunk_is_there && i < rows_left;
      copy_async(smem + place_in_rows(i, threadIdx.x % kTileChunks), is_there ? row_of(n) + offset : matrix, is_there);
    }
  }
};

// Rows that are one stride apart.
template <int BLOCK_ROWS, int kThreads>
struct StridedRows : RowLoader<BLOCK_ROWS, kThreads> {
  using Loader = RowLoader<BLOCK_ROWS, kThreads>;
  const int8_t *matrix, *first;
  int64_t stride;
  int rows_left;

  __device__ StridedRows(const int8_t* matrix, int64_t begin, int64_t num_rows, int64_t stride)
      : matrix(matrix),
        first(matrix + (begin + threadIdx.x / kTileChunks) * stride),
        stride(stride),
        rows_left(static_cast<int>(min(num_rows - begin, int64_t{BLOCK_ROWS}))) {}

  __device__ void copy(int8_t* smem, int chunk, bool is_there) const {
    Loader::copy(smem, int64_t{chunk} * kChunkBytes, is_there, rows_left, matrix,
                 [&](int n) { return first + n * Loader::kRowsAtOnce * stride; });
  }
};

// Rows that are the patches of images.
template <int BLOCK_ROWS, int kThreads>
struct PatchRows : RowLoader<BLOCK_ROWS, kThreads> {
  using Loader = RowLoader<BLOCK_ROWS, kThreads>;
  const Im2col& im2col;
  const int8_t *images, *row[Loader::kNumRows];
  int rows_left;

  __device__ PatchRows(const int8_t* images, int64_t begin, int64_t num_rows, const Im2col& im2col)
      : im2col(im2col), images(images), rows_left(static_cast<int>(min(num_rows - begin, int64_t{BLOCK_ROWS}))) {
#pragma unroll
    for (int n = 0; n < Loader::kNumRows; ++n) {
      row[n] = images + patch_offset(im2col, begin + n * Loader::kRowsAtOnce + threadIdx.x / kTileChunks);
    }
  }

  __device__ void copy(int8_t* smem, int chunk, bool is_there) const {
    Loader::copy(smem, tap_offset(im2col, chunk), is_there, rows_left, images, [&](int n) { return row[n]; });
  }
};

// Rows k of N-adjacent bytes.
template <int BLOCK_N, int kThreads>
struct ColumnLoader {
  static constexpr int kChunksOfRow = BLOCK_N / kChunkBytes, kRowsAtOnce = kThreads / kChunksOfRow;
  const int8_t* columns;
  int64_t stride;
  bool is_there;

  __device__ ColumnLoader(const int8_t* matrix, int64_t begin, int64_t num_cols, int64_t stride) : stride(stride) {
    const int64_t j = begin + threadIdx.x % kChunksOfRow * kChunkBytes;
    is_there = j < num_cols;
    columns = matrix + (is_there ? j : 0);
  }

  // From a chunk of K on, as far as `depth`.
  __device__ void copy(int8_t* smem, int chunk, int64_t depth) const {
    const int row = threadIdx.x / kChunksOfRow;
    const int64_t k_begin = int64_t{chunk} * kChunkBytes;
    const int rows_left = is_there ? static_cast<int>(min(depth - k_begin, int64_t{BLOCK_K})) : 0;
    const int8_t* const first = columns + (k_begin + row) * stride;
#pragma unroll
    for (int n = 0; n < BLOCK_K / kRowsAtOnce; ++n) {
      const int k = n * kRowsAtOnce + row;
      copy_async(smem + place_in_columns<BLOCK_N>(k, threadIdx.x % kChunksOfRow),
                 k < rows_left ? first + n * kRowsAtOnce * stride : columns, k < rows_left);
    }
  }
};

// A warp's part of the operands for one step, as mma.m16n8k32 wants it.
template <class Tile>
struct Fragments {
  uint32_t a[Tile::WARP_M / 16][4], b[Tile::WARP_N / 16][4];
};

template <class Tile, bool kRowMajorB>
__device__ void load_fragments(Fragments<Tile>& f, const int8_t* stage, int warp_row, int warp_col, int step) {
  const int lane = threadIdx.x % 32;
  const int8_t* const b_smem = stage + Tile::BLOCK_M * BLOCK_K;
#pragma unroll
  for (int i = 0; i < Tile::WARP_M / 16; ++i) {
    load_matrices(f.a[i], stage + place_in_rows(warp_row + 16 * i + lane % 16, 2 * step + lane / 16));
  }
#pragma unroll
  for (int j = 0; j < Tile::WARP_N / 16; ++j) {
    if constexpr (kRowMajorB) {
      // Pairs of columns are 16-bit elements here. Of a pair, one column goes to each of two products.
      const int k = kStepK * step + 16 * (lane / 16) + 2 * (lane / 8 % 2) + 4 * (lane % 8 / 2) + lane % 2;
      uint32_t m[4];
      load_matrices_transposed(m, b_smem + place_in_columns<Tile::BLOCK_N>(k, warp_col / 16 + j));
      f.b[j][0] = __byte_perm(m[0], m[1], 0x6420);
      f.b[j][1] = __byte_perm(m[2], m[3], 0x6420);
      f.b[j][2] = __byte_perm(m[0], m[1], 0x7531);
      f.b[j][3] = __byte_perm(m[2], m[3], 0x7531);
    } else {
      const int row = warp_col + 16 * j + lane / 16 * 8 + lane % 8;
      load_matrices(f.b[j], b_smem + place_in_rows(row, 2 * step + lane / 8 % 2));
    }
  }
}

// Each warp hands its sums on 16 rows at a time, through shared memory. So many words a row keep its writes, of 8 bytes
// or of 16, apart in the banks.
template <class Tile, bool kRowMajorB>
struct Slice {
  static constexpr int kPitch = Tile::WARP_N + (kRowMajorB ? 16 : 8), kWords = 16 * kPitch;
  static_assert(Tile::kThreads / 32 * kWords * 4 <= Tile::kSmemBytes);
};

// Two rows of eight: lane l holds columns 2 (l % 4) and the next of rows l / 4 and l / 4 + 8 of products j and j + 1.
template <class Tile, bool kRowMajorB>
__device__ void write_slice(int32_t* slice, const int32_t (&sums)[Tile::WARP_N / 8][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < Tile::WARP_N / 8; j += 2) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int32_t* const row = slice + (lane / 4 + 8 * half) * Slice<Tile, kRowMajorB>::kPitch + 8 * j;
      const int32_t *first = sums[j] + 2 * half, *second = sums[j + 1] + 2 * half;
      if constexpr (kRowMajorB) {  // even and odd columns
        reinterpret_cast<int4*>(row)[lane % 4] = make_int4(first[0], second[0], first[1], second[1]);
      } else {
        reinterpret_cast<int2*>(row)[lane % 4] = make_int2(first[0], first[1]);
        reinterpret_cast<int2*>(row + 8)[lane % 4] = make_int2(second[0], second[1]);
      }
    }
  }
}

// The scales of a warp's rows, a lane each, read at once: a load for each row would be waited for each time.
template <int WARP_M>
class RowScales {
 public:
  __device__ RowScales(const Int8Epilogue& p, int64_t i_begin, int64_t rows) {
    const OutputRows row_of(p, i_begin);
#pragma unroll
    for (int n = 0; n < kRegs; ++n) {
      const int row = 32 * n + threadIdx.x % 32;
      scale_[n] = i_begin + row < rows ? row_of(p, row).scale : 0.0f;
    }
  }

  // By all lanes.
  __device__ float operator()(int row) const {
    float scale = 0.0f;
#pragma unroll
    for (int n = 0; n < kRegs; ++n) {
      const float s = __shfl_sync(~0u, scale_[n], row % 32);
      if (row / 32 == n) scale = s;
    }
    return scale;
  }

 private:
  static constexpr int kRegs = ceil_div(WARP_M, 32);
  float scale_[kRegs];
};

// A warp's rows, WARP_M from `i` on, and columns, in the output.
struct WarpPlace {
  int64_t i, rows, j, cols;
  int64_t first_factor;  // of the batch's entry
  bool is_transposed;    // rows are adjacent in the output

  // Of the lane's first column, and its first row of a slice.
  template <class Tile>
  __device__ int column() const {
    const int lane = threadIdx.x % 32;
    return (is_transposed ? lane / 16 : lane % (Tile::WARP_N / kColumns)) * kColumns;
  }

  template <class Tile>
  __device__ int row() const {
    const int lane = threadIdx.x % 32;
    return is_transposed ? lane % 16 : lane / (Tile::WARP_N / kColumns);
  }

  __device__ ColumnFactors factors(const Int8Epilogue& p, int column) const {
    return load_factors(p, first_factor + j + column, cols - j - column);
  }
};

// Writes 16 rows of a warp's sums, from row 16 n of it on, to the output. `factors` are those of the first column.
template <class Tile, bool kRowMajorB>
__device__ void finish_slice(const Int8Epilogue& p, const int32_t* slice, int n, const WarpPlace& place,
                             const RowScales<Tile::WARP_M>& scale_of, ColumnFactors factors) {
  constexpr int kRowsAtOnce = 32 * kColumns / Tile::WARP_N;
  const OutputRows row_of(p, place.i + 16 * n);
  int row = place.row<Tile>(), column = place.column<Tile>();
#pragma unroll 1
  for (int step = 0; step < 16 / kRowsAtOnce; ++step) {
    const int64_t columns_left = place.cols - place.j - column;
    if (step > 0 && place.is_transposed) factors = place.factors(p, column);
    const float scale = scale_of(16 * n + row);
    if (place.i + 16 * n + row < place.rows && columns_left > 0) {
      const int4 v = *reinterpret_cast<const int4*>(slice + row * Slice<Tile, kRowMajorB>::kPitch + column);
      const int32_t sums[kColumns] = {v.x, v.y, v.z, v.w};
      finish(p, row_of(p, row).offset + (place.j + column) * p.col, columns_left, scale, factors, sums);
    }
    place.is_transposed ? column += 2 * kColumns : row += kRowsAtOnce;
  }
}

// Which tile a block has: of blocks that run together, operands are shared through the L2 cache, so they take about as
// many rows of tiles as columns of them (of 2048 rows each).
struct TilePlace {
  int64_t row, col;
};

template <class Tile>
__device__ TilePlace tile_place(uint32_t tile, int64_t rows, int64_t cols) {
  constexpr uint32_t kMostTall = 2048 / Tile::BLOCK_M;
  const auto tall = static_cast<uint32_t>(ceil_div<int64_t>(rows, Tile::BLOCK_M));
  const auto wide = static_cast<uint32_t>(ceil_div<int64_t>(cols, Tile::BLOCK_N));
  const uint32_t group = tile / (kMostTall * wide), in_group = tile % (kMostTall * wide);
  const uint32_t group_tall = min(kMostTall, tall - group * kMostTall);
  return {static_cast<int64_t>(group * kMostTall + in_group % group_tall) * Tile::BLOCK_M,
          static_cast<int64_t>(in_group / group_tall) * Tile::BLOCK_N};
}

// blockIdx.x: [batch, split, tile]. A split has so many chunks of K, and its sums for output [batch, split, M, N].
template <class Tile, Int8Layout kLayout>
__global__ void __launch_bounds__(Tile::kThreads)
    int8_gemm_kernel(const __grid_constant__ Int8Gemm p, uint32_t num_tiles, int num_splits, int chunks_of_split) {
  constexpr bool kRowMajorB = kLayout == Int8Layout::kRowMajorB;
  constexpr int kStages = Tile::kStages, kBOffset = Tile::BLOCK_M * BLOCK_K;
  extern __shared__ __align__(128) int8_t smem[];  // stages of A [BLOCK_M, BLOCK_K] and B

  const uint32_t batch_and_split = blockIdx.x / num_tiles;
  const int64_t batch = batch_and_split / num_splits;
  const TilePlace tile = tile_place<Tile>(blockIdx.x % num_tiles, p.rows, p.cols);
  const int begin = batch_and_split % num_splits * chunks_of_split;
  const int end = min(begin + chunks_of_split, static_cast<int>(p.depth / kChunkBytes));
  const int num_k_tiles = max(0, ceil_div(end - begin, kTileChunks));
  const int warp = threadIdx.x / 32;
  const int warp_row = warp / Tile::kWarpsN * Tile::WARP_M, warp_col = warp % Tile::kWarpsN * Tile::WARP_N;

  const int8_t *const a = p.a.data + batch * p.a.batch, *const b = p.b.data + batch * p.b.batch;
  const auto load_a = [&] {
    if constexpr (kLayout == Int8Layout::kIm2col) {
      return PatchRows<Tile::BLOCK_M, Tile::kThreads>(a, tile.row, p.rows, p.im2col);
    } else {
      return StridedRows<Tile::BLOCK_M, Tile::kThreads>(a, tile.row, p.rows, p.a.row);
    }
  }();
  const auto load_b = [&] {
    if constexpr (kRowMajorB) {
      return ColumnLoader<Tile::BLOCK_N, Tile::kThreads>(b, tile.col, p.cols, p.b.row);
    } else {
      return StridedRows<Tile::BLOCK_N, Tile::kThreads>(b, tile.col, p.cols, p.b.row);
    }
  }();

  // One group of copies for each tile of K, also where there is none left.
  const auto copy_tile = [&](int k_tile) {
    if (k_tile < num_k_tiles) {
      int8_t* const stage = smem + k_tile % kStages * Tile::kStageBytes;
      const int tile_chunk = begin + k_tile * kTileChunks, chunk = tile_chunk + threadIdx.x % kTileChunks;
      load_a.copy(stage, chunk, chunk < end);
      if constexpr (kRowMajorB) {
        load_b.copy(stage + kBOffset, tile_chunk, min(p.b_depth, int64_t{end} * kChunkBytes));
      } else {
        load_b.copy(stage + kBOffset, chunk, chunk < end);
      }
    }
    commit_copies();
  };
#pragma unroll
  for (int k_tile = 0; k_tile < kStages; ++k_tile) copy_tile(k_tile);

  // S = A @ B  [BLOCK_M, BLOCK_N], a step's fragments loaded while the step before is multiplied
  int32_t sums[Tile::WARP_M / 16][Tile::WARP_N / 8][4] = {};
  Fragments<Tile> fragments[kSteps];
  wait_for_copies<kStages - 1>();
  __syncthreads();
  load_fragments<Tile, kRowMajorB>(fragments[0], smem, warp_row, warp_col, 0);
#pragma unroll 1
  for (int k_tile = 0; k_tile < num_k_tiles; ++k_tile) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int next = (step + 1) % kSteps;
      if (next == 0) {
        // The next tile has arrived, and nobody reads this one any more.
        wait_for_copies<kStages - 2>();
        __syncthreads();
        copy_tile(k_tile + kStages);
      }
      const int8_t* const stage = smem + (k_tile + (next == 0)) % kStages * Tile::kStageBytes;
      load_fragments<Tile, kRowMajorB>(fragments[next], stage, warp_row, warp_col, next);
      const Fragments<Tile>& f = fragments[step];
#pragma unroll
      for (int i = 0; i < Tile::WARP_M / 16; ++i) {
#pragma unroll
        for (int j = 0; j < Tile::WARP_N / 8; ++j) {
          multiply_add<int8_t>(sums[i][j], f.a[i], f.b[j / 2][j % 2 * 2], f.b[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
  }

  // Y = epilogue(S), through shared memory so that a warp's writes are adjacent
  wait_for_copies<0>();
  __syncthreads();
  int32_t* const slice = reinterpret_cast<int32_t*>(smem) + warp * Slice<Tile, kRowMajorB>::kWords;
  Int8Epilogue out = p.epilogue;
  out.out = static_cast<char*>(out.out) + batch_and_split * out.batch * element_size(out.dtype);
  const WarpPlace place{tile.row + warp_row, p.rows, tile.col + warp_col, p.cols, batch * p.cols, out.col != 1};
  const RowScales<Tile::WARP_M> scale_of(out, place.i, p.rows);
  const ColumnFactors factors = place.factors(out, place.column<Tile>());
#pragma unroll 1
  for (int n = 0; n < Tile::WARP_M / 16; ++n) {  // not unrolled: what finishes a slice is long
    __syncwarp();
#pragma unroll
    for (int i = 0; i < Tile::WARP_M / 16; ++i) {
      if (i == n) write_slice<Tile, kRowMajorB>(slice, sums[i]);
    }
    __syncwarp();
    finish_slice<Tile, kRowMajorB>(out, slice, n, place, scale_of, factors);
  }
}

}  // namespace bigkern
