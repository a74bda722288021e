// The softmax of the forward, over tiles of keys.
#pragma once

#include "attention_tile.cuh"

namespace bigkern {

// Of the queries of a lane: Milakov and Gimelshein 2018, algorithm 3.
template <int kRowTiles>
struct OnlineSoftmax {
  float row_max[kRowTiles][2], row_sum[kRowTiles][2];  // the sums of this lane's columns only

  __device__ OnlineSoftmax() {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      for (int half = 0; half < 2; ++half) row_max[m][half] = -INFINITY, row_sum[m][half] = 0.f;
    }
  }

  // scores -> exp(scale (scores - largest)), where scale is of base 2; rescales what the earlier ones gave. Where
  // scores are products, scaling and shifting is one step; else it would overflow with a mask of the lowest number.
  template <bool kPlain, int kN, int kD>
  __device__ void step(float (&scores)[kRowTiles][kN][4], float (&out)[kRowTiles][kD][4], float scale) {
    float correction[kRowTiles][2];
    bool changes = false;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float largest = row_max[m][half];
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          largest = fmaxf(largest, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
        }
        largest = reduce_row(largest, [](float a, float b) { return fmaxf(a, b); });
        changes |= row_max[m][half] != largest;
        const float shift = largest == -INFINITY ? 0.f : largest;  // no key yet
        correction[m][half] = exp2_approx((row_max[m][half] - shift) * scale);
        row_max[m][half] = largest;
        float sum = 0.f;
#pragma unroll
        for (int n = 0; n < kN; ++n) {
#pragma unroll
          for (int c = 2 * half; c < 2 * half + 2; ++c) {
            float& s = scores[m][n][c];
            s = exp2_approx(kPlain ? fmaf(s, scale, -shift * scale) : (s - shift) * scale);
            sum += s;
          }
        }
        row_sum[m][half] = fmaf(row_sum[m][half], correction[m][half], sum);
      }
    }
    if (!__any_sync(~0u, changes)) return;  // mostly so after the first tiles
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int d = 0; d < kD; ++d) {
#pragma unroll
        for (int c = 0; c < 4; ++c) out[m][d][c] *= correction[m][c / 2];
      }
    }
  }
};

}  // namespace bigkern
