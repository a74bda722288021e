// Products of int8 matrices on the CPU, for the ops that are made of them.
#pragma once

#include <cstdint>
#include <functional>

#include "../int8_mm.h"

namespace bigkern {

// Some rows of C, by at most kTileCols columns; its sums are in a tile of int32 [num_rows, kTileCols].
constexpr int64_t kTileCols = 64;
struct Int8Unit {
  int64_t b, i_begin, num_rows, j_begin, num_cols;
};

struct Int8Row {
  const int8_t* data;
  int64_t stride;
};

// C = A . B for each entry of a batch, A [rows, depth], B [depth, cols].
struct Int8Gemm {
  int64_t batch = 1, rows = 0, depth = 0, cols = 0;
  // Row i of entry b of A. May write it to `scratch` [depth]. Is called once for each row, by any thread.
  std::function<Int8Row(int64_t b, int64_t i, int8_t* scratch)> row_of;
  // B: the panels of a packed weight, of one entry, or else the plain matrix of an entry.
  const char* panels = nullptr;
  std::function<Int8Matrix(int64_t b)> plain;
  // Where finish() writes: [batch, rows, cols], of elements of out_bytes. nullptr: in another order.
  void* out = nullptr;
  int64_t out_bytes = 0;
  // Takes the finished sums of a unit. Is called once for each element of C, by any thread.
  std::function<void(const Int8Unit& unit, const int32_t* tile)> finish;
};

void int8_gemm(const Int8Gemm& gemm);

// All of B in panels, to [shape.bytes()].
void pack_panels(const Int8Matrix& b, PackedShape shape, char* panels);

}  // namespace bigkern
