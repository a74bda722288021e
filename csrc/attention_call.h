// The door of the attention ops: checks their arguments and makes an AttentionProblem of them.
#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>

#include "attention.h"
#include "tensors.h"

namespace bigkern {

using OptionalTensor = std::optional<Tensor>;

inline ScalarType accumulation_type(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The arguments that the ops share, in the order of the schema.
struct AttentionOptions {
  OptionalTensor attn_mask, alibi_slopes, philox, cu_seqlens_q, cu_seqlens_k, seqlens_q, seqlens_k;
  double scale;
  bool is_causal;
  int64_t window_left, window_right;
  double softcap, dropout_p;
  int64_t max_seqlen_q, max_seqlen_k;

  bool is_packed() const { return cu_seqlens_q.has_value(); }
};

#define ATTENTION_PARAMETERS                                                                                         \
  OptionalTensor attn_mask, OptionalTensor alibi_slopes, OptionalTensor philox, OptionalTensor cu_seqlens_q,         \
      OptionalTensor cu_seqlens_k, OptionalTensor seqlens_q, OptionalTensor seqlens_k, int64_t max_seqlen_q,         \
      int64_t max_seqlen_k, double scale, bool is_causal, int64_t window_left, int64_t window_right, double softcap, \
      double dropout_p
#define ATTENTION_ARGUMENTS                                                                                           \
  AttentionOptions {                                                                                                  \
    attn_mask, alibi_slopes, philox, cu_seqlens_q, cu_seqlens_k, seqlens_q, seqlens_k, scale, is_causal, window_left, \
        window_right, softcap, dropout_p, max_seqlen_q, max_seqlen_k                                                  \
  }

// [B, H, L, E], or packed [total, H, E].
inline AnyStrided strided(const Tensor& t, bool is_packed) {
  if (is_packed) return {t.data_ptr(), 0, t.stride(1), t.stride(0), t.stride(2)};
  return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

// [B, H, L], or packed [H, total].
inline AnyStrided strided_stats(const Tensor& t, bool is_packed) {
  if (is_packed) return {t.data_ptr(), 0, t.stride(0), t.stride(1), 1};
  return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2), 1};
}

// Whether the host can read the tensors, and so check the lengths in them.
enum class Memory { kHost, kDevice };

class AttentionDoor {
 public:
  AttentionDoor(const Tensor& query, const Tensor& key, const OptionalTensor& value, const AttentionOptions& options,
                Memory memory)
      : query_(query), key_(key), options_(options), device_(device_of(query)) {
    problem.device_type = device_.type;
    problem.device_index = device_.index;
    check_inputs(value);
    read_sequences();
    if (memory == Memory::kHost) check_lengths();
    read_mask();
    read_alibi();
    read_rest();
  }

  AttentionProblem problem;

  void check_like(const char* name, const Tensor& t, const Tensor& like, const char* like_name,
                  ScalarType dtype) const {
    BK_CHECK(same_sizes(t.get(), like.get()), name, " must have the shape of ", like_name, ", ", shape(like), ", got ",
             shape(t));
    BK_CHECK(t.scalar_type() == dtype, name, " must be ", bigkern::name(dtype), ", got ",
             bigkern::name(t.scalar_type()));
    check_device(name, t);
  }

  // `t` must have the shape of the output.
  void check_out(const char* name, const Tensor& t) const {
    const int64_t last = query_.dim() - 1;
    bool fits = t.dim() == query_.dim() && t.size(last) == problem.value_dim;
    for (int64_t d = 0; fits && d < last; ++d) fits = t.size(d) == query_.size(d);
    BK_CHECK(fits, name, " must have the shape of query ", shape(query_), " with the last size ", problem.value_dim,
             ", got ", shape(t));
    BK_CHECK(t.scalar_type() == problem.dtype, name, " must be ", bigkern::name(problem.dtype), ", got ",
             bigkern::name(t.scalar_type()));
    check_device(name, t);
  }

  std::vector<int64_t> stats_sizes() const {
    if (options_.is_packed()) return {problem.heads, query_.size(0)};
    return {problem.batch, problem.heads, query_.size(2)};
  }

  Tensor empty_stats() const {
    const ScalarType dtype = accumulation_type(problem.dtype);
    if (options_.is_packed()) return empty_in_order(query_, stats_sizes(), {1, 0}, dtype);
    return empty_in_order(query_, stats_sizes(), {2, 1, 0}, dtype);
  }

  void read_stats(const Tensor& row_max, const Tensor& row_sum) {
    const std::vector<int64_t> sizes = stats_sizes();
    const ScalarType dtype = accumulation_type(problem.dtype);
    for (const auto& [name, t] : {std::pair{"row_max", &row_max}, std::pair{"row_sum", &row_sum}}) {
      bool fits = t->dim() == static_cast<int64_t>(sizes.size());
      for (size_t d = 0; fits && d < sizes.size(); ++d) fits = t->size(d) == sizes[d];
      BK_CHECK(fits, name, " must have one element for each row of query ", shape(query_), ", got ", shape(*t));
      BK_CHECK(t->scalar_type() == dtype, name, " must be ", bigkern::name(dtype), ", got ",
               bigkern::name(t->scalar_type()));
      check_device(name, *t);
    }
    problem.row_max = strided_stats(row_max, options_.is_packed());
    problem.row_sum = strided_stats(row_sum, options_.is_packed());
  }

 private:
  void check_device(const char* name, const Tensor& t) const {
    BK_CHECK(device_of(t) == device_, name, " must be on the device of query, ", bigkern::name(device_), ", got ",
             bigkern::name(device_of(t)));
  }

  void check_inputs(const OptionalTensor& value) {
    const bool is_packed = options_.is_packed();
    const ScalarType dtype = query_.scalar_type();
    BK_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
                 dtype == ScalarType::BFloat16,
             "query must be float32, float64, float16 or bfloat16, got ", bigkern::name(dtype));
    const int64_t dim = is_packed ? 3 : 4, head = 1, row = is_packed ? 0 : 2;
    const char* layout = is_packed ? "[total, heads, head_dim]" : "[batch, heads, length, head_dim]";
    const auto check = [&](const char* name, const Tensor& t) {
      BK_CHECK(t.dim() == dim, name, " must be ", layout, ", got shape ", shape(t));
      BK_CHECK(t.scalar_type() == dtype, name, " must have the dtype of query, ", bigkern::name(dtype), ", got ",
               bigkern::name(t.scalar_type()));
      check_device(name, t);
    };
    check("query", query_);
    check("key", key_);
    BK_CHECK(is_packed || key_.size(0) == query_.size(0), "key must have the batch size of query, ", query_.size(0),
             ", got shape ", shape(key_));
    BK_CHECK(key_.size(dim - 1) == query_.size(dim - 1), "key must have the head_dim of query, ", query_.size(dim - 1),
             ", got shape ", shape(key_));
    if (value) {
      check("value", *value);
      BK_CHECK(is_packed || value->size(0) == query_.size(0), "value must have the batch size of query, ",
               query_.size(0), ", got shape ", shape(*value));
      BK_CHECK(value->size(head) == key_.size(head) && value->size(row) == key_.size(row),
               "value must have as many heads and rows as key, ", shape(key_), ", got ", shape(*value));
      problem.value = strided(*value, is_packed);
      problem.value_dim = value->size(dim - 1);
    }
    problem.dtype = dtype;
    problem.heads = query_.size(head);
    problem.kv_heads = key_.size(head);
    BK_CHECK(problem.kv_heads > 0 ? problem.heads % problem.kv_heads == 0 : problem.heads == 0,
             "query must have a multiple of key's ", problem.kv_heads, " heads, got ", problem.heads);
    problem.head_dim = query_.size(dim - 1);
    problem.query = strided(query_, is_packed);
    problem.key = strided(key_, is_packed);
  }

  void read_sequences() {
    BK_CHECK(options_.cu_seqlens_q.has_value() == options_.cu_seqlens_k.has_value(),
             "cu_seqlens_q and cu_seqlens_k must be given together, got only ",
             options_.cu_seqlens_q ? "cu_seqlens_q" : "cu_seqlens_k");
    if (options_.is_packed()) {
      BK_CHECK(!options_.seqlens_q && !options_.seqlens_k,
               "seqlens are for the padded layout, cu_seqlens for the packed one: give one of them, got both");
      BK_CHECK(options_.cu_seqlens_q->dim() == 1 && options_.cu_seqlens_q->size(0) > 0,
               "cu_seqlens_q must have shape [batch + 1], got ", shape(*options_.cu_seqlens_q));
      problem.batch = options_.cu_seqlens_q->size(0) - 1;
      problem.cu_seqlens_q = lengths("cu_seqlens_q", options_.cu_seqlens_q, problem.batch + 1);
      problem.cu_seqlens_k = lengths("cu_seqlens_k", options_.cu_seqlens_k, problem.batch + 1);
      problem.q_rows = query_.size(0);
      problem.k_rows = key_.size(0);
      problem.max_q_len = options_.max_seqlen_q;
      problem.max_k_len = options_.max_seqlen_k;
    } else {
      problem.batch = query_.size(0);
      problem.max_q_len = problem.q_rows = query_.size(2);
      problem.max_k_len = problem.k_rows = key_.size(2);
      if (options_.seqlens_q) problem.seqlens_q = lengths("seqlens_q", options_.seqlens_q, problem.batch);
      if (options_.seqlens_k) problem.seqlens_k = lengths("seqlens_k", options_.seqlens_k, problem.batch);
    }
  }

  const int32_t* lengths(const char* name, const OptionalTensor& t, int64_t n) const {
    BK_CHECK(t->dim() == 1 && t->size(0) == n, name, " must have shape [", n, "], got ", shape(*t));
    BK_CHECK(t->scalar_type() == ScalarType::Int, name, " must be torch.int32, got ", bigkern::name(t->scalar_type()));
    BK_CHECK(n < 2 || t->stride(0) == 1, name, " must be contiguous, got a stride of ", t->stride(0));
    check_device(name, *t);
    return static_cast<const int32_t*>(t->data_ptr());
  }

  void check_lengths() {
    if (options_.is_packed()) {
      check_cumulative("cu_seqlens_q", problem.cu_seqlens_q, query_.size(0));
      check_cumulative("cu_seqlens_k", problem.cu_seqlens_k, key_.size(0));
    }
    check_bounded("seqlens_q", problem.seqlens_q, problem.q_rows);
    check_bounded("seqlens_k", problem.seqlens_k, problem.k_rows);
    problem.max_q_len = problem.max_k_len = 0;
    for (int64_t b = 0; b < problem.batch; ++b) {
      const AttentionSequence s = problem.sequence(b);
      problem.max_q_len = std::max(problem.max_q_len, s.q_len);
      problem.max_k_len = std::max(problem.max_k_len, s.k_len);
    }
  }

  void check_cumulative(const char* name, const int32_t* starts, int64_t total) const {
    BK_CHECK(starts[0] == 0, name, " must start with 0, got ", starts[0]);
    for (int64_t b = 0; b < problem.batch; ++b) {
      BK_CHECK(starts[b] <= starts[b + 1], name, " must not decrease, got ", starts[b], " before ", starts[b + 1]);
    }
    BK_CHECK(starts[problem.batch] == total, name, " must end with the number of rows, ", total, ", got ",
             starts[problem.batch]);
  }

  void check_bounded(const char* name, const int32_t* values, int64_t most) const {
    for (int64_t b = 0; values != nullptr && b < problem.batch; ++b) {
      BK_CHECK(0 <= values[b] && values[b] <= most, name, " must be from 0 to ", most, ", got ", values[b],
               " for entry ", b);
    }
  }

  void read_mask() {
    if (!options_.attn_mask) return;
    const Tensor& mask = *options_.attn_mask;
    BK_CHECK(!options_.is_packed(), "attn_mask can't be given with cu_seqlens");
    const int64_t sizes[] = {problem.batch, problem.heads, query_.size(2), key_.size(2)};
    bool fits = mask.dim() == 4;
    for (int64_t d = 0; fits && d < 4; ++d) fits = mask.size(d) == 1 || mask.size(d) == sizes[d];
    BK_CHECK(fits, "attn_mask must be broadcastable to [", sizes[0], ", ", sizes[1], ", ", sizes[2], ", ", sizes[3],
             "] with 4 dimensions, got shape ", shape(mask));
    const ScalarType dtype = mask.scalar_type();
    BK_CHECK(dtype == ScalarType::Bool || dtype == ScalarType::Float || dtype == problem.dtype,
             "attn_mask must be bool, float32 or of the dtype of query, ", bigkern::name(problem.dtype), ", got ",
             bigkern::name(dtype));
    check_device("attn_mask", mask);
    const auto stride = [&](int64_t d) { return mask.size(d) == 1 ? 0 : mask.stride(d); };
    problem.mask = {mask.data_ptr(), stride(0), stride(1), stride(2), stride(3)};
    problem.mask_dtype = dtype;
    problem.mask_batch = mask.size(0);
    problem.mask_heads = mask.size(1);
    problem.mask_rows = mask.size(2);
    problem.mask_cols = mask.size(3);
  }

  void read_alibi() {
    if (!options_.alibi_slopes) return;
    const Tensor& slopes = *options_.alibi_slopes;
    const int64_t dim = slopes.dim();
    BK_CHECK((dim == 1 && slopes.size(0) == problem.heads) ||
                 (dim == 2 && slopes.size(0) == problem.batch && slopes.size(1) == problem.heads),
             "alibi_slopes must have shape [", problem.heads, "] or [", problem.batch, ", ", problem.heads, "], got ",
             shape(slopes));
    BK_CHECK(slopes.scalar_type() == ScalarType::Float, "alibi_slopes must be torch.float32, got ",
             bigkern::name(slopes.scalar_type()));
    check_device("alibi_slopes", slopes);
    problem.alibi_slopes = {static_cast<const float*>(slopes.data_ptr()), dim == 2 ? slopes.stride(0) : 0,
                            slopes.stride(dim - 1), 0, 0};
  }

  void read_rest() {
    BK_CHECK(std::isfinite(options_.scale), "scale must be finite, got ", options_.scale);
    BK_CHECK(options_.softcap >= 0 && std::isfinite(options_.softcap), "softcap must be 0 (none) or positive, got ",
             options_.softcap);
    BK_CHECK(options_.window_left >= -1 && options_.window_right >= -1,
             "window must be two numbers from 0 on, or -1 for unbounded, got (", options_.window_left, ", ",
             options_.window_right, ")");
    BK_CHECK(0 <= options_.dropout_p && options_.dropout_p <= 1, "dropout_p must be from 0 to 1, got ",
             options_.dropout_p);
    problem.scale = options_.scale;
    problem.softcap = options_.softcap;
    problem.is_causal = options_.is_causal;
    problem.window_left = options_.window_left;
    problem.window_right = options_.window_right;
    if (options_.dropout_p == 0) return;
    BK_CHECK(options_.philox.has_value(), "philox must be given for dropout_p ", options_.dropout_p);
    const Tensor& philox = *options_.philox;
    BK_CHECK(philox.dim() == 1 && philox.size(0) == 2 && philox.scalar_type() == ScalarType::Long,
             "philox must be (seed, offset), torch.int64 of shape [2], got ", bigkern::name(philox.scalar_type()),
             " of shape ", shape(philox));
    check_device("philox", philox);
    constexpr int64_t kSteps = 1 << 16;
    problem.dropout_threshold = static_cast<uint32_t>(std::floor(options_.dropout_p * kSteps + 0.5));
    const int64_t kept = kSteps - problem.dropout_threshold;
    problem.keep_scale = kept == 0 ? 0.0 : static_cast<double>(kSteps) / kept;
    problem.philox = static_cast<const int64_t*>(philox.data_ptr());
    problem.philox_stride = philox.stride(0);
  }

  const Tensor& query_;
  const Tensor& key_;
  const AttentionOptions& options_;
  Device device_;
};

}  // namespace bigkern
