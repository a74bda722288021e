// attention on a GPU: the forward, of Dao 2023 (FlashAttention-2, algorithm 1).
#include "../attention_ops.h"
#include "attention_launch.cuh"
#include "attention_softmax.cuh"
#include "scratch.cuh"

namespace bigkern {

namespace {

// Of kDim features. A warp has 16 row_tiles queries, which share what it loads of keys and values; with features that
// need registers fewer. feature_warps warps hold the same queries, and of the output a part of the features each, which
// would be too much for one. A lane has 192 registers for scores and output, at most, and a block 64 kB of shared
// memory: two blocks fit each multiprocessor of every card that has 164 kB.
struct AttentionTiles {
  int row_tiles, row_warps, feature_warps, block_kv;

  constexpr int warps() const { return row_warps * feature_warps; }
};
template <class T, int kDim>
constexpr AttentionTiles tiles_of(bool is_plain) {
  if (sizeof(T) == 2) {
    switch (kDim) {
      case 64: return is_plain ? AttentionTiles{2, 4, 1, 128} : AttentionTiles{1, 4, 1, 64};
      case 128: return is_plain ? AttentionTiles{2, 4, 1, 48} : AttentionTiles{1, 4, 1, 32};
      default: return {1, 4, 1, 32};
    }
  }
  switch (kDim) {
    case 64: return {1, 4, 1, 32};
    case 128: return {1, 4, 1, 16};
    default: return {1, 2, 2, 16};
  }
}

constexpr int kFewQueries = 64;

// What the launch adds to the problem.
struct AttentionLaunch {
  int num_tiles, num_head_groups, heads_at_once;
  bool vectorized;  // query, key and value, as copy_rows says
  bool is_plain;
  float scale;  // of products, if plain, in base 2
  // Where the keys are split: what each part leaves, over (split, row) with rows [batch, heads, max_q_len].
  int num_splits;
  float *out, *row_max, *row_sum;  // [num_splits, rows, value_dim], [num_splits, rows]
};

// What a block computes. The last tiles, which have the most keys under a causal mask, come first.
struct AttentionPlace {
  int tile, split, b, h;  // h: the first head

  __device__ AttentionPlace(const AttentionLaunch& launch, int block) {
    tile = launch.num_tiles - 1 - block % launch.num_tiles;
    block /= launch.num_tiles;
    split = block % launch.num_splits;
    block /= launch.num_splits;
    b = block / launch.num_head_groups;
    h = block % launch.num_head_groups * launch.heads_at_once;
  }
};

// kPlain, the fast path: scores are scaled products of keys that causality and window select, scale is positive, there
// are more than kFewQueries, and tensors are vectorized.
template <class T, int kDim, bool kPlain>
__global__ void __launch_bounds__(32 * tiles_of<T, kDim>(kPlain).warps(), 2)
    attention_kernel(const __grid_constant__ AttentionProblem p, const __grid_constant__ AttentionLaunch launch) {
  constexpr AttentionTiles kTiles = tiles_of<T, kDim>(kPlain);
  constexpr int kRowTiles = kTiles.row_tiles, BLOCK_KV = kTiles.block_kv, kWarpRows = 16 * kRowTiles;
  constexpr int kFeatures = kDim / kTiles.feature_warps, kN = BLOCK_KV / 8, kD = kFeatures / 8;
  constexpr int kDimSteps = kDim / kStep<T>;
  constexpr bool kQueryInRegisters = kRowTiles == 1 && kDimSteps <= 8;
  using Tile = SharedTile<T, kDim>;
  const int num_threads = kPlain ? 32 * kTiles.warps() : blockDim.x;
  const int block_q = num_threads / 32 / kTiles.feature_warps * kWarpRows;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_row = warp / kTiles.feature_warps * kWarpRows;  // of the warp, in the tile
  const int first_feature = warp % kTiles.feature_warps * kFeatures;

  // Row r of the block is query r % q_len of head r / q_len of those that are computed at once.
  const AttentionPlace at(launch, blockIdx.x);
  const AttentionHead<T> head(p, at.b, at.h);
  const int heads_at_once = kPlain ? 1 : launch.heads_at_once;
  const auto row_of = [&](const AttentionPlace& at, int r) {
    const AttentionSequence sequence = p.sequence(at.b);
    const int q_len = sequence.q_len, i = at.tile * block_q + r;
    if (i >= heads_at_once * q_len) return AttentionRow();
    return AttentionRow(p, sequence, at.b, kPlain ? at.h : at.h + i / q_len, kPlain ? i : i % q_len);
  };
  const int q_len = head.sequence.q_len, num_rows = min(block_q, heads_at_once * q_len - at.tile * block_q);
  const bool vectorized = kPlain || launch.vectorized;
  if (num_rows <= 0) return;
  const auto head_of = [&](int r) { return kPlain ? at.h : at.h + (at.tile * block_q + r) / q_len; };
  const auto query_of = [&](int r) { return kPlain ? at.tile * block_q + r : (at.tile * block_q + r) % q_len; };

  // The keys that some row meets, those that every row meets; this split's of them.
  const bool is_one_head = head_of(0) == head_of(num_rows - 1);
  const ColumnRange first = p.keys_of(head.sequence, is_one_head ? query_of(0) : 0);
  const ColumnRange last = p.keys_of(head.sequence, is_one_head ? query_of(num_rows - 1) : q_len - 1);
  const int whole_begin = last.begin, whole_end = first.end;
  int begin = static_cast<int>(first.begin) / BLOCK_KV * BLOCK_KV, end = last.end;
  if (launch.num_splits > 1) {
    const int keys = ceil_div<int>(ceil_div<int>(head.sequence.k_len, launch.num_splits), BLOCK_KV) * BLOCK_KV;
    begin = max(begin, at.split * keys);
    end = min(end, (at.split + 1) * keys);
  }

  extern __shared__ __align__(128) unsigned char smem[];
  const Tile q_smem{reinterpret_cast<T*>(smem)};                                           // [block_q, kDim]
  const Tile k_smem{q_smem.data + block_q * kDim}, v_smem{k_smem.data + BLOCK_KV * kDim};  // [BLOCK_KV, kDim]
  const T* const any = static_cast<const T*>(p.query.data);

  copy_rows(
      q_smem, block_q, [&](int r) { return r < num_rows ? head.query_row(p.query, head_of(r), query_of(r)) : nullptr; },
      p.head_dim, p.query.col, vectorized, any);
  const T *const keys = head.key_row(p.key, 0), *const values = head.key_row(p.value, 0);
  const auto copy_tile = [&](Tile tile, const T* rows, const AnyStrided& tensor, int cols, int j) {
    if (j < end) {
      copy_strided_rows<BLOCK_KV>(tile, rows + j * tensor.row, tensor.row, end - j, cols, tensor.col, vectorized,
                                  num_threads);
    }
    commit_copies();
  };
  copy_tile(k_smem, keys, p.key, p.head_dim, begin);

  AttentionRow rows[kRowTiles][2];
  if (!kPlain) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      for (int half = 0; half < 2; ++half) rows[m][half] = row_of(at, first_row + m * 16 + half * 8 + lane / 4);
    }
  }
  // The fast path has no register to spare: it makes them, and the place, again where it needs them, which is seldom.
  const auto place = [&] { return kPlain ? AttentionPlace(launch, opaque(static_cast<int>(blockIdx.x))) : at; };
  const auto row = [&](int m, int half) {
    return kPlain ? row_of(place(), first_row + m * 16 + half * 8 + lane / 4) : rows[m][half];
  };

  const AttentionScores score(p);
  OnlineSoftmax<kRowTiles> softmax;
  float out[kRowTiles][kD][4] = {};
  uint32_t q_reg[kRowTiles][kQueryInRegisters ? kDimSteps : 1][4];
  const LeftRows<T, kDim> q_rows{q_smem, first_row};
  const auto queries = [&](int m, int k) {
    if constexpr (kQueryInRegisters) {
      return to_fragment<T>(q_reg[m][k]);
    } else {
      return q_rows(m, k);
    }
  };

  for (int j = begin; j < end; j += BLOCK_KV) {
    // The keys have come, and all warps are done with the values before, whose place those of these keys take.
    wait_for_copies<0>();
    __syncthreads();
    copy_tile(v_smem, values, p.value, p.value_dim, j);
    if (kQueryInRegisters && j == begin) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int k = 0; k < kDimSteps; ++k) load_left(q_reg[m][k], q_smem, first_row + m * 16, k);
      }
    }

    // S = Q @ K^T  [kWarpRows, BLOCK_KV]
    float s[kRowTiles][kN][4] = {};
#pragma unroll(kQueryInRegisters ? kDimSteps : 4)
    for (int k = 0; k < kDimSteps; ++k) add_step_t(s, queries, k_smem, 0, k);

    // The values have come, and all warps are done with the keys.
    wait_for_copies<0>();
    __syncthreads();
    copy_tile(k_smem, keys, p.key, p.head_dim, j + BLOCK_KV);

    // P = exp(S - row_max)
    if (!kPlain || j < whole_begin || j + BLOCK_KV > whole_end) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const AttentionRow r = row(m, half);
#pragma unroll
          for (int n = 0; n < kN; ++n) {
#pragma unroll
            for (int c = 2 * half; c < 2 * half + 2; ++c) {
              const int key = j + 8 * n + lane % 4 * 2 + c % 2;
              if (kPlain || launch.is_plain) {
                if constexpr (!kPlain) s[m][n][c] *= score.scale;
                if (key < r.key_begin || key >= r.key_end) s[m][n][c] = -INFINITY;
              } else {
                s[m][n][c] = score(r, key, s[m][n][c]);
              }
            }
          }
        }
      }
    }
    softmax.template step<kPlain>(s, out, kPlain ? launch.scale : kLog2E);
    if (!kPlain && p.dropout_threshold > 0) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int n = 0; n < kN; n += 4) {
            const DropoutWords words(p, at.b, row(m, half), j + 8 * n);
#pragma unroll
            for (int i = n; i < (n + 4 < kN ? n + 4 : kN); ++i) {
#pragma unroll
              for (int second = 0; second < 2; ++second) {
                const bool keeps = words.keeps((j / 8 + i) % 4, second, p.dropout_threshold);
                if (!keeps) s[m][i][2 * half + second] = 0.f;
              }
            }
          }
        }
      }
    }

    // O += P @ V  [kWarpRows, kFeatures]
    add_product(out, s, v_smem, 0, first_feature);
  }
  wait_for_copies<0>();  // of the queries, if there were no keys: none may come after this

  // O / row_sum, or as it is for the splits to be combined.
  const AttentionPlace out_at = place();
  const AttentionHead<T> out_head(p, out_at.b, out_at.h);
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = reduce_row(softmax.row_sum[m][half], [](float x, float y) { return x + y; });
      const float largest = softmax.row_max[m][half] * (kPlain ? static_cast<float>(p.scale) : 1.f);
      const AttentionRow r = row(m, half);
      const int query = r.query, h = r.head, first_col = first_feature + lane % 4 * 2;
      if (query < 0) continue;
      if (launch.num_splits > 1) {
        const int64_t i = ((out_at.split * p.batch + out_at.b) * p.heads + h) * p.max_q_len + query;
        if (lane % 4 == 0 && first_feature == 0) launch.row_max[i] = largest, launch.row_sum[i] = sum;
        const RowOfPairs<float> to(launch.out + i * p.value_dim, 1, p.value_dim);
#pragma unroll
        for (int d = 0; d < kD; ++d) to.put(first_col + 8 * d, out[m][d][2 * half], out[m][d][2 * half + 1]);
        continue;
      }
      if (lane % 4 == 0 && first_feature == 0) {
        out_head.stat(p.row_max, h, query) = largest, out_head.stat(p.row_sum, h, query) = sum;
      }
      const float factor = sum == 0.f ? 0.f : static_cast<float>(p.keep_scale) / sum;
      const RowOfPairs<T> to(out_head.query_row(p.out, h, query), p.out.col, p.value_dim);
#pragma unroll
      for (int d = 0; d < kD; ++d) {
        to.put(first_col + 8 * d, out[m][d][2 * half] * factor, out[m][d][2 * half + 1] * factor);
      }
    }
  }
}

// out = sum over splits of exp(row_max - largest) O / sum of the same row_sum. A warp a query.
template <class T>
__global__ void __launch_bounds__(32 * kQueryWarps)
    combine_kernel(const __grid_constant__ AttentionProblem p, const __grid_constant__ AttentionLaunch launch) {
  const int lane = threadIdx.x % 32;
  const int64_t num_rows = p.batch * p.heads * p.max_q_len;
  const WarpQuery at(p);
  if (!at.is_there) return;
  const AttentionHead<T> head(p, at.b, at.h);

  float largest = -INFINITY, sum = 0.f;
  for (int split = 0; split < launch.num_splits; ++split) {
    largest = fmaxf(largest, launch.row_max[split * num_rows + at.row]);
  }
  const float shift = largest == -INFINITY ? 0.f : largest;
  const auto weight = [&](int split) { return exp2f((launch.row_max[split * num_rows + at.row] - shift) * kLog2E); };
  for (int split = 0; split < launch.num_splits; ++split) {
    sum = fmaf(weight(split), launch.row_sum[split * num_rows + at.row], sum);
  }
  if (lane == 0) head.stat(p.row_max, at.h, at.query) = largest, head.stat(p.row_sum, at.h, at.query) = sum;
  const float factor = sum == 0.f ? 0.f : static_cast<float>(p.keep_scale) / sum;
  for (int col = lane; col < p.value_dim; col += 32) {
    float out = 0.f;
    for (int split = 0; split < launch.num_splits; ++split) {
      out = fmaf(weight(split), launch.out[(split * num_rows + at.row) * p.value_dim + col], out);
    }
    head.query_row(p.out, at.h, at.query)[col * p.out.col] = static_cast<T>(out * factor);
  }
}

// ---- Host ----

constexpr int64_t kWarpsWanted = 1024;  // 8 on each of an H100's 132 multiprocessors
constexpr int64_t kLeastKeys = 256;     // of a split

template <class T, int kDim, bool kPlain>
void launch_attention(const AttentionProblem& p, AttentionLaunch launch_options) {
  constexpr AttentionTiles kTiles = tiles_of<T, kDim>(kPlain);
  const int64_t rows = launch_options.heads_at_once * p.max_q_len;
  const auto warps_needed = static_cast<int>(ceil_div<int64_t>(rows, 16 * kTiles.row_tiles));
  const int row_warps = kPlain ? kTiles.row_warps : std::min(warps_needed, kTiles.row_warps);
  const int block_q = row_warps * 16 * kTiles.row_tiles, warps = row_warps * kTiles.feature_warps;
  AttentionLaunch& l = launch_options;
  l.num_tiles = ceil_div<int64_t>(rows, block_q);

  // Where there are few queries, the keys are split, which doesn't depend on the card, so that the result doesn't.
  const int64_t num_tiles = l.num_tiles * l.num_head_groups * p.batch;
  const int64_t most = std::max<int64_t>(ceil_div(p.max_k_len, kLeastKeys), 1);
  l.num_splits = std::clamp<int64_t>(kWarpsWanted / (num_tiles * warps), 1, most);
  const int64_t num_rows = p.batch * p.heads * p.max_q_len;
  Tensor scratch;
  if (l.num_splits > 1) {
    scratch = new_scratch(l.num_splits * num_rows * (p.value_dim + 2), ScalarType::Float, device_of(p));
    l.row_max = static_cast<float*>(scratch.data_ptr());
    l.row_sum = l.row_max + l.num_splits * num_rows;
    l.out = l.row_sum + l.num_splits * num_rows;
  }

  const size_t smem = (block_q + 2 * kTiles.block_kv) * kDim * sizeof(T);
  launch(p.device_index, attention_kernel<T, kDim, kPlain>, grid_of(num_tiles * l.num_splits), 32 * warps, smem, p, l);
  if (l.num_splits > 1) {
    launch(p.device_index, combine_kernel<T>, grid_of(ceil_div<int64_t>(num_rows, kQueryWarps)), 32 * kQueryWarps, 0, p,
           l);
  }
}

void attention_forward(const AttentionProblem& p) {
  check_supported(p);
  if (p.batch * p.heads * p.max_q_len == 0) return;
  AttentionLaunch l{};
  // Few queries of heads that share their keys are rows of one tile.
  l.heads_at_once = p.max_q_len <= kFewQueries ? p.group() : 1;
  l.num_head_groups = p.heads / l.heads_at_once;
  l.vectorized = is_vectorized(p, p.query, p.head_dim) && is_vectorized(p, p.key, p.head_dim) &&
                 is_vectorized(p, p.value, p.value_dim);
  l.is_plain = is_plain(p);
  l.scale = static_cast<float>(p.scale) * kLog2E;
  ATTENTION_SWITCH(p, T, kDim, [&] {
    BOOL_SWITCH(l.is_plain && l.vectorized && p.max_q_len > kFewQueries, kPlain,
                [&] { launch_attention<T, kDim, kPlain>(p, l); });
  });
}

}  // namespace

}  // namespace bigkern

STABLE_TORCH_LIBRARY_IMPL(bigkern, CUDA, m) {
  using namespace bigkern;
  m.impl("attention", TORCH_BOX((&attention_op<Memory::kDevice, attention_forward>)));
}
