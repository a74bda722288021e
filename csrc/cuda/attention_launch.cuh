// What the launches of the attention kernels share, on the host.
#pragma once

#include <cstdint>

#include "../attention.h"
#include "../tensors.h"
#include "launch.cuh"

namespace bigkern {

constexpr int64_t kMostFeatures = 256;

inline Device device_of(const AttentionProblem& p) { return {p.device_type, p.device_index}; }

inline void check_supported(const AttentionProblem& p) {
  BK_CHECK(p.dtype != ScalarType::Double, "query must be float32, float16 or bfloat16 on a GPU, got torch.float64");
  BK_CHECK(p.head_dim <= kMostFeatures && p.value_dim <= kMostFeatures, "query and value must have at most ",
           kMostFeatures, " features on a GPU, got ", p.head_dim, " and ", p.value_dim);
}

// Whether rows of `cols` elements are whole vectors of 16 bytes, at multiples of them.
inline bool is_vectorized(const AttentionProblem& p, const AnyStrided& t, int64_t cols) {
  const int64_t chunk = p.dtype == ScalarType::Float ? 4 : 8;
  const auto fits = [&](int64_t n) { return n % chunk == 0; };
  return t.col == 1 && fits(cols) && fits(t.row) && fits(t.head) && fits(t.batch) &&
         reinterpret_cast<uintptr_t>(t.data) % 16 == 0;
}

// Whether scores are scaled products of the keys that causality and window select, by a positive scale.
inline bool is_plain(const AttentionProblem& p) {
  return p.scale > 0 && p.softcap == 0 && p.mask.data == nullptr && p.alibi_slopes.data == nullptr &&
         p.dropout_threshold == 0;
}

}  // namespace bigkern

// Runs a lambda with the dtype of the tensors as the type T_NAME.
#define ATTENTION_DTYPE_SWITCH(PROBLEM, T_NAME, ...)                                                \
  [&] {                                                                                             \
    const auto with_dtype_ = [&](auto example) {                                                    \
      using T_NAME = decltype(example);                                                             \
      return (__VA_ARGS__)();                                                                       \
    };                                                                                              \
    if ((PROBLEM).dtype == ScalarType::Half) return with_dtype_(torch::headeronly::Half{});         \
    if ((PROBLEM).dtype == ScalarType::BFloat16) return with_dtype_(torch::headeronly::BFloat16{}); \
    return with_dtype_(float{});                                                                    \
  }()

// And with the features of a tile as the constant DIM_NAME.
#define ATTENTION_SWITCH(PROBLEM, T_NAME, DIM_NAME, ...)                         \
  ATTENTION_DTYPE_SWITCH(PROBLEM, T_NAME, [&] {                                  \
    const int64_t features_ = std::max((PROBLEM).head_dim, (PROBLEM).value_dim); \
    const auto with_dim_ = [&](auto dim_) {                                      \
      constexpr int DIM_NAME = decltype(dim_)::value;                            \
      return (__VA_ARGS__)();                                                    \
    };                                                                           \
    if (features_ <= 64) return with_dim_(std::integral_constant<int, 64>{});    \
    if (features_ <= 128) return with_dim_(std::integral_constant<int, 128>{});  \
    return with_dim_(std::integral_constant<int, 256>{});                        \
  })
