// Paged attention over the tiles' lists, or over every page: the kernels of one format.
//
// qkv [rows, width] f32, of which the queries [q_heads, head_dim] come first; pages as pages.cuh and codes.cuh
// have them, the latter with the boxes and the open pages;
// out [rows, q_heads·head_dim] f32. A list of a single row is read in parts, one block each (see
// tile.cuh), whose results combine.cu merges: parts [parts, kv_heads, group][head_dim + 3] f32.
// states [rows, q_heads][3] f32 or null: largest score, sum of weights and their tilt, see attend.cuh.
// Grid (tiles, most parts, kv_heads·ceil(queries / Q)), block 128: a block reads its part of the list once
// for up to Q queries, which are the query heads of the KV head and, in a prefill, of several rows.
// Must move tokens·head_dim·2·element bytes per list and KV head, once per Q queries.
#pragma once
#include "attend_codes.cuh"
#include "attend_floats.cuh"
#include "attend_tensor.cuh"

constexpr int ATTEND_WARPS = 4;

// Blocks of a multiprocessor that registers are shared out among: as many as spill nothing.
#define ATTEND_BLOCKS(WIDE, Q) ((WIDE) && (Q) <= 4 ? 3 : 2)

// Finds the block's job, and calls `attend(job, finish)` unless there is none.
template <int Q, class Attend>
__device__ __forceinline__ void attend_tile(const ts::u32* tables, const ts::Tile* tiles, const ts::u32* lists,
                                            const ts::u32* lengths, float* out, float* parts, float* states,
                                            ts::PageShape shape, int group, int width, float scale, int part_pages,
                                            Attend attend) {
  ts::AttendJob job;
  job.tile = tiles[blockIdx.x];
  job.shape = shape;
  job.group = group;
  job.n_queries = int(job.tile.rows) * group;
  job.kv_head = blockIdx.z % shape.kv_heads;
  job.first_query = int(blockIdx.z / shape.kv_heads) * Q;
  job.width = width;
  job.scale = scale;
  job.table = tables + job.tile.table;
  job.list = nullptr;
  job.begin = 0;
  job.end = ts::pages_seen(job.tile, shape.page_size);
  if (job.tile.list_stride > 0) {
    job.list = lists + job.tile.list + size_t(job.kv_head) * job.tile.list_stride;
    job.end = lengths[job.tile.lengths + job.kv_head];
  }
  bool whole = job.tile.parts == ts::NO_PARTS;
  if (!whole) {
    ts::u32 of_part = ts::pages_of_part(job.end, part_pages);
    job.begin = blockIdx.y * of_part;
    job.end = min(job.end, job.begin + of_part);
  }
  ts::wait_for_launches();
  // The whole block leaves together: a shorter list has fewer parts, a smaller tile fewer queries.
  if (job.tile.parts == ts::FUSED || job.begin >= job.end || job.first_query >= job.n_queries || (whole && blockIdx.y > 0)) {
    return;
  }
  int dim = shape.head_dim;
  attend(job, [&](int query, int channel, float sum, const float* state) {
    if (whole) {
      size_t row = job.tile.row + query / group;
      size_t head = row * shape.kv_heads * group + job.kv_head * group + query % group;
      out[head * dim + channel] = sum / state[1];
      if (channel == 0 && states) {
        for (int i = 0; i < ts::ATTEND_STATE; i++) {
          states[head * ts::ATTEND_STATE + i] = state[i];
        }
      }
    } else {
      size_t part = (size_t(job.tile.parts + blockIdx.y) * shape.kv_heads + job.kv_head) * group + query;
      float* to = parts + part * (dim + ts::ATTEND_STATE);
      to[channel] = sum;
      if (channel == 0) {
        for (int i = 0; i < ts::ATTEND_STATE; i++) {
          to[dim + i] = state[i];
        }
      }
    }
  });
}

#define ATTEND_FLOATS(name, T, WIDE, Q)                                                                            \
  extern "C" __global__ void __launch_bounds__(128, ATTEND_BLOCKS(WIDE, Q))                                        \
  name(const float* qkv, const T* pages, const ts::u32* tables, const ts::Tile* tiles, const ts::u32* lists,       \
       const ts::u32* lengths, float* out, float* parts, float* states, ts::PageShape shape, int group, int width, \
       float scale, int part_pages) {                                                                              \
    ts::FloatPages<T, WIDE> reader = {pages};                                                                      \
    attend_tile<Q>(tables, tiles, lists, lengths, out, parts, states, shape, group, width, scale, part_pages,      \
                   [&](const ts::AttendJob& job, auto finish) {                                                    \
                     ts::attend<ts::FloatPages<T, WIDE>, Q, ATTEND_WARPS>(qkv, reader, job, finish);               \
                   });                                                                                             \
  }
#define ATTEND_FLOATS_QUERIES(name, T)   \
  ATTEND_FLOATS(name##_1, T, true, 1)    \
  ATTEND_FLOATS(name##_4, T, true, 4)    \
  ATTEND_FLOATS(name##_8, T, true, 8)

#define ATTEND_TENSOR(name, T, PASSES)                                                                             \
  extern "C" __global__ void __launch_bounds__(128, 2)                                                             \
  name(const float* qkv, const T* pages, const ts::u32* tables, const ts::Tile* tiles, const ts::u32* lists,       \
       const ts::u32* lengths, float* out, float* parts, float* states, ts::PageShape shape, int group, int width, \
       float scale, int part_pages) {                                                                              \
    attend_tile<ts::TENSOR_QUERIES>(tables, tiles, lists, lengths, out, parts, states, shape, group, width, scale, \
                                    part_pages, [&](const ts::AttendJob& job, auto finish) {                       \
                                      ts::attend_tensor<T, PASSES, ATTEND_WARPS, false>(qkv, pages, job, finish);      \
                                    });                                                                            \
  }
#define ATTEND_CODES(name, BITS, WIDE, Q)                                                                          \
  extern "C" __global__ void __launch_bounds__(128, ATTEND_BLOCKS(WIDE, Q))                                        \
  name(const float* qkv, const ts::u32* pages, const ts::u32* tables, const ts::Tile* tiles,                       \
       const ts::u32* lists, const ts::u32* lengths, float* out, float* parts, float* states,                      \
       ts::PageShape shape, int group, int width, float scale, int part_pages, const __half* boxes,                \
       const __half* open, int heads) {                                                                            \
    ts::CodePages<BITS, WIDE> reader = {pages, boxes, open, heads, nullptr};                                       \
    attend_tile<Q>(tables, tiles, lists, lengths, out, parts, states, shape, group, width, scale, part_pages,      \
                   [&](const ts::AttendJob& job, auto finish) {                                                    \
                     ts::attend<ts::CodePages<BITS, WIDE>, Q, ATTEND_WARPS>(qkv, reader, job, finish);             \
                   });                                                                                             \
  }
#define ATTEND_CODES_QUERIES(name, BITS)   \
  ATTEND_CODES(name##_1, BITS, true, 1)    \
  ATTEND_CODES(name##_4, BITS, true, 4)    \
  ATTEND_CODES(name##_8, BITS, true, 8)    \
  ATTEND_CODES(name##_any, BITS, false, 4)
