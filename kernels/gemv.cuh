// Products of a few rows with a matrix, for gemv.cu and project.cu.
//
// A warp takes a tile of O outputs, tile + o·tiles, and R rows; its lanes stride along the inputs, 16
// bytes of weights at a time, and have GEMV_LOADS of those on their way before they use the first: of a
// small matrix, all of it. What a warp multiplies first is asked for before the block prepares its rows.
// A block goes on to further tiles, so that rows are prepared once.
// A row's sum is taken in the same order for every R and O: it does not depend on its batch.
#pragma once
#include "activate.cuh"
#include "norm.cuh"

namespace ts {

constexpr int GEMV_WARPS = NORM_WARPS;
constexpr int GEMV_LOADS = 8;

// Blocks that a multiprocessor takes at once: enough for its share of the bandwidth, and no spills.
template <class T> constexpr int gemv_blocks(int rows, bool prepares) {
  return rows > 1 || sizeof(T) > 2 ? 2 : prepares ? 3 : 4;
}

// Where results go: out [rows, width] f32, of which columns from `column` on are replaced or added to.
struct Results {
  const float* bias;
  float* out;
  int outputs, rows, width, column, add;
};

// What is done before and after a product, where it is done with it.
struct Around {
  RowNorm norm;
  int activation, gated;
};

// Where element `i`, the first of four, of a row lies in shared memory: lanes that read the same quarter
// of their elements read side by side.
template <class T> __device__ __forceinline__ int place(int i, int columns) {
  constexpr int QUARTERS = Wide<T>::N / 4;
  int four = i / 4;
  return (four % QUARTERS * (columns / Wide<T>::N) + four / QUARTERS) * 4;
}

// Puts R rows from `row` on into shared memory, normalised; waits for the launches that wrote them.
template <class T, int R>
__device__ __forceinline__ void normalise_rows(const float* x, float* to, int columns, int row, int rows,
                                               const RowNorm& norm) {
  float* weights = to + R * columns;
  float* shifts = weights + columns;
  // Every thread prepares what it has loaded itself.
#pragma unroll(R > 1 ? 1 : 2)
  for (int i = threadIdx.x * 4; i < columns; i += NORM_THREADS * 4) {
    float four[4];
    int at = place<T>(i, columns);
    load_wide(norm.weight + i, four);
    store_wide(weights + at, four);
    if (norm.shift) {
      load_wide(norm.shift + i, four);
      store_wide(shifts + at, four);
    }
  }
  wait_for_launches();
#pragma unroll(R > 1 ? 1 : 2)
  for (int i = threadIdx.x * 4; i < columns; i += NORM_THREADS * 4) {
    float four[4];
    for (int r = 0; r < R; r++) {
      load_wide(x + size_t(min(row + r, rows - 1)) * columns + i, four);
      store_wide(to + r * columns + place<T>(i, columns), four);
    }
  }
  float mean[R], scale[R];
  auto load = [=](int r, int i, float(&four)[4]) { load_wide(to + r * columns + place<T>(i, columns), four); };
  row_statistics<4>(load, columns, norm, mean, scale);
#pragma unroll(R > 1 ? 1 : 2)
  for (int i = threadIdx.x * 4; i < columns; i += NORM_THREADS * 4) {
    float weight[4], shift[4], y[4];
    int at = place<T>(i, columns);
    load_wide(weights + at, weight);
    if (norm.shift) {
      load_wide(shifts + at, shift);
    }
    for (int r = 0; r < R; r++) {
      load_wide(to + r * columns + at, y);
      for (int n = 0; n < 4; n++) {
        y[n] = normalised(y[n], mean[r], scale[r], weight[n]);
        y[n] = norm.shift ? __fadd_rn(y[n], shift[n]) : y[n];
      }
      store_wide(to + r * columns + at, y);
    }
  }
  __syncthreads();
}

// Products over rows whose bytes 16 divides. PREPARES: x is normalised before, and results go through a
// function.
template <class T, int R, int O, bool PREPARES>
__device__ __forceinline__ void gemv(const T* w, const float* x, int inputs, const Results& to,
                                     const Around& around) {
  constexpr int N = Wide<T>::N, LOADS = GEMV_LOADS / O;
  int lane = threadIdx.x % WARP, chunks = inputs / N, row = blockIdx.y * R;
  int tiles = (to.outputs + O - 1) / O, stride = gridDim.x * GEMV_WARPS;
  int tile = blockIdx.x * GEMV_WARPS + threadIdx.x / WARP, first = 0;
  uint4 raw[O][LOADS];
  // Beyond the edges the last output and the last chunk are loaded again, and not used.
  auto load_weights = [&]() {
    for (int o = 0; o < O; o++) {
      const T* weights = w + size_t(min(tile + o * tiles, to.outputs - 1)) * inputs;
      for (int u = 0; u < LOADS; u++) {
        raw[o][u] = load_once(weights + min(first + u * WARP + lane, chunks - 1) * N);
      }
    }
  };
  // A lane stores one output of one row.
  int own_row = row + lane % R;
  float bias = 0.f, before = 0.f;
  float* out = nullptr;
  auto begin_tile = [&]() {
    int output = tile + lane / R * tiles;
    out = nullptr;
    if (lane < O * R && output < to.outputs && own_row < to.rows) {
      out = to.out + size_t(own_row) * to.width + to.column + output;
      bias = load_early(to.bias + output);
      before = !PREPARES && to.add ? load_early(out) : 0.f;
    }
  };
  // The next launch asks for its weights meanwhile. With more rows a step is slower so (docs/benchmarks).
  if (R == 1) {
    let_next_begin();
  }
  // With eight rows there are no registers to hold weights in while it waits.
  if (!PREPARES && R == 8) {
    wait_for_launches();
  }
  if (tile < tiles) {
    load_weights();
  }
  if (!PREPARES && R < 8) {
    wait_for_launches();
  }
  if (tile < tiles) {
    begin_tile();
  }
  const float* xs[R];
  if constexpr (PREPARES) {
    TS_DYN_SHARED(float, rows);
    normalise_rows<T, R>(x, rows, inputs, row, to.rows, around.norm);
    for (int r = 0; r < R; r++) {
      xs[r] = rows + r * inputs;
    }
  } else {
    for (int r = 0; r < R; r++) {
      xs[r] = x + size_t(min(row + r, to.rows - 1)) * inputs;
    }
  }
  float sums[O][R] = {};
  while (tile < tiles) {
    for (int u = 0; u < LOADS; u++) {
      int chunk = first + u * WARP + lane;
      if (chunk < chunks) {
        float ws[O][N];
        for (int o = 0; o < O; o++) {
          widen_wide(raw[o][u], ws[o], T());
        }
        for (int r = 0; r < R; r++) {
          for (int q = 0; q < N / 4; q++) {
            float v[4];
            // As place() has it, for shared memory.
            load_wide(PREPARES ? xs[r] + (q * chunks + chunk) * 4 : xs[r] + chunk * N + q * 4, v);
            for (int o = 0; o < O; o++) {
              for (int n = 0; n < 4; n++) {
                sums[o][r] = fmaf(ws[o][q * 4 + n], v[n], sums[o][r]);
              }
            }
          }
        }
      }
    }
    first += LOADS * WARP;
    bool done = first >= chunks;
    if (done) {
      first = 0;
      tile += stride;
    }
    // What comes next is on its way while these sums are stored.
    if (tile < tiles) {
      load_weights();
    }
    if (!done) {
      continue;
    }
    float y = 0.f;
    for (int o = 0; o < O; o++) {
      for (int r = 0; r < R; r++) {
        float sum = warp_sum(sums[o][r]);
        y = lane == o * R + r ? sum : y;
        sums[o][r] = 0.f;
      }
    }
    y += bias;
    if constexpr (PREPARES) {
      if (O == 2 && around.gated) {
        float up = __shfl_sync(ALL_LANES, y, (lane + R) % WARP);
        y = activated(around.activation, y) * up;
        // Columns of the gates are those of the results.
        out = lane < R ? out : nullptr;
      } else if (around.activation >= 0) {
        y = activated(around.activation, y);
      }
    }
    if (out) {
      *out = !PREPARES && to.add ? before + y : y;
    }
    if (tile < tiles) {
      begin_tile();
    }
  }
}

// Products over rows of any bytes, an element at a time.
template <class T, int R>
__device__ __forceinline__ void gemv_any(const T* w, const float* x, int inputs, const Results& to) {
  wait_for_launches();
  int lane = threadIdx.x % WARP, row = blockIdx.y * R;
  for (int output = blockIdx.x * GEMV_WARPS + threadIdx.x / WARP; output < to.outputs;
       output += gridDim.x * GEMV_WARPS) {
    const T* weights = w + size_t(output) * inputs;
    float sums[R] = {};
#pragma unroll 4
    for (int i = lane; i < inputs; i += WARP) {
      float weight = widen(weights[i]);
      for (int r = 0; r < R; r++) {
        sums[r] = fmaf(weight, x[size_t(min(row + r, to.rows - 1)) * inputs + i], sums[r]);
      }
    }
    for (int r = 0; r < R; r++) {
      float sum = warp_sum(sums[r]);
      if (lane == 0 && row + r < to.rows) {
        store(&to.out[size_t(row + r) * to.width + to.column + output], sum + to.bias[output], to.add);
      }
    }
  }
}

}  // namespace ts
