// Products of a few rows with a matrix: the decode step's matrix-vector products.
//
// w [outputs, inputs] f32, f16 or bf16; x [rows, inputs] f32; bias [outputs] f32;
// out [rows, width] f32, of which columns column..column + outputs are replaced or added to.
// Grid (ceil(outputs / 8), ceil(rows / R)), block 32x4: a warp takes two outputs and R rows, so that a
// row that was loaded serves both; lanes stride along the inputs, 16 bytes of weights at a time.
// Must move outputs·inputs·element bytes of weights once per R rows; x comes out of the caches.
// A row's sum is taken in the same order for every R: it does not depend on its batch.
#include "ts_cuda.cuh"

constexpr int GEMV_WARPS = 4;
constexpr int GEMV_OUTPUTS = 2;

template <class T, int R, bool WIDE>
__device__ __forceinline__ void gemv(const T* w, const float* x, const float* bias, float* out, int inputs,
                                     int outputs, int rows, int width, int column, int add) {
  constexpr int N = WIDE ? ts::Wide<T>::N : 1;
  int first = (blockIdx.x * GEMV_WARPS + threadIdx.y) * GEMV_OUTPUTS;
  int row = blockIdx.y * R;
  // Beyond the edges the last output and the last row are computed again, and not stored.
  const T* weights[GEMV_OUTPUTS];
  for (int o = 0; o < GEMV_OUTPUTS; o++) {
    weights[o] = w + size_t(min(first + o, outputs - 1)) * inputs;
  }
  const float* xs[R];
  for (int r = 0; r < R; r++) {
    xs[r] = x + size_t(min(row + r, rows - 1)) * inputs;
  }
  float sums[GEMV_OUTPUTS][R] = {};
#pragma unroll(R > 4 ? 1 : 2)
  for (int i = threadIdx.x * N; i < inputs; i += ts::WARP * N) {
    float ws[GEMV_OUTPUTS][N];
    for (int o = 0; o < GEMV_OUTPUTS; o++) {
      if constexpr (WIDE) {
        ts::load_wide(weights[o] + i, ws[o]);
      } else {
        ws[o][0] = ts::widen(weights[o][i]);
      }
    }
    for (int r = 0; r < R; r++) {
      float v[N];
      if constexpr (WIDE) {
        for (int n = 0; n < N; n += 4) {
          float4 four = *reinterpret_cast<const float4*>(xs[r] + i + n);
          v[n] = four.x;
          v[n + 1] = four.y;
          v[n + 2] = four.z;
          v[n + 3] = four.w;
        }
      } else {
        v[0] = xs[r][i];
      }
      for (int o = 0; o < GEMV_OUTPUTS; o++) {
        for (int n = 0; n < N; n++) {
          sums[o][r] = fmaf(ws[o][n], v[n], sums[o][r]);
        }
      }
    }
  }
  for (int o = 0; o < GEMV_OUTPUTS; o++) {
    for (int r = 0; r < R; r++) {
      float sum = ts::warp_sum(sums[o][r]);
      if (threadIdx.x == 0 && first + o < outputs && row + r < rows) {
        float y = sum + bias[first + o];
        ts::store(&out[size_t(row + r) * width + column + first + o], y, add);
      }
    }
  }
}

#define GEMV(name, T, R, WIDE)                                                                          \
  extern "C" __global__ void __launch_bounds__(128)                                                     \
  name(const T* __restrict__ w, const float* __restrict__ x, const float* __restrict__ bias, float* out, \
       int inputs, int outputs, int rows, int width, int column, int add) {                             \
    gemv<T, R, WIDE>(w, x, bias, out, inputs, outputs, rows, width, column, add);                       \
  }
#define GEMV_ROWS(name, T)             \
  GEMV(name##_1, T, 1, true)           \
  GEMV(name##_2, T, 2, true)           \
  GEMV(name##_4, T, 4, true)           \
  GEMV(name##_8, T, 8, true)           \
  GEMV(name##_any, T, 4, false)
GEMV_ROWS(gemv_f32, float)
GEMV_ROWS(gemv_f16, __half)
GEMV_ROWS(gemv_bf16, __nv_bfloat16)
