// A decode step's attention in one launch: scoring, selection and attention, for lists that are read in one piece.
//
// qkv, pages, tables, tiles, lists, lengths, out and states as attend_tile.cuh has them, boxes as pages.cuh;
// scores [tiles, kv_heads, most_pages] f32, which the block writes and reads itself.
// Grid (selecting tiles, kv_heads), block 256: a block scores every page of its tile and KV head, lists the best,
// and reads them. What split launches leave in memory between them stays in this multiprocessor's caches.
// Must move pages·head_dim·2·element bytes of boxes (half of it for a query alone) and
// budget·page_size·head_dim·2·element of keys and values, per KV head.
#pragma once
#include "attend_codes.cuh"
#include "attend_floats.cuh"
#include "attend_tensor.cuh"
#include "score.cuh"
#include "select.cuh"

namespace ts {

constexpr int FUSED_WARPS = SELECT_BINS / WARP;

// `attend(job, finish)` reads the list.
template <class B, class Attend>
__device__ __forceinline__ void fused_decode(const float* qkv, const B* boxes, const u32* tables, const Tile* tiles,
                                             const u32* selecting, u32* lists, float* scores, float* out,
                                             float* states, PageShape shape, int group, int width, float scale,
                                             int most_pages, Attend attend) {
  TS_DYN_SHARED(float, unscaled);
  u32 number = selecting[blockIdx.x];
  Tile tile = {};
  if (number != NO_TILE) {
    tile = tiles[number];
  }
  wait_for_launches();
  if (number == NO_TILE) {
    return;
  }
  int kv_head = blockIdx.y, dim = shape.head_dim;
  u32 pages = pages_seen(tile, shape.page_size);
  const float* from = qkv + size_t(tile.row) * width + size_t(kv_head) * group * dim;
  for (int i = threadIdx.x; i < group * dim; i += blockDim.x) {
    unscaled[i] = from[i];
  }
  __syncthreads();
  scores += (size_t(blockIdx.x) * shape.kv_heads + kv_head) * most_pages;
  const u32* table = tables + tile.table;
  for (u32 first = threadIdx.x * ScorePages<B>::N; first < pages; first += blockDim.x * ScorePages<B>::N) {
    score_run(boxes, table, pages, first, kv_head, unscaled, group, shape, scores);
  }
  // A barrier orders a block's accesses to global memory, too.
  __syncthreads();
  u32* list = lists + tile.list + size_t(kv_head) * tile.list_stride;
  select_pages(scores, pages, tile.budget, tile.sink, tile.recent, list);
  __syncthreads();
  AttendJob job;
  job.tile = tile;
  job.shape = shape;
  job.kv_head = kv_head;
  job.group = group;
  job.first_query = 0;
  job.n_queries = group;
  job.width = width;
  job.scale = scale;
  job.table = table;
  job.list = list;
  job.begin = 0;
  job.end = tile.list_stride;
  attend(job, [&](int query, int channel, float sum, const float* state) {
    size_t head = size_t(tile.row) * shape.kv_heads * group + kv_head * group + query;
    out[head * dim + channel] = sum / state[1];
    if (channel == 0 && states) {
      for (int i = 0; i < ATTEND_STATE; i++) {
        states[head * ATTEND_STATE + i] = state[i];
      }
    }
  });
}

}  // namespace ts

#define FUSED_FLOATS(name, T, Q)                                                                                 \
  extern "C" __global__ void __launch_bounds__(256, (Q) == 1 ? 2 : 1)                                            \
  name(const float* qkv, const T* pages, const T* boxes, const ts::u32* tables, const ts::Tile* tiles,           \
       const ts::u32* selecting, ts::u32* lists, float* scores, float* out, float* states, ts::PageShape shape,  \
       int group, int width, float scale, int most_pages) {                                                      \
    ts::FloatPages<T, true> reader = {pages};                                                                    \
    ts::fused_decode(qkv, boxes, tables, tiles, selecting, lists, scores, out, states, shape, group, width,      \
                     scale, most_pages, [&](const ts::AttendJob& job, auto finish) {                             \
                       ts::attend<ts::FloatPages<T, true>, Q, ts::FUSED_WARPS>(qkv, reader, job, finish);        \
                     });                                                                                         \
  }
#define FUSED_TENSOR(name, T, PASSES)                                                                            \
  extern "C" __global__ void __launch_bounds__(256, 1)                                                           \
  name(const float* qkv, const T* pages, const T* boxes, const ts::u32* tables, const ts::Tile* tiles,           \
       const ts::u32* selecting, ts::u32* lists, float* scores, float* out, float* states, ts::PageShape shape,  \
       int group, int width, float scale, int most_pages) {                                                      \
    ts::fused_decode(qkv, boxes, tables, tiles, selecting, lists, scores, out, states, shape, group, width,      \
                     scale, most_pages, [&](const ts::AttendJob& job, auto finish) {                             \
                       ts::attend_tensor<T, PASSES, ts::FUSED_WARPS, true>(qkv, pages, job, finish);                \
                     });                                                                                         \
  }
#define FUSED_CODES(name, BITS, Q)                                                                               \
  extern "C" __global__ void __launch_bounds__(256, 1)                                                           \
  name(const float* qkv, const ts::u32* pages, const __half* boxes, const ts::u32* tables, const ts::Tile* tiles, \
       const ts::u32* selecting, ts::u32* lists, float* scores, float* out, float* states, ts::PageShape shape,  \
       int group, int width, float scale, int most_pages, const __half* open, int heads) {                       \
    ts::CodePages<BITS, true> reader = {pages, boxes, open, heads, nullptr};                                     \
    ts::fused_decode(qkv, boxes, tables, tiles, selecting, lists, scores, out, states, shape, group, width,      \
                     scale, most_pages, [&](const ts::AttendJob& job, auto finish) {                             \
                       ts::attend<ts::CodePages<BITS, true>, Q, ts::FUSED_WARPS>(qkv, reader, job, finish);      \
                     });                                                                                         \
  }
