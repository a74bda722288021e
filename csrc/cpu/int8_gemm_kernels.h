// The product of a unit, for one instruction set; included by each_isa.h. D is one of int8_dot.h.

// C [M, N registers] of one block, from `row_begin` [M] on, or where that is nullptr from what the tile has. Register j
// of B begins at b[j]; if it was widened, all are together at b[0].
// Of a B that was not, the next block is fetched meanwhile, by each call a part of it: `ahead` bytes from where a group
// is read, and the following groups each ahead_step bytes less.
template <class D, int M, int N, bool kWide>
BK_TARGET void int8_micro(int64_t groups, const char* a, const char* const* b_begin, int64_t ahead, int64_t ahead_step,
                          const int32_t* const* col_begin, const int32_t* row_begin, int32_t* tile) {
  constexpr int64_t kLeftBytes = left_group_bytes(D::kLeft);
  typename D::Reg sum[M][N];
#pragma GCC unroll 6
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      sum[i][j] = row_begin != nullptr ? D::set(row_begin[i]) : D::load(tile + i * kTileCols + j * D::kCols);
      if constexpr (D::kLeft == LeftFormat::kPairSums) sum[i][j] = D::add(sum[i][j], D::load(col_begin[j]));
    }
  }
  const char* b[N];
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) b[j] = b_begin[j];
#pragma GCC unroll 2
  for (int64_t g = 0; g < groups; ++g, a += D::kRows * kLeftBytes) {
    typename D::Right b_reg[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      if constexpr (kWide) {
        b_reg[j] = D::load_wide(b[0] + j * sizeof(typename D::Right));
      } else {
        b_reg[j] = D::load_right(b[j]);
        if (j % (kPanelCols / D::kCols) == 0) __builtin_prefetch(b[j] + ahead);
        b[j] += kGroupBytes;
      }
    }
    if constexpr (kWide) {
      b[0] += N * sizeof(typename D::Right);
    } else {
      ahead -= ahead_step;
    }
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i) D::dot(sum[i], a + i * kLeftBytes, b_reg);
  }
#pragma GCC unroll 6
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) D::store(tile + i * kTileCols + j * D::kCols, sum[i][j]);
  }
}

using Int8Micro = void (*)(int64_t, const char*, const char* const*, int64_t, int64_t, const int32_t* const*,
                           const int32_t*, int32_t*);

template <class D, int N, bool kWide>
Int8Micro int8_micro_of(int rows) {
  if constexpr (D::kRows >= 6) {
    if (rows == 6) return &int8_micro<D, 6, N, kWide>;
  }
  if constexpr (D::kRows >= 5) {
    if (rows == 5) return &int8_micro<D, 5, N, kWide>;
  }
  if constexpr (D::kRows >= 4) {
    switch (rows) {
      case 4: return &int8_micro<D, 4, N, kWide>;
      case 3: return &int8_micro<D, 3, N, kWide>;
      case 2: return &int8_micro<D, 2, N, kWide>;
    }
  }
  return &int8_micro<D, 1, N, kWide>;
}

template <class D, bool kWide>
Int8Micro int8_micro_of(int rows, int regs) {
  if constexpr (D::kRegs == 4) {
    if (regs == 4) return int8_micro_of<D, 4, kWide>(rows);
    if (regs == 3) return int8_micro_of<D, 3, kWide>(rows);
  }
  if constexpr (D::kRegs >= 2) {
    if (regs == 2) return int8_micro_of<D, 2, kWide>(rows);
  }
  return int8_micro_of<D, 1, kWide>(rows);
}

// So many rows of A are worth the widening of B beforehand, instead of in the product.
constexpr int64_t kRowsWorthWidening = 24;

// One block of a unit: all rows by the columns of `panels`, each pointing to its block.
template <class D>
BK_TARGET void int8_multiply(const Int8Block& block, int32_t* tile) {
  constexpr int kRegsOfPanel = kPanelCols / D::kCols;
  constexpr bool kCanWiden = D::kLeft == LeftFormat::kPairSums;
  const int64_t groups = (block.depth + kGroupDepth - 1) / kGroupDepth;
  const bool is_wide = kCanWiden && block.num_rows >= kRowsWorthWidening;
  const int num_regs = block.num_panels * kRegsOfPanel;
  const int64_t num_calls = (block.num_rows + D::kRows - 1) / D::kRows;
  const int64_t part_bytes = groups * kGroupBytes / num_calls, ahead_step = kGroupBytes - kGroupBytes / num_calls;
  for (int first = 0; first < num_regs; first += D::kRegs) {
    const int regs = std::min(D::kRegs, num_regs - first);
    const char* b[D::kRegs];
    const int32_t* col_begin[D::kRegs];
    for (int j = 0; j < regs; ++j) {
      const int reg = first + j;
      const char* panel = block.panels[reg / kRegsOfPanel];
      col_begin[j] = reinterpret_cast<const int32_t*>(panel) + reg % kRegsOfPanel * D::kCols;
      b[j] = panel + kBlockHeader + reg % kRegsOfPanel * D::kCols * kGroupDepth;
    }
    if constexpr (kCanWiden) {
      if (is_wide) {
        constexpr int64_t kRegBytes = sizeof(typename D::Right);
        for (int j = 0; j < regs; ++j) {
          char* to = block.wide + j * kRegBytes;
          for (int64_t g = 0; g < groups; ++g) {
            D::store_wide(to + g * regs * kRegBytes, D::load_right(b[j] + g * kGroupBytes));
          }
          b[j] = to;
        }
      }
    }
    for (int64_t i = 0; i < block.num_rows; i += D::kRows) {
      const int rows = std::min<int64_t>(D::kRows, block.num_rows - i);
      Int8Micro micro = int8_micro_of<D, false>(rows, regs);
      if constexpr (kCanWiden) {
        if (is_wide) micro = int8_micro_of<D, true>(rows, regs);
      }
      const int64_t ahead = groups * kGroupBytes + i / D::kRows * part_bytes;
      if (is_wide) {
        for (int p = first / kRegsOfPanel; p < (first + regs + kRegsOfPanel - 1) / kRegsOfPanel; ++p) {
          const char* next = block.panels[p] + kBlockHeader + ahead;
          for (int64_t k = 0; k < part_bytes; k += 64) __builtin_prefetch(next + k);
        }
      }
      if (first == 0 && block.out != nullptr) {
        for (int64_t r = i; r < i + rows; ++r) {
          for (int64_t j = 0; j < block.out_bytes; j += 64) __builtin_prefetch(block.out + r * block.out_row + j, 1);
        }
      }
      micro(groups, block.left + i * groups * left_group_bytes(D::kLeft), b, ahead, ahead_step, col_begin,
            block.row_begin == nullptr ? nullptr : block.row_begin + i, tile + i * kTileCols + first * D::kCols);
    }
  }
}
