// How attention is cut into units of work, which threads take one after another.
#pragma once

#include "../attention.h"
#include "isa.h"
#include "rounding.h"
#include "units.h"

namespace bigkern {

// Rows of queries and of keys of a tile. A tile of float32 scores and what it is made of fit the L2 cache; its rows are
// an odd number of cache lines apart, so that a column uses all sets of the L1 cache.
constexpr int64_t kMinBlockQ = 96, kMaxBlockQ = 768, kBackwardBlockQ = 96, kBlockKV = 128;
constexpr int64_t kScoresRow = kBlockKV + 16;

// Calls FUNCTION<type of the mask's elements> ARGUMENTS. Not with a lambda, which must not be in a target function.
#define BK_MASK_SWITCH(DTYPE, FUNCTION, ARGUMENTS)                  \
  switch (DTYPE) {                                                  \
    case ScalarType::Bool: FUNCTION<bool> ARGUMENTS; break;         \
    case ScalarType::Double: FUNCTION<double> ARGUMENTS; break;     \
    case ScalarType::Half: FUNCTION<Half> ARGUMENTS; break;         \
    case ScalarType::BFloat16: FUNCTION<BFloat16> ARGUMENTS; break; \
    default: FUNCTION<float> ARGUMENTS;                             \
  }

// Whether the products can be those of pairs of bfloat16.
inline bool has_pairs(const AttentionProblem& problem) {
  if (isa() != Isa::kAvx512Bf16 || problem.dtype != ScalarType::BFloat16) return false;
  if (problem.head_dim % 2 != 0 || problem.value_dim % 2 != 0) return false;
  for (const AnyStrided* t : {&problem.query, &problem.key, &problem.value}) {
    if (t->col != 1 || t->row % 2 != 0) return false;
  }
  return true;
}

// What the splits of the keys leave for each query: sums relative to their own largest score.
struct AttentionPartials {
  AnyStrided out, row_max, row_sum;  // over (split * batch + b, head, query, ...)
  int64_t num_splits, batch;

  int64_t entry(int64_t split, int64_t b) const { return split * batch + b; }
};

// Queries of one batch entry, of heads that share their keys, against a range of keys.
struct AttentionForwardUnit {
  int64_t b, h_begin, num_heads, i_begin, num_rows, j_begin, j_end, split;
  const AttentionPartials* partials;  // nullptr: the keys aren't split
};

// Queries [i_begin, i_end) of heads that share their keys, against the keys [j_begin, j_end). It sums up the gradients
// of the queries if it has all of their keys, and those of the keys if it has all of their queries.
struct AttentionBackwardUnit {
  int64_t b, h_begin, num_heads, i_begin, i_end, j_begin, j_end;
  bool owns_queries, owns_keys;
  void* grad_query = nullptr;  // where to sum up, in the accumulation's type
};

// The elements of the mask's gradient that one unit sums up: those at the beginning of a range that is shared.
struct AttentionMaskUnit {
  ColumnRange b, h, i, j;
};

// The weights of queries [i_begin, i_begin + num_rows) to all keys: of one head, or the mean over several.
struct AttentionWeightsUnit {
  int64_t b, h_begin, num_heads, i_begin, num_rows;
};

// The multiplications of one product of queries and keys with all others.
inline double work_of(const AttentionProblem& problem) {
  double pairs = 0;
  for (int64_t b = 0; b < problem.batch; ++b) {
    const AttentionSequence s = problem.sequence(b);
    pairs += static_cast<double>(s.q_len) * s.k_len;
  }
  return pairs * problem.heads * (problem.head_dim + problem.value_dim);
}

}  // namespace bigkern
