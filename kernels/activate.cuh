// The functions of feed-forward layers, by the numbers that the host gives them.
#pragma once
#include "ts_cuda.cuh"

namespace ts {

enum { GELU_TANH = 0, GELU = 1, RELU = 2, SILU = 3 };

__device__ __forceinline__ float activated(int activation, float x) {
  switch (activation) {
    // Written without the difference of two near ones, which would lose the tails.
    case GELU_TANH:
      // 0.5·x·(1 + tanh(y)) = x / (1 + exp(-2·y)), with y = sqrt(2/pi)·(x + 0.044715·x^3).
      return x / (1.f + expf(-x * fmaf(0.07135481627159f, x * x, 1.59576912160573f)));
    case GELU:
      // 1 + erf(y) = erfc(-y).
      return 0.5f * x * erfcf(x * -0.7071067811865476f);
    case RELU:
      return x < 0.f ? 0.f : x;
    default:
      return x / (1.f + expf(-x));
  }
}

}  // namespace ts
