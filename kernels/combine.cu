// Merges the parts of the tiles that were attended to in parts, in their order.
//
// parts [parts, kv_heads, group][head_dim + 3] f32 as attend.cu leaves them; out [rows, q_heads·head_dim] f32;
// states [rows, q_heads][3] f32 or null.
// Grid (tiles, q_heads), block 128: one thread per part for what weighs it, then one per channel. The order of
// every sum follows from the number of parts.
// Must move parts·q_heads·(head_dim + 3)·4 bytes, about a hundredth of what attention reads.
#include "attend.cuh"
#include "block.cuh"

constexpr int COMBINE_THREADS = 128;
constexpr int COMBINE_WARPS = COMBINE_THREADS / ts::WARP;
// Parts whose factors are in shared memory at a time, and those whose channels are loaded together.
constexpr int COMBINE_PARTS = 512;
constexpr int COMBINE_AHEAD = 16;

extern "C" __global__ void __launch_bounds__(128)
combine(const float* parts, const ts::Tile* tiles, const ts::u32* lengths, float* out, float* states,
        ts::PageShape shape, int group, int part_pages) {
  constexpr int CHANNELS = ts::ATTEND_MOST_DIM / COMBINE_THREADS;
  TS_SHARED(float, factors, [COMBINE_PARTS]);
  ts::Tile tile = tiles[blockIdx.x];
  if (tile.parts == ts::NO_PARTS || tile.parts == ts::FUSED) {
    ts::wait_for_launches();
    return;
  }
  int head = blockIdx.y, kv_head = head / group, dim = shape.head_dim;
  ts::u32 pages = tile.list_stride > 0 ? lengths[tile.lengths + kv_head] : ts::pages_seen(tile, shape.page_size);
  ts::u32 of_part = ts::pages_of_part(pages, part_pages);
  int n = int((pages + of_part - 1) / of_part);
  size_t stride = size_t(shape.kv_heads) * group * (dim + ts::ATTEND_STATE);
  const float* first = parts + tile.parts * stride + size_t(head) * (dim + ts::ATTEND_STATE);
  ts::wait_for_launches();
  float largest = -INFINITY;
  for (int i = threadIdx.x; i < n; i += COMBINE_THREADS) {
    largest = fmaxf(largest, first[i * stride + dim]);
  }
  largest = ts::block_max<COMBINE_WARPS>(largest);
  float mass = 0.f, tilt = 0.f, sums[CHANNELS] = {};
  for (int begin = 0; begin < n; begin += COMBINE_PARTS) {
    int count = min(COMBINE_PARTS, n - begin);
    const float* part = first + begin * stride;
    // The factors before are used up.
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += COMBINE_THREADS) {
      const float* state = part + i * stride + dim;
      float fall = state[0] - largest, factor = exp2f(fall);
      factors[i] = factor;
      mass += factor * state[1];
      tilt += factor * (state[2] + state[1] * fall);
    }
    __syncthreads();
#pragma unroll
    for (int c = 0; c < CHANNELS; c++) {
      int channel = threadIdx.x + c * COMBINE_THREADS;
      if (channel >= dim) {
        continue;
      }
      int i = 0;
      for (; i + COMBINE_AHEAD <= count; i += COMBINE_AHEAD) {
        float x[COMBINE_AHEAD];
#pragma unroll
        for (int j = 0; j < COMBINE_AHEAD; j++) {
          x[j] = part[(i + j) * stride + channel];
        }
#pragma unroll
        for (int j = 0; j < COMBINE_AHEAD; j++) {
          sums[c] = fmaf(factors[i + j], x[j], sums[c]);
        }
      }
#pragma unroll 4
      for (; i < count; i++) {
        sums[c] = fmaf(factors[i], part[i * stride + channel], sums[c]);
      }
    }
  }
  mass = ts::block_sum<COMBINE_WARPS>(mass);
  tilt = ts::block_sum<COMBINE_WARPS>(tilt);
  size_t to = size_t(tile.row) * shape.kv_heads * group + head;
#pragma unroll
  for (int c = 0; c < CHANNELS; c++) {
    int channel = threadIdx.x + c * COMBINE_THREADS;
    if (channel < dim) {
      out[to * dim + channel] = sums[c] / mass;
    }
  }
  if (threadIdx.x == 0 && states) {
    states[to * ts::ATTEND_STATE] = largest;
    states[to * ts::ATTEND_STATE + 1] = mass;
    states[to * ts::ATTEND_STATE + 2] = tilt;
  }
}
