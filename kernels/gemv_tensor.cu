// Products of up to sixteen rows with a matrix of 16-bit floats, on tensor cores: the decode step of a batch.
//
// w [outputs, inputs] f16 or bf16, a row of which is whole pieces of 16 bytes; x [rows, inputs] f32;
// bias [outputs] f32; out [rows, width] f32, of which columns column..column + outputs are replaced or added to.
// Grid (ceil(outputs / 16), ceil(rows / R)), block 256: a block takes 16 outputs of R rows. Its warps share out the
// inputs, and what they have is added up in their order: a row's sum does not depend on those beside it.
// Must move outputs·inputs·2 bytes of weights once per R rows; x comes out of the caches.
#include "ts_cuda.cuh"

namespace ts {

constexpr int TENSOR_WARPS = 8;
constexpr int TENSOR_OUTPUTS = 16;
// Rows of a tile of results, and inputs of a lane's 16 bytes and of a warp's.
constexpr int TILE_ROWS = 8;
constexpr int LANE_INPUTS = 8;
// Loads of each of a lane's two outputs that are on their way before the first is used.
constexpr int TENSOR_LOADS = 8;

// A number as a sum of two that tensor cores multiply exactly, to 22 bits; what is no number is its first part alone.
__device__ __forceinline__ void split_number(float x, float& high, float& low) {
  constexpr u32 KEPT = 0xffffe000u;
  bool finite = fabsf(x) < INFINITY;
  high = finite ? __uint_as_float(__float_as_uint(x) & KEPT) : x != x ? __uint_as_float(0x7fc00000u) : x;
  low = finite ? __uint_as_float(__float_as_uint(x - high) & KEPT) : 0.f;
}

template <class T, int TILES>
__device__ __forceinline__ void gemv_tensor(const T* w, const float* x, const float* bias, float* out, int inputs,
                                            int outputs, int rows, int width, int column, int add) {
  constexpr int R = TILES * TILE_ROWS, THREADS = TENSOR_WARPS * WARP;
  TS_SHARED(float, totals, [TENSOR_WARPS][R][TENSOR_OUTPUTS]);
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
  int chunks = inputs / LANE_INPUTS, steps = (chunks + 3) / 4;
  int first_output = blockIdx.x * TENSOR_OUTPUTS, first_row = blockIdx.y * R;
  // Beyond the edges the last output, chunk and row are loaded again, and not used.
  const T* weights[2];
  for (int half = 0; half < 2; half++) {
    weights[half] = w + size_t(min(first_output + half * 8 + g, outputs - 1)) * inputs;
  }
  uint4 raw[TENSOR_LOADS][2];
  auto load_weights = [&](int step) {
#pragma unroll
    for (int u = 0; u < TENSOR_LOADS; u++) {
      int chunk = min((step + u * TENSOR_WARPS) * 4 + t, chunks - 1);
      for (int half = 0; half < 2; half++) {
        raw[u][half] = load_once(weights[half] + chunk * LANE_INPUTS);
      }
    }
  };
  load_weights(warp);
  wait_for_launches();
  // A thread stores results of its own; what they are added to is on its way meanwhile.
  constexpr int OWN = (R * TENSOR_OUTPUTS + THREADS - 1) / THREADS;
  float before[OWN];
  float* own[OWN];
#pragma unroll
  for (int i = 0; i < OWN; i++) {
    int place = i * THREADS + threadIdx.x, row = first_row + place / TENSOR_OUTPUTS;
    int output = first_output + place % TENSOR_OUTPUTS;
    bool is_there = place < R * TENSOR_OUTPUTS && row < rows && output < outputs;
    own[i] = is_there ? out + size_t(row) * width + column + output : nullptr;
    before[i] = is_there ? load_early(bias + output) : 0.f;
    if (is_there && add) {
      before[i] += load_early(own[i]);
    }
  }
  const float* xs[TILES];
  for (int tile = 0; tile < TILES; tile++) {
    xs[tile] = x + size_t(min(first_row + tile * TILE_ROWS + g, rows - 1)) * inputs;
  }
  float sums[TILES][4] = {};
#pragma unroll 1
  for (int first = warp; first < steps; first += TENSOR_LOADS * TENSOR_WARPS) {
    if (first > warp) {
      load_weights(first);
    }
#pragma unroll
    for (int u = 0; u < TENSOR_LOADS; u++) {
      int step = first + u * TENSOR_WARPS, chunk = step * 4 + t;
      // All of a warp, or none.
      if (step >= steps) {
        break;
      }
      float low_outputs[LANE_INPUTS], high_outputs[LANE_INPUTS];
      widen_wide(raw[u][0], low_outputs, T());
      widen_wide(raw[u][1], high_outputs, T());
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) {
        float values[2][4] = {};
        if (chunk < chunks) {
          load_wide(xs[tile] + chunk * LANE_INPUTS, values[0]);
          load_wide(xs[tile] + chunk * LANE_INPUTS + 4, values[1]);
        }
        // The order of inputs is the lanes': that of both factors.
#pragma unroll
        for (int pair = 0; pair < LANE_INPUTS; pair += 2) {
          float a[4] = {low_outputs[pair], high_outputs[pair], low_outputs[pair + 1], high_outputs[pair + 1]};
          float high[2], low[2];
          for (int i = 0; i < 2; i++) {
            split_number(values[pair / 4][pair % 4 + i], high[i], low[i]);
          }
          add_tile(sums[tile], a, low[0], low[1]);
          add_tile(sums[tile], a, high[0], high[1]);
        }
      }
    }
  }
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      totals[warp][tile * TILE_ROWS + 2 * t + i % 2][g + i / 2 * 8] = sums[tile][i];
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < OWN; i++) {
    int place = i * THREADS + threadIdx.x;
    if (own[i]) {
      float sum = 0.f;
      for (int from = 0; from < TENSOR_WARPS; from++) {
        sum += totals[from][place / TENSOR_OUTPUTS][place % TENSOR_OUTPUTS];
      }
      *own[i] = before[i] + sum;
    }
  }
}

}  // namespace ts

#define GEMV_TENSOR(name, T, TILES)                                                                          \
  extern "C" __global__ void __launch_bounds__(256, 2)                                                       \
  name(const T* __restrict__ w, const float* __restrict__ x, const float* __restrict__ bias, float* out,     \
       int inputs, int outputs, int rows, int width, int column, int add) {                                  \
    ts::gemv_tensor<T, TILES>(w, x, bias, out, inputs, outputs, rows, width, column, add);                   \
  }
GEMV_TENSOR(gemv_tensor_f16_8, __half, 1)
GEMV_TENSOR(gemv_tensor_f16_16, __half, 2)
GEMV_TENSOR(gemv_tensor_bf16_8, __nv_bfloat16, 1)
GEMV_TENSOR(gemv_tensor_bf16_16, __nv_bfloat16, 2)
