// attention on the CPU: the forward.
#include "../attention_ops.h"
#include "../philox.h"
#include "attention_units.h"
#include "workspace.h"

namespace bigkern {

struct AttentionForwardKernels {
  void (*run)(const AttentionProblem&, const AttentionForwardUnit&);
  void (*combine)(const AttentionProblem&, const AttentionPartials&, int64_t b, int64_t h, int64_t i);
};

}  // namespace bigkern

#define BK_KERNELS "attention_fwd_kernels.h"
#include "each_isa.h"

namespace bigkern {

namespace {

// Keys are split only where there are few queries: then more units than threads are needed to share the work, if that
// is worth it. How many doesn't depend on the threads, so that the result doesn't either.
constexpr int64_t kRowsOfMicro = scalar::kGemmRows;  // of every instruction set
constexpr int64_t kFewRows = 384, kUnitsWanted = 64, kLeastKeys = 512;
constexpr double kLeastWork = kWorkPerThread / 4;
constexpr int64_t kTileElements = 128 << 10;  // of queries and of their results: half a cache of 1 MiB
constexpr int64_t kTilesPerThread = 4;

int64_t num_splits(const AttentionProblem& problem) {
  const int64_t num_tiles = problem.batch * problem.kv_heads;
  if (num_tiles == 0 || problem.max_q_len * problem.group() > kFewRows) return 1;
  const int64_t units = std::min<double>(kUnitsWanted, work_of(problem) / kLeastWork);
  const int64_t most = ceil_div(problem.max_k_len, kLeastKeys);
  return std::clamp<int64_t>(units / num_tiles, 1, std::max<int64_t>(most, 1));
}

// The larger a tile, the less often the keys are packed. The results don't depend on it.
int64_t max_block_q(const AttentionProblem& problem) {
  const int64_t fitting = kTileElements / std::max<int64_t>(problem.head_dim + problem.value_dim, 1);
  const int64_t all = problem.batch * problem.heads * problem.max_q_len;
  const int64_t rows = std::min(fitting, all / (kTilesPerThread * torch::stable::get_num_threads()));
  return std::clamp(rows / kRowsOfMicro * kRowsOfMicro, kMinBlockQ, kMaxBlockQ);
}

// Tiles of queries: of one head, or where it has few queries, of all the heads that share their keys.
std::vector<AttentionForwardUnit> tiles_of(const AttentionProblem& problem) {
  std::vector<AttentionForwardUnit> tiles;
  const int64_t most_rows = max_block_q(problem);
  for (int64_t b = 0; b < problem.batch; ++b) {
    const int64_t length = problem.sequence(b).q_len;
    if (length == 0) continue;
    const int64_t rows = std::min(length, round_up(ceil_div(length, ceil_div(length, most_rows)), kRowsOfMicro));
    const int64_t heads_at_once = std::min(problem.group(), most_rows / rows);
    const int64_t num_tiles = ceil_div(length, rows);
    for (int64_t kv_head = 0; kv_head < problem.kv_heads; ++kv_head) {
      for (int64_t g = 0; g < problem.group(); g += heads_at_once) {
        // From the last on, which has the most keys under a causal mask.
        for (int64_t tile = num_tiles - 1; tile >= 0; --tile) {
          tiles.push_back({b, kv_head * problem.group() + g, std::min(heads_at_once, problem.group() - g), tile * rows,
                           std::min(rows, length - tile * rows), 0, problem.sequence(b).k_len, 0, nullptr});
        }
      }
    }
  }
  return tiles;
}

void attention_forward(const AttentionProblem& problem) {
  const AttentionForwardKernels kernels =
      select(scalar::forward_kernels_of<scalar::Float>, avx2::forward_kernels_of<avx2::Float>,
             avx512::forward_kernels_of<avx512::Float>)(problem);
  std::vector<AttentionForwardUnit> units = tiles_of(problem);
  const double work = work_of(problem);
  const int64_t splits = num_splits(problem);
  if (splits == 1) return run_units(units, work, [&](const AttentionForwardUnit& unit) { kernels.run(problem, unit); });

  const ScalarType accumulated = accumulation_type(problem.dtype);
  const int64_t rows = splits * problem.batch * problem.heads * problem.max_q_len;
  const int64_t value_row = round_up(problem.value_dim, 16);
  const Tensor out = torch::stable::empty({rows, value_row}, accumulated);
  const Tensor row_max = torch::stable::empty({rows}, accumulated), row_sum = torch::stable::empty({rows}, accumulated);
  const int64_t head = problem.max_q_len, batch = problem.heads * head;
  const AttentionPartials partials{{out.data_ptr(), batch * value_row, head * value_row, value_row, 1},
                                   {row_max.data_ptr(), batch, head, 1},
                                   {row_sum.data_ptr(), batch, head, 1},
                                   splits,
                                   problem.batch};
  std::vector<AttentionForwardUnit> parts;
  for (const AttentionForwardUnit& unit : units) {
    const int64_t step = round_up(ceil_div(unit.j_end, splits), kBlockKV);
    for (int64_t split = 0; split < splits; ++split) {
      AttentionForwardUnit part = unit;
      part.j_begin = std::min(split * step, unit.j_end);
      part.j_end = std::min(part.j_begin + step, unit.j_end);
      part.split = split;
      part.partials = &partials;
      parts.push_back(part);
    }
  }
  run_units(parts, work, [&](const AttentionForwardUnit& part) { kernels.run(problem, part); });
  const double combining = static_cast<double>(rows) * value_row;
  run_units(units, combining, [&](const AttentionForwardUnit& unit) {
    for (int64_t h = unit.h_begin; h < unit.h_begin + unit.num_heads; ++h) {
      for (int64_t i = unit.i_begin; i < unit.i_begin + unit.num_rows; ++i) {
        kernels.combine(problem, partials, unit.b, h, i);
      }
    }
  });
}

}  // namespace

}  // namespace bigkern

STABLE_TORCH_LIBRARY_IMPL(bigkern, CPU, m) {
  using namespace bigkern;
  m.impl("attention", TORCH_BOX((&attention_op<Memory::kHost, attention_forward>)));
}
