// Rows of a matrix in shared memory.
#pragma once

#include "ptx.cuh"
#include "vector.cuh"

namespace bigkern {

// Rows of kCols elements. Chunk c of row r, of 16 bytes, lies at chunk c ^ r % 8: then neither ldmatrix, which reads a
// chunk of each of 8 rows, nor copies of whole rows meet in a bank.
template <class T, int kCols>
struct SharedTile {
  static constexpr int kChunk = 16 / sizeof(T), kChunks = kCols / kChunk;
  static_assert(kChunks % 8 == 0);
  T* data;

  // Chunk c + lane_c, where lane_c is 0 or 1, then c even: what all lanes have in common stays apart from what they
  // haven't, of which there are but 8 / 2 values to keep in registers, whatever c.
  __device__ T* chunk(int row, int c, int lane_c = 0) const {
    return data + row * kCols + (c / 8 * 8 + (c % 8 ^ (lane_c ^ row % 8))) * kChunk;
  }
  // Column col + lane_col, likewise: col is a multiple of 2 chunks, or lane_col within a chunk.
  __device__ T* at(int row, int col, int lane_col = 0) const {
    return chunk(row, col / kChunk, lane_col / kChunk) + (col + lane_col) % kChunk;
  }
};

// Copies rows of `cols` elements, asynchronously if that can be done; the rest of each, and rows that aren't there,
// become 0. By all threads of the block.
//   row_at(r): where row r begins, nullptr if it isn't there
//   vectorized: all rows begin at multiples of 16 bytes, their elements are neighbours and fill whole chunks
template <class T, int kCols, class RowAt>
__device__ void copy_rows(SharedTile<T, kCols> tile, int num_rows, const RowAt& row_at, int cols, int64_t col_stride,
                          bool vectorized, const T* any /* valid address */) {
  using Tile = SharedTile<T, kCols>;
  for (int i = threadIdx.x; i < num_rows * Tile::kChunks; i += blockDim.x) {
    const int r = i / Tile::kChunks, begin = i % Tile::kChunks * Tile::kChunk;
    const T* row = row_at(r);
    const bool is_there = row != nullptr && begin < cols;
    T* const to = tile.chunk(r, i % Tile::kChunks);
    if (vectorized) {
      copy_async(to, is_there ? row + begin : any, is_there);
    } else {
      Vector<T, Tile::kChunk> chunk;
#pragma unroll
      for (int e = 0; e < Tile::kChunk; ++e) {
        chunk.at[e] = is_there && begin + e < cols ? row[(begin + e) * col_stride] : static_cast<T>(0.f);
      }
      store(to, chunk);
    }
  }
}

// The same of rows that are `row_stride` apart, of which `rows_left` are there, and the first in any case. What tells
// one chunk from the next is known before: but for products, a loop over keys has few instructions to spare.
template <int kRows, class T, int kCols>
__device__ void copy_strided_rows(SharedTile<T, kCols> tile, const T* first, int64_t row_stride, int rows_left,
                                  int cols, int64_t col_stride, bool vectorized, int num_threads = blockDim.x) {
  using Tile = SharedTile<T, kCols>;
  if (!vectorized || num_threads < Tile::kChunks) {
    const auto row_at = [&](int r) { return r < rows_left ? first + r * row_stride : nullptr; };
    return copy_rows(tile, kRows, row_at, cols, col_stride, vectorized, first);
  }
  const int chunk = threadIdx.x % Tile::kChunks, begin = threadIdx.x / Tile::kChunks;
  const int rows_at_once = num_threads / Tile::kChunks;
  if (chunk * Tile::kChunk >= cols) rows_left = 0;
  const T* from = first + begin * row_stride + chunk * Tile::kChunk;
  const int64_t step = rows_at_once * row_stride;
#pragma unroll
  for (int n = 0; n * rows_at_once < kRows; ++n, from += step) {
    const int r = n * rows_at_once + begin;
    if (kRows % rows_at_once != 0 && r >= kRows) return;
    copy_async(tile.chunk(r, chunk), r < rows_left ? from : first, r < rows_left);
  }
}

}  // namespace bigkern
