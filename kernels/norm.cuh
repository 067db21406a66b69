// The statistics of rows and what they make of them: the same to the bit wherever rows are normalised.
// Blocks of NORM_WARPS warps; every thread calls it, and reads N elements in each turn of the block.
#pragma once
#include "block.cuh"

namespace ts {

constexpr int NORM_WARPS = 8;
constexpr int NORM_THREADS = NORM_WARPS * WARP;

struct RowNorm {
  const float *weight, *shift;
  float epsilon;
  bool centred;
};

// The mean of each row, 0 unless it is to be taken away, and what its elements are multiplied by.
// load(r, i, x) loads N elements of row r from i on.
template <int N, int R, class Load>
__device__ __forceinline__ void row_statistics(Load load, int columns, const RowNorm& norm, float (&mean)[R],
                                               float (&scale)[R]) {
  for (int r = 0; r < R; r++) {
    mean[r] = scale[r] = 0.f;
  }
  if (norm.centred) {
#pragma unroll(R > 1 ? 1 : 2)
    for (int i = threadIdx.x * N; i < columns; i += NORM_THREADS * N) {
      for (int r = 0; r < R; r++) {
        float x[N];
        load(r, i, x);
        for (int n = 0; n < N; n++) {
          mean[r] += x[n];
        }
      }
    }
    block_sums<NORM_WARPS>(mean);
    for (int r = 0; r < R; r++) {
      mean[r] = __fdiv_rn(mean[r], float(columns));
    }
  }
#pragma unroll(R > 1 ? 1 : 2)
  for (int i = threadIdx.x * N; i < columns; i += NORM_THREADS * N) {
    for (int r = 0; r < R; r++) {
      float x[N];
      load(r, i, x);
      for (int n = 0; n < N; n++) {
        float d = x[n] - mean[r];
        scale[r] = fmaf(d, d, scale[r]);
      }
    }
  }
  block_sums<NORM_WARPS>(scale);
  for (int r = 0; r < R; r++) {
    scale[r] = __fdiv_rn(1.f, sqrtf(__fadd_rn(__fdiv_rn(scale[r], float(columns)), norm.epsilon)));
  }
}

// Rounded after each step: a fused product here and none there would be two results.
__device__ __forceinline__ float normalised(float x, float mean, float scale, float weight) {
  return __fmul_rn(__fmul_rn(x - mean, scale), weight);
}

}  // namespace ts
