// Layer norm and RMS norm of rows.
//
// x and out [rows, columns] f32, weight [columns] f32, bias [columns] f32 or null.
// Grid (rows), block 256: one block per row, which stays in the caches between the passes over it.
// Must move rows·columns·8 bytes, and weight and bias once.
#include "ts_cuda.cuh"

constexpr int NORM_WARPS = 8;

// The sum over the block, in every thread.
__device__ __forceinline__ float norm_block_sum(float x) {
  TS_SHARED(float, parts, [NORM_WARPS]);
  int lane = threadIdx.x % ts::WARP;
  x = ts::warp_sum(x);
  // What the call before left is read by all before it is replaced.
  __syncthreads();
  if (lane == 0) {
    parts[threadIdx.x / ts::WARP] = x;
  }
  __syncthreads();
  return ts::warp_sum(lane < NORM_WARPS ? parts[lane] : 0.f);
}

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
    mean = norm_block_sum(sum) / float(columns);
  }
  float squares = 0.f;
  for (int i = threadIdx.x; i < columns; i += blockDim.x) {
    float d = x[i] - mean;
    squares = fmaf(d, d, squares);
  }
  float scale = 1.f / sqrtf(norm_block_sum(squares) / float(columns) + epsilon);
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
