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

template <int WARPS> __device__ __forceinline__ float block_max(float x) {
  return warp_max(gather_warps<WARPS>(warp_max(x), -INFINITY));
}

}  // namespace ts
