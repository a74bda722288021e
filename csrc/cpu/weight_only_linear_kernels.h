// weight_only_linear, for one instruction set; included by each_isa.h.

// Y [M, N columns], M rows of x from i on. Weights are widened as they are read, each once for the M rows; grouped
// scales are multiplied in there, those of whole rows at the end.
template <class V, class T, bool kGrouped, int M, int N>
BK_TARGET void weight_only_micro(const WeightOnlyProblem& problem, int64_t i, int64_t j) {
  using Reg = typename V::Reg;
  const int64_t depth = problem.depth;
  const float* x[M];
  const int8_t* weight[N];
  const float* scale[N];
#pragma GCC unroll 4
  for (int r = 0; r < M; ++r) x[r] = problem.x + (i + r) * depth;
#pragma GCC unroll 4
  for (int c = 0; c < N; ++c) {
    weight[c] = problem.weight + (j + c) * depth;
    scale[c] = problem.weight_scale + (j + c) * problem.num_groups;
  }
  // Several sums even where a register is one number: rounding errors grow with the length of a sum.
  constexpr int kParts = V::kWidth == 1 ? 8 : 1, kStep = kParts * V::kWidth;
  Reg sum[M][N][kParts];
  float rest[M][N][kStep] = {};  // of what doesn't fill the registers
#pragma GCC unroll 4
  for (int r = 0; r < M; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < N; ++c) {
      for (int p = 0; p < kParts; ++p) sum[r][c][p] = V::set(0);
    }
  }
  for (int64_t g = 0; g < problem.num_groups; ++g) {
    const int64_t end = std::min(depth, (g + 1) * problem.group_size);
    int64_t k = g * problem.group_size;
    Reg s[N];
#pragma GCC unroll 4
    for (int c = 0; c < N; ++c) s[c] = V::set(kGrouped ? scale[c][g] : 1);
    for (; k + kStep <= end; k += kStep) {
#pragma GCC unroll 8
      for (int p = 0; p < kParts; ++p) {
        const int64_t at = k + p * V::kWidth;
#pragma GCC unroll 4
        for (int c = 0; c < N; ++c) {
          Reg w = load_int<V>(weight[c] + at);
          if constexpr (kGrouped) w = V::mul(w, s[c]);
#pragma GCC unroll 4
          for (int r = 0; r < M; ++r) sum[r][c][p] = V::fma(V::load(x[r] + at), w, sum[r][c][p]);
        }
      }
    }
    for (; k < end; ++k) {
      for (int c = 0; c < N; ++c) {
        const float w = kGrouped ? weight[c][k] * scale[c][g] : weight[c][k];
        for (int r = 0; r < M; ++r) rest[r][c][k % kStep] += x[r][k] * w;
      }
    }
  }
  T* out = static_cast<T*>(problem.out);
  for (int r = 0; r < M; ++r) {
    for (int c = 0; c < N; ++c) {
      float y = 0;
      for (int p = 0; p < kParts; ++p) y += V::sum(V::add(sum[r][c][p], V::load(rest[r][c] + p * V::kWidth)));
      if constexpr (!kGrouped) y *= scale[c][0];
      if (problem.bias != nullptr) y += problem.bias[j + c];
      out[(i + r) * problem.cols + j + c] = static_cast<T>(y);
    }
  }
}

template <class V, class T, bool kGrouped, int M>
BK_TARGET void weight_only_rows(const WeightOnlyProblem& problem, int64_t i, int64_t j, int64_t j_end) {
  constexpr int N = M > 2 ? 2 : 4;  // 8 sums suffice to hide the latency of additions
  for (; j + N <= j_end; j += N) weight_only_micro<V, T, kGrouped, M, N>(problem, i, j);
  for (; j < j_end; ++j) weight_only_micro<V, T, kGrouped, M, 1>(problem, i, j);
}

template <class V, class T, bool kGrouped>
BK_TARGET void weight_only_unit(const WeightOnlyProblem& problem, int64_t j_begin, int64_t j_end) {
  int64_t i = 0;
  for (; i + 4 <= problem.rows; i += 4) weight_only_rows<V, T, kGrouped, 4>(problem, i, j_begin, j_end);
  switch (problem.rows - i) {
    case 3: return weight_only_rows<V, T, kGrouped, 3>(problem, i, j_begin, j_end);
    case 2: return weight_only_rows<V, T, kGrouped, 2>(problem, i, j_begin, j_end);
    case 1: return weight_only_rows<V, T, kGrouped, 1>(problem, i, j_begin, j_end);
  }
}

template <bool kGrouped>
WeightOnlyUnit weight_only_unit_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half: return &weight_only_unit<Float, Half, kGrouped>;
    case ScalarType::BFloat16: return &weight_only_unit<Float, BFloat16, kGrouped>;
    default: return &weight_only_unit<Float, float, kGrouped>;
  }
}

inline WeightOnlyUnit weight_only_unit_of(ScalarType dtype, bool is_grouped) {
  return is_grouped ? weight_only_unit_of<true>(dtype) : weight_only_unit_of<false>(dtype);
}
