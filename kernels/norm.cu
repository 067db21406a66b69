// Layer norm and RMS norm of rows.
//
// x and out [rows, columns] f32, weight [columns] f32, bias [columns] f32 or null.
// Grid (rows), block 256: one block per row, which stays in the caches between the passes over it.
// Must move rows·columns·8 bytes, and weight and bias once.
#include "norm.cuh"

template <int N>
__device__ __forceinline__ void norm_row(const float* x, float* out, int columns, const ts::RowNorm& norm) {
  float mean[1], scale[1];
  ts::row_statistics<N>([=](int, int i, float(&to)[N]) { ts::load_wide(x + i, to); }, columns, norm, mean, scale);
#pragma unroll 2
  for (int i = threadIdx.x * N; i < columns; i += ts::NORM_THREADS * N) {
    float y[N], weight[N], shift[N];
    ts::load_wide(x + i, y);
    ts::load_wide(norm.weight + i, weight);
    if (norm.shift) {
      ts::load_wide(norm.shift + i, shift);
    }
    for (int n = 0; n < N; n++) {
      y[n] = ts::normalised(y[n], mean[0], scale[0], weight[n]);
      y[n] = norm.shift ? __fadd_rn(y[n], shift[n]) : y[n];
    }
    ts::store_wide(out + i, y);
  }
}

template <bool CENTRED>
__device__ __forceinline__ void norm(const float* x, const float* weight, const float* bias, float* out,
                                     int columns, float epsilon) {
  ts::wait_for_launches();
  x += size_t(blockIdx.x) * columns;
  out += size_t(blockIdx.x) * columns;
  ts::RowNorm how = {weight, bias, epsilon, CENTRED};
  // Rows that 16 bytes do not divide begin at any address.
  if (columns % 4 == 0) {
    norm_row<4>(x, out, columns, how);
  } else {
    norm_row<1>(x, out, columns, how);
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
