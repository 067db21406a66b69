// Scores every page of the tiles that select.
//
// qkv [rows, width] f32, of which the queries [kv_heads·group, head_dim] come first; boxes as pages.cuh
// has them; scores [tiles, kv_heads, most_pages] f32.
// Grid (selecting tiles, kv_heads, ceil(most_pages / (64·N))), block 64: one thread per N pages that lie
// side by side (8 of 16-bit elements, 4 of f32). Dynamic shared memory: group·head_dim floats.
// Must move pages·head_dim·2·element bytes per KV head, half of it when one query head reads it.
#include "score.cuh"
#include "tile.cuh"

template <class T>
__device__ __forceinline__ void score_tile(const float* qkv, const T* boxes, const ts::u32* tables,
                                           const ts::Tile* tiles, const ts::u32* selecting, float* scores,
                                           ts::PageShape shape, int group, int width, int most_pages) {
  TS_DYN_SHARED(float, queries);
  ts::u32 number = selecting[blockIdx.x];
  if (number == ts::NO_TILE) {
    return;
  }
  ts::Tile tile = tiles[number];
  int kv_head = blockIdx.y;
  ts::u32 pages = ts::pages_seen(tile, shape.page_size);
  const float* from = qkv + size_t(tile.row) * width + size_t(kv_head) * group * shape.head_dim;
  for (int i = threadIdx.x; i < group * shape.head_dim; i += blockDim.x) {
    queries[i] = from[i];
  }
  __syncthreads();
  ts::u32 first = (blockIdx.z * blockDim.x + threadIdx.x) * ts::ScorePages<T>::N;
  if (first < pages) {
    float* out = scores + (size_t(blockIdx.x) * shape.kv_heads + kv_head) * most_pages;
    ts::score_run(boxes, tables + tile.table, pages, first, kv_head, queries, group, shape, out);
  }
}

#define SCORE_PAGES(name, T)                                                                                \
  extern "C" __global__ void __launch_bounds__(64)                                                          \
  name(const float* qkv, const T* boxes, const ts::u32* tables, const ts::Tile* tiles,                      \
       const ts::u32* selecting, float* scores, ts::PageShape shape, int group, int width, int most_pages) { \
    score_tile(qkv, boxes, tables, tiles, selecting, scores, shape, group, width, most_pages);              \
  }
SCORE_PAGES(score_pages_f32, float)
SCORE_PAGES(score_pages_f16, __half)
SCORE_PAGES(score_pages_bf16, __nv_bfloat16)
