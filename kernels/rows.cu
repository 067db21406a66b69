// Moving rows: gathering some of them, and turning a matrix while it is loaded.
//
// gather_rows: x [·, columns] f32, rows [n] -> out [n, columns].
// Grid (n, ceil(columns / 256)), block 256. Must move n·columns·8 bytes.
//
// transpose: in [rows, columns] -> out [columns, rows], elements of 2 or 4 bytes.
// Grid (ceil(columns / 32), ceil(rows / 32)), block 32x8: one block per 32x32 tile, through shared
// memory, so that both sides are coalesced. Must move rows·columns·2 elements.
#include "ts_cuda.cuh"

extern "C" __global__ void gather_rows(const float* x, const ts::u32* rows, float* out, int columns) {
  ts::wait_for_launches();
  int channel = blockIdx.y * blockDim.x + threadIdx.x;
  size_t row = blockIdx.x;
  if (channel < columns) {
    out[row * columns + channel] = x[size_t(rows[row]) * columns + channel];
  }
}

constexpr int TRANSPOSE_TILE = 32;

template <class T> __device__ __forceinline__ void transpose(const T* in, T* out, int rows, int columns) {
  // One column more, so that a column of the tile lies in different banks.
  TS_SHARED(T, tile, [TRANSPOSE_TILE][TRANSPOSE_TILE + 1]);
  size_t column = size_t(blockIdx.x) * TRANSPOSE_TILE + threadIdx.x;
  for (int y = threadIdx.y; y < TRANSPOSE_TILE; y += blockDim.y) {
    size_t row = size_t(blockIdx.y) * TRANSPOSE_TILE + y;
    if (row < rows && column < columns) {
      tile[y][threadIdx.x] = in[row * columns + column];
    }
  }
  __syncthreads();
  size_t row = size_t(blockIdx.y) * TRANSPOSE_TILE + threadIdx.x;
  for (int y = threadIdx.y; y < TRANSPOSE_TILE; y += blockDim.y) {
    size_t turned = size_t(blockIdx.x) * TRANSPOSE_TILE + y;
    if (row < rows && turned < columns) {
      out[turned * rows + row] = tile[threadIdx.x][y];
    }
  }
}

extern "C" __global__ void transpose_16(const unsigned short* in, unsigned short* out, int rows, int columns) {
  transpose(in, out, rows, columns);
}

extern "C" __global__ void transpose_32(const ts::u32* in, ts::u32* out, int rows, int columns) {
  transpose(in, out, rows, columns);
}
