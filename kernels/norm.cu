// Layer norm and RMS norm of rows.
//
// x and out [rows, columns] f32, weight [columns] f32, bias [columns] f32 or null.
// Grid (rows), block 256: one block per row, which stays in the caches between the passes over it.
// Must move rows·columns·8 bytes, and weight and bias once.
#include "block.cuh"

constexpr int NORM_WARPS = 8;

template <bool CENTRED>
__device__ __forceinline__ void norm(const float* x, const float* weight, const float* bias, float* out,
                                     int columns, float epsilon) {
  x += size_t(blockIdx.x) * columns;
  out += size_t(blockIdx.x) * columns;
  float mean = 0.f;
  if (CENTRED) {
    float sum = 0.f;
    for (int i = threadIdx.x; i < columns; i += blockDim.x) {
      sum += x[i];
    }
    mean = ts::block_sum<NORM_WARPS>(sum) / float(columns);
  }
  float squares = 0.f;
  for (int i = threadIdx.x; i < columns; i += blockDim.x) {
    float d = x[i] - mean;
    squares = fmaf(d, d, squares);
  }
  float scale = 1.f / sqrtf(ts::block_sum<NORM_WARPS>(squares) / float(columns) + epsilon);
  for (int i = threadIdx.x; i < columns; i += blockDim.x) {
    float y = (x[i] - mean) * scale * weight[i];
    out[i] = bias ? y + bias[i] : y;
  }
}

extern "C" __global__ void __launch_bounds__(256)
norm_layer(const float* x, const float* weight, const float* bias, float* out, int columns, float epsilon) {
  norm<true>(x, weight, bias, out, columns, epsilon);
}

extern "C" __global__ void __launch_bounds__(256)
norm_rms(const float* x, const float* weight, const float* bias, float* out, int columns, float epsilon) {
  norm<false>(x, weight, bias, out, columns, epsilon);
}
