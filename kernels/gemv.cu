// Products of a few rows with a matrix: the decode step's matrix-vector products.
//
// w [outputs, inputs] f32, f16 or bf16; x [rows, inputs] f32; bias [outputs] f32;
// out [rows, width] f32, of which columns column..column + outputs are replaced or added to.
// Grid (any, ceil(rows / R)), block 256: a warp takes one output of one row, or two of R rows, and goes on
// to the next as gemv.cuh says.
// Must move outputs·inputs·element bytes of weights once per R rows; x comes out of the caches.
#include "gemv.cuh"

#define GEMV_PARAMETERS(T)                                                                               \
  const T *__restrict__ w, const float *__restrict__ x, const float *__restrict__ bias, float *out,      \
      int inputs, int outputs, int rows, int width, int column, int add
#define GEMV(name, T, R, O)                                                                              \
  extern "C" __global__ void __launch_bounds__(256, ts::gemv_blocks<T>(R, false))                     \
  name(GEMV_PARAMETERS(T)) {                                                                             \
    ts::gemv<T, R, O, false>(w, x, inputs, {bias, out, outputs, rows, width, column, add}, {});          \
  }
#define GEMV_ROWS(name, T)                                                                               \
  GEMV(name##_1, T, 1, 1)                                                                                \
  GEMV(name##_2, T, 2, 2)                                                                                \
  GEMV(name##_4, T, 4, 2)                                                                                \
  GEMV(name##_8, T, 8, 2)                                                                                \
  extern "C" __global__ void __launch_bounds__(256) name##_any(GEMV_PARAMETERS(T)) {                     \
    ts::gemv_any<T, 4>(w, x, inputs, {bias, out, outputs, rows, width, column, add});                    \
  }
GEMV_ROWS(gemv_f32, float)
GEMV_ROWS(gemv_f16, __half)
GEMV_ROWS(gemv_bf16, __nv_bfloat16)
