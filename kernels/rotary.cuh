// What a rotation makes of a pair of channels, for rotary.cu and append_kv.cu: the same to the bit.
#pragma once
#include "ts_cuda.cuh"

namespace ts {

// Rounded after each step, as on the CPU: a fused product here and none there would be two results.
__device__ __forceinline__ float rotated_low(float low, float high, float cosine, float sine) {
  return __fadd_rn(__fmul_rn(low, cosine), -__fmul_rn(high, sine));
}

__device__ __forceinline__ float rotated_high(float low, float high, float cosine, float sine) {
  return __fadd_rn(__fmul_rn(high, cosine), __fmul_rn(low, sine));
}

}  // namespace ts
