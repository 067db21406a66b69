// Products of many rows with a matrix: a prefill's, whose weights are read once for 64 rows.
//
// w [outputs, inputs] f32, f16 or bf16; x [rows, inputs] f32; bias [outputs] f32;
// out [rows, width] f32, of which columns column..column + outputs are replaced or added to.
// Grid (ceil(outputs / 64), ceil(rows / 64)), block 256: tiles of both go through shared memory, 32 inputs at a
// time, and a thread sums up 4 rows by 4 outputs. Sums are in f32, in the order of the inputs, whatever the number
// of rows. inputs is a multiple of 16 bytes.
// Must move outputs·inputs·element bytes of weights once per 64 rows, and rows·inputs·4 once per 64 outputs.
#include "ts_cuda.cuh"

constexpr int GEMM_TILE = 64;
constexpr int GEMM_DEPTH = 32;
constexpr int GEMM_THREADS = 256;
// Rows and outputs of a thread, side by side.
constexpr int GEMM_OWN = 4;
// A row of a tile, longer by one 16-byte load, so that neighbours lie in different banks.
constexpr int GEMM_ROW = GEMM_TILE + 4;

// Puts inputs k.. of rows first.. of `from` [rows, inputs] into `tile` [GEMM_DEPTH][GEMM_ROW], turned, zeros beyond.
template <class T>
__device__ __forceinline__ void load_tile(const T* from, int first, int rows, int k, int inputs,
                                          float (*tile)[GEMM_ROW]) {
  constexpr int N = ts::Wide<T>::N, LOADS = GEMM_DEPTH / N;
  for (int i = threadIdx.x; i < GEMM_TILE * LOADS; i += GEMM_THREADS) {
    int row = i / LOADS, at = i % LOADS * N;
    float x[N] = {};
    if (first + row < rows && k + at < inputs) {
      ts::load_wide(from + size_t(first + row) * inputs + k + at, x);
    }
    for (int n = 0; n < N; n++) {
      tile[at + n][row] = x[n];
    }
  }
}

template <class T>
__device__ __forceinline__ void gemm(const T* w, const float* x, const float* bias, float* out, int inputs,
                                     int outputs, int rows, int width, int column, int add) {
  TS_SHARED(float, xs, [GEMM_DEPTH][GEMM_ROW]);
  TS_SHARED(float, ws, [GEMM_DEPTH][GEMM_ROW]);
  int first_output = blockIdx.x * GEMM_TILE, first_row = blockIdx.y * GEMM_TILE;
  int across = threadIdx.x % (GEMM_TILE / GEMM_OWN) * GEMM_OWN, down = threadIdx.x / (GEMM_TILE / GEMM_OWN) * GEMM_OWN;
  float sums[GEMM_OWN][GEMM_OWN] = {};
  for (int k = 0; k < inputs; k += GEMM_DEPTH) {
    __syncthreads();
    load_tile(x, first_row, rows, k, inputs, xs);
    load_tile(w, first_output, outputs, k, inputs, ws);
    __syncthreads();
#pragma unroll 8
    for (int i = 0; i < GEMM_DEPTH; i++) {
      float a[GEMM_OWN], b[GEMM_OWN];
      ts::load_wide(&xs[i][down], a);
      ts::load_wide(&ws[i][across], b);
      for (int r = 0; r < GEMM_OWN; r++) {
        for (int o = 0; o < GEMM_OWN; o++) {
          sums[r][o] = fmaf(a[r], b[o], sums[r][o]);
        }
      }
    }
  }
  for (int r = 0; r < GEMM_OWN; r++) {
    for (int o = 0; o < GEMM_OWN; o++) {
      int row = first_row + down + r, output = first_output + across + o;
      if (row < rows && output < outputs) {
        ts::store(&out[size_t(row) * width + column + output], sums[r][o] + bias[output], add);
      }
    }
  }
}

#define GEMM(name, T)                                                                                     \
  extern "C" __global__ void __launch_bounds__(256)                                                       \
  name(const T* __restrict__ w, const float* __restrict__ x, const float* __restrict__ bias, float* out,  \
       int inputs, int outputs, int rows, int width, int column, int add) {                               \
    gemm(w, x, bias, out, inputs, outputs, rows, width, column, add);                                     \
  }
GEMM(gemm_f32, float)
GEMM(gemm_f16, __half)
GEMM(gemm_bf16, __nv_bfloat16)
