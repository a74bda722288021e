// Products of int8 matrices on the CPU: packing, and how they are cut into units.
#include "int8_gemm.h"

#include "int8_dot.h"
#include "rounding.h"
#include "units.h"
#include "workspace.h"

namespace bigkern {

constexpr int64_t kTilePanels = kTileCols / kPanelCols;

// Some rows of A by kBlockDepth of its columns, and the panels that they meet.
struct Int8Block {
  int64_t depth, num_rows;
  const char* left;          // [num_rows / rows of the micro-kernel, groups, rows of the micro-kernel, group]
  const int32_t* row_begin;  // [num_rows], what the sums begin with; nullptr: with those in the tile
  int num_panels;
  const char* panels[kTilePanels];
  char* wide;  // room for kTilePanels of the block in int16
  // Where the results will be written next, to be fetched during the product; nullptr: not next.
  const char* out;
  int64_t out_row, out_bytes;  // from row to row, and of a row
};

using Int8Multiply = void (*)(const Int8Block&, int32_t* tile);

}  // namespace bigkern

#define BK_KERNELS "int8_gemm_kernels.h"
#include "each_isa.h"

#if defined(__x86_64__)
namespace bigkern::avx2_vnni {
#define BK_TARGET BK_TARGET_AVX2_VNNI
#include BK_KERNELS
#undef BK_TARGET
}  // namespace bigkern::avx2_vnni

namespace bigkern::avx512_vnni {
#define BK_TARGET BK_TARGET_AVX512_VNNI
#include BK_KERNELS
#undef BK_TARGET
}  // namespace bigkern::avx512_vnni
#else
namespace bigkern {
namespace avx2_vnni = scalar;
namespace avx512_vnni = scalar;
}  // namespace bigkern
#endif

namespace bigkern {

namespace {

struct Int8Kernels {
  LeftFormat left;
  int rows, cols;  // of the micro-kernel
  Int8Multiply multiply;
};

constexpr int kMostMicroRows = 6;

template <class D>
Int8Kernels kernels_of(Int8Multiply multiply) {
  static_assert(D::kRows <= kMostMicroRows);
  return {D::kLeft, D::kRows, D::kRegs * D::kCols, multiply};
}

Int8Kernels choose_kernels() {
  if (isa() >= Isa::kAvx512Vnni)
    return kernels_of<avx512_vnni::Int8Dot>(&avx512_vnni::int8_multiply<avx512_vnni::Int8Dot>);
#if defined(__x86_64__)
  if (isa() == Isa::kAvx2 && __builtin_cpu_supports("avxvnni")) {
    return kernels_of<avx2_vnni::Int8Dot>(&avx2_vnni::int8_multiply<avx2_vnni::Int8Dot>);
  }
#endif
  return select(kernels_of<scalar::Int8Dot>(&scalar::int8_multiply<scalar::Int8Dot>),
                kernels_of<avx2::Int8Dot>(&avx2::int8_multiply<avx2::Int8Dot>),
                kernels_of<avx512::Int8Dot>(&avx512::int8_multiply<avx512::Int8Dot>));
}

// A unit's rows of A and its tile of sums fit the L2 cache, 196 KiB and 48 KiB.
constexpr int64_t kMostRows = 192, kLeastRows = 24;
constexpr int64_t kUnitsPerThread = 4;
constexpr int64_t kNarrowLeftBytes = 256 << 10;
constexpr int64_t kLeftBytes = 16 << 20;  // rows of A that are packed at a time

// A unit, and where its rows are in the packed ones.
struct Int8Task {
  Int8Unit unit;
  int64_t first_row;
};

struct Range {
  int64_t begin, end;
};

std::vector<Range> ranges(int64_t n, int64_t step) {
  std::vector<Range> result;
  for (int64_t i = 0; i < n; i += step) result.push_back({i, std::min(n, i + step)});
  return result;
}

class Int8Driver {
 public:
  explicit Int8Driver(const Int8Gemm& gemm)
      : gemm_(gemm),
        shape_{gemm.depth, gemm.cols},
        kernels_(choose_kernels()),
        left_row_(shape_.num_groups() * left_group_bytes(kernels_.left)) {
    if (gemm.batch * gemm.rows == 0 || gemm.cols == 0) return;
    // More units than threads share the work better where it can't be shared evenly; but only a packed B may be read by
    // several of them.
    const int64_t num_threads = torch::stable::get_num_threads();
    const int64_t num_tiles = gemm.batch * ceil_div(gemm.cols, kTileCols);
    const bool is_even = gemm.panels == nullptr || num_tiles % num_threads == 0;
    const int64_t splits = is_even ? 1 : ceil_div(kUnitsPerThread * num_threads, num_tiles);
    const int64_t num_blocks =
        std::max(ceil_div(gemm.rows, kMostRows), std::clamp<int64_t>(gemm.rows / kLeastRows, 1, splits));
    rows_of_unit_ = round_up(ceil_div(gemm.rows, num_blocks), kernels_.rows);
    // Narrow units read a packed B from end to end; wide ones read less of A, and whole cache lines of a plain B.
    const bool is_narrow = gemm.panels != nullptr && rows_of_unit_ * left_row_ <= kNarrowLeftBytes;
    cols_of_unit_ = is_narrow ? kernels_.cols : kTileCols;
    packs_panels_ = gemm.panels == nullptr && rows_of_unit_ < gemm.rows;

    const int64_t most_rows =
        std::max<int64_t>(kLeftBytes / std::max<int64_t>(left_row_ * rows_of_unit_, 1), 1) * rows_of_unit_;
    for (int64_t b = 0; b < gemm.batch; ++b) {
      for (const Range& rows : ranges(gemm.rows, most_rows)) {
        // Small entries of a batch together.
        if (packs_panels_ || num_rows_ + round_up(rows.end - rows.begin, kernels_.rows) > most_rows) multiply();
        add(b, rows);
      }
    }
    multiply();
  }

 private:
  void add(int64_t b, const Range& rows) {
    for (int64_t i = rows.begin; i < rows.end; i += rows_of_unit_) {
      const int64_t n = std::min(rows_of_unit_, rows.end - i);
      for (const Range& cols : ranges(gemm_.cols, cols_of_unit_)) {
        tasks_.push_back({{b, i, n, cols.begin, cols.end - cols.begin}, num_rows_});
      }
      num_rows_ += round_up(n, kernels_.rows);
    }
  }

  // All that were added.
  void multiply() {
    if (num_rows_ == 0) return;
    Workspace& workspace = Workspace::of_this_call();
    char* const left = workspace.take<char>(num_rows_ * left_row_);  // [num_rows_, left_row_ bytes]
    int32_t* const row_begin = workspace.take<int32_t>(num_rows_);   // [num_rows_]
    pack_rows(left, row_begin);
    const char* panels = gemm_.panels;
    if (packs_panels_) {
      char* const packed = workspace.take<char>(shape_.bytes());
      pack_panels(gemm_.plain(tasks_[0].unit.b), shape_, packed);
      panels = packed;
    }
    run_units(tasks_, work_of(num_rows_), [&](const Int8Task& task) {
      run(task.unit, left + task.first_row * left_row_, row_begin + task.first_row, panels);
    });
    tasks_.clear();
    num_rows_ = 0;
  }

  double work_of(double rows) const { return rows * gemm_.depth * gemm_.cols; }

  // Of the rows of a unit, each block is [rows of the unit / R, groups, R, group], R being the micro-kernel's rows.
  void pack_rows(char* left, int32_t* row_begin) const {
    std::vector<Int8Task> parts;
    for (const Int8Task& task : tasks_) {
      if (task.unit.j_begin > 0) continue;  // the same rows
      for (int64_t i = 0; i < task.unit.num_rows; i += kernels_.rows) {
        Int8Task part = task;
        part.unit.j_begin = i;
        parts.push_back(part);
      }
    }
    const int64_t group_bytes = left_group_bytes(kernels_.left), step = kernels_.rows * group_bytes;
    constexpr double kWorkOfElement = 16;
    run_units(parts, kWorkOfElement * num_rows_ * gemm_.depth, [&](const Int8Task& part) {
      const int64_t begin = part.unit.j_begin, end = std::min(begin + kernels_.rows, part.unit.num_rows);
      const int64_t padded_rows = round_up(part.unit.num_rows, kernels_.rows);
      int8_t* const scratch = Workspace::of_this_thread().take<int8_t>(kernels_.rows * gemm_.depth);
      Int8Row rows[kMostMicroRows];
      uint32_t sums[kMostMicroRows] = {};
      for (int64_t i = begin; i < end; ++i) {
        rows[i - begin] = gemm_.row_of(part.unit.b, part.unit.i_begin + i, scratch + (i - begin) * gemm_.depth);
      }
      char* block = left + part.first_row * left_row_;
      for (int64_t q = 0; q < shape_.num_blocks(); ++q) {
        const int64_t depth = shape_.block_depth(q), row_bytes = ceil_div(depth, kGroupDepth) * group_bytes;
        for (int64_t r = 0; r < end - begin; ++r) {
          sums[r] += pack_left(kernels_.left, rows[r].data + q * kBlockDepth * rows[r].stride, rows[r].stride, depth,
                               block + begin * row_bytes + r * group_bytes, step);
        }
        block += padded_rows * row_bytes;
      }
      for (int64_t i = begin; i < end; ++i) row_begin[part.first_row + i] = static_cast<int32_t>(sums[i - begin]);
    });
  }

  void run(const Int8Unit& unit, const char* left, const int32_t* row_begin, const char* panels) const {
    constexpr int64_t kBlockBytes = kBlockHeader + kBlockDepth / kGroupDepth * kGroupBytes;
    Workspace& workspace = Workspace::of_this_thread();
    int32_t* const tile = workspace.take<int32_t>(unit.num_rows * kTileCols);  // [num_rows, kTileCols]
    char* const wide = workspace.take<char>(2 * kTilePanels * kBlockBytes);
    char* const packed = workspace.take<char>(kTilePanels * kBlockBytes);
    if (gemm_.depth == 0) std::fill_n(tile, unit.num_rows * kTileCols, 0);

    for (int64_t q = 0; q < shape_.num_blocks(); ++q) {
      Int8Block block{};
      block.depth = shape_.block_depth(q);
      block.num_rows = unit.num_rows;
      block.left = left;
      left +=
          round_up(unit.num_rows, kernels_.rows) * ceil_div(block.depth, kGroupDepth) * left_group_bytes(kernels_.left);
      block.row_begin = q == 0 ? row_begin : nullptr;
      block.num_panels = ceil_div(unit.num_cols, kPanelCols);
      block.wide = wide;
      if (gemm_.out != nullptr && q + 1 == shape_.num_blocks()) {
        block.out = static_cast<char*>(gemm_.out) +
                    ((unit.b * gemm_.rows + unit.i_begin) * gemm_.cols + unit.j_begin) * gemm_.out_bytes;
        block.out_row = gemm_.cols * gemm_.out_bytes;
        block.out_bytes = unit.num_cols * gemm_.out_bytes;
      }
      for (int p = 0; p < block.num_panels; ++p) {
        const int64_t j = unit.j_begin + p * kPanelCols;
        if (panels != nullptr) {
          block.panels[p] = panels + j / kPanelCols * shape_.panel_bytes() + PackedShape::block_begin(q);
        } else {
          Int8Matrix b = gemm_.plain(unit.b);
          b.data = b.at(q * kBlockDepth, j);
          pack_block(b, block.depth, std::min(kPanelCols, gemm_.cols - j), packed + p * kBlockBytes);
          block.panels[p] = packed + p * kBlockBytes;
        }
      }
      kernels_.multiply(block, tile);
    }
    gemm_.finish(unit, tile);
  }

  const Int8Gemm& gemm_;
  const PackedShape shape_;
  const Int8Kernels kernels_;
  const int64_t left_row_;
  int64_t rows_of_unit_ = 0, cols_of_unit_ = kTileCols;
  bool packs_panels_ = false;
  std::vector<Int8Task> tasks_;
  int64_t num_rows_ = 0;  // of tasks_
};

}  // namespace

void int8_gemm(const Int8Gemm& gemm) { Int8Driver{gemm}; }

void pack_panels(const Int8Matrix& b, PackedShape shape, char* panels) {
  const double work = 16.0 * shape.depth * shape.cols;
  run_units(ranges(shape.num_panels(), 4), work, [&](const Range& range) {
    for (int64_t q = 0; q < shape.num_blocks(); ++q) {
      for (int64_t p = range.begin; p < range.end; ++p) {
        Int8Matrix block = b;
        block.data = b.at(q * kBlockDepth, p * kPanelCols);
        pack_block(block, shape.block_depth(q), std::min(kPanelCols, shape.cols - p * kPanelCols),
                   panels + p * shape.panel_bytes() + PackedShape::block_begin(q));
      }
    }
  });
}

}  // namespace bigkern
