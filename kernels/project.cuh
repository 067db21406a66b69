// Projections of a few rows, f(norm(x)·Wᵀ + b) in one launch: as norm.cu, gemv.cu and activate.cu one after
// the other, to the bit.
//
// w [outputs, inputs] f32, f16 or bf16; x [rows, inputs] f32; bias [outputs] f32; weight and shift [inputs]
// f32, shift or null; out [rows, outputs], or [rows, outputs / 2] f(gate)·up when gated. `activation` as
// activate.cuh numbers them, -1 for none.
// Grid (any, ceil(rows / R)), block 256, shared memory for R + 2 rows of inputs, or R + 1 without shift: a
// block normalises its rows while the first weights are on their way. Gates and ups take those of two
// outputs a warp: all but project_*_1.
// Must move outputs·inputs·element bytes of weights once per R rows; x comes out of the caches.
#pragma once
#include "gemv.cuh"

#define PROJECT(name, T, R, O)                                                                              \
  extern "C" __global__ void __launch_bounds__(256, ts::gemv_blocks<T>(R, true))                            \
  name(const T* __restrict__ w, const float* __restrict__ x, const float* __restrict__ bias, float* out,    \
       int inputs, int outputs, int rows, int width, const float* __restrict__ weight,                      \
       const float* __restrict__ shift, float epsilon, int centred, int activation, int gated) {            \
    ts::gemv<T, R, O, true>(w, x, inputs, {bias, out, outputs, rows, width, 0, 0},                          \
                            {{weight, shift, epsilon, centred != 0}, activation, gated});                   \
  }
#define PROJECT_ROWS(name, T)     \
  PROJECT(name##_1, T, 1, 1)      \
  PROJECT(name##_gated, T, 1, 2)  \
  PROJECT(name##_2, T, 2, 2)      \
  PROJECT(name##_4, T, 4, 2)      \
  PROJECT(name##_8, T, 8, 2)
