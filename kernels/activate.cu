// The pointwise half of a feed-forward layer: f(x), or f(gate)·up.
//
// x [rows, width], or [rows, 2·width] with gate beside up; out [rows, width], all f32.
// Grid (rows, ceil(width / 256)), block 256: one thread per output.
// Must move rows·width·8 bytes, 12 when gated.
#include "ts_cuda.cuh"

enum { GELU_TANH = 0, GELU = 1, RELU = 2, SILU = 3 };

__device__ __forceinline__ float activated(int activation, float x) {
  switch (activation) {
    case GELU_TANH: {
      float inner = 0.7978845608028654f * (x + 0.044715f * x * x * x);
      return 0.5f * x * (1.f + tanhf(inner));
    }
    case GELU:
      return 0.5f * x * (1.f + erff(x * 0.7071067811865476f));
    case RELU:
      return x < 0.f ? 0.f : x;
    default:
      return x / (1.f + expf(-x));
  }
}

extern "C" __global__ void activate(const float* x, float* out, int activation, int gated, int width) {
  int channel = blockIdx.y * blockDim.x + threadIdx.x;
  size_t row = blockIdx.x;
  if (channel < width) {
    const float* gate = x + row * (gated ? 2 * width : width) + channel;
    float y = activated(activation, gate[0]);
    out[row * width + channel] = gated ? y * gate[width] : y;
  }
}
