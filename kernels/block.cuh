// Sums and largest values over a block of `WARPS` warps, in every thread. All threads call them.
#pragma once
#include "ts_cuda.cuh"

namespace ts {

// What each warp has of a block's value, by lane; `otherwise` in the lanes that stand for no warp.
template <int WARPS> __device__ __forceinline__ float gather_warps(float of_warp, float otherwise) {
  TS_SHARED(float, parts, [WARPS]);
  int lane = threadIdx.x % WARP;
  // What the call before left is read by all before it is replaced.
  __syncthreads();
  if (lane == 0) {
    parts[threadIdx.x / WARP] = of_warp;
  }
  __syncthreads();
  return lane < WARPS ? parts[lane] : otherwise;
}

template <int WARPS> __device__ __forceinline__ float block_sum(float x) {
  return warp_sum(gather_warps<WARPS>(warp_sum(x), 0.f));
}

// The sums of several values at once, each in the order of block_sum.
template <int WARPS, int R> __device__ __forceinline__ void block_sums(float (&x)[R]) {
  TS_SHARED(float, sums_of_warps, [R][WARPS]);
  int lane = threadIdx.x % WARP;
  __syncthreads();
  for (int r = 0; r < R; r++) {
    float sum = warp_sum(x[r]);
    if (lane == 0) {
      sums_of_warps[r][threadIdx.x / WARP] = sum;
    }
  }
  __syncthreads();
  for (int r = 0; r < R; r++) {
    x[r] = warp_sum(lane < WARPS ? sums_of_warps[r][lane] : 0.f);
  }
}

template <int WARPS> __device__ __forceinline__ float block_max(float x) {
  return warp_max(gather_warps<WARPS>(warp_max(x), -INFINITY));
}

}  // namespace ts
