// weight_only_linear, for one instruction set; included by each_isa.h.

template <class V>
BK_TARGET void weight_only_unit(const WeightOnlyProblem& problem, int64_t j_begin, int64_t j_end) {
  for (int64_t j = j_begin; j < j_end; ++j) {
    const int8_t* weight = problem.weight + j * problem.depth;
    const float* scales = problem.weight_scale + j * problem.num_groups;
    for (int64_t i = 0; i < problem.rows; ++i) {
      const float* x = problem.x + i * problem.depth;
      float sum = 0;
      for (int64_t g = 0; g < problem.num_groups; ++g) {
        float part = 0;
        const int64_t end = std::min(problem.depth, (g + 1) * problem.group_size);
        for (int64_t k = g * problem.group_size; k < end; ++k) part += x[k] * weight[k];
        sum += part * scales[g];
      }
      problem.out[i * problem.cols + j] = sum + (problem.bias == nullptr ? 0 : problem.bias[j]);
    }
  }
}
