// Scores every page of the tiles that select.
//
// qkv [rows, width] f32, of which the queries [kv_heads·group, head_dim] come first; boxes as pages.cuh
// has them; scores [tiles, kv_heads, most_pages] f32.
// Grid (selecting tiles, kv_heads, ceil(most_pages / 64)), block 128: 64 places of a table each. Where their pages
// are of one group or two, as the pool hands them out, the boxes of a whole group come through shared memory: in
// the order of channels, each warp for queries of its own. Elsewhere a thread scores a page.
// Dynamic shared memory: group·head_dim floats.
// Must move pages·head_dim·2·element bytes per KV head, half of it when one query head reads it.
#include "score.cuh"
#include "tile.cuh"

namespace ts {

constexpr int SCORE_THREADS = 128;
constexpr int SCORE_WARPS = SCORE_THREADS / WARP;
// Stages of the ring that boxes come through, and 16-byte pieces of one.
constexpr int SCORE_STAGES = 3;
constexpr int SCORE_PIECES = 256;
// Most queries that boxes are read for at once.
constexpr int SCORE_QUERIES = 4 * SCORE_WARPS;

// Loads two elements that lie side by side.
__device__ __forceinline__ void load_pair(const float* p, float& low, float& high) {
  float2 pair = *reinterpret_cast<const float2*>(p);
  low = pair.x;
  high = pair.y;
}

template <class T> __device__ __forceinline__ void load_pair(const T* p, float& low, float& high) {
  widen_pair(*reinterpret_cast<const u32*>(p), low, high, T());
}

// Scores all pages of a group, whose boxes begin at `run`, for `n` queries; `found[warp]` is the largest over the
// warp's, of which there are at most `Q`. Every thread of the block calls it. The queries
// may be on their way, unless one is alone.
template <class T, int Q>
__device__ __forceinline__ void score_group(const T* run, const float* queries, int n, bool lone, int dim,
                                            uint4* ring, float (*found)[GROUP_PAGES]) {
  // 16-byte pieces of a corner, and channels of a stage.
  constexpr int CORNER = GROUP_PAGES * int(sizeof(T)) / 16, CHANNELS = SCORE_PIECES / (2 * CORNER);
  // Channels that a query's numbers are loaded for together, and turns of them.
  constexpr int TOGETHER = 4, UNROLL = Q == 1 ? 2 : 1;
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  int stages = (dim + CHANNELS - 1) / CHANNELS;
  auto fetch = [&](int stage) {
    int first = stage * CHANNELS, pieces = min(CHANNELS, dim - first) * 2 * CORNER;
#pragma unroll
    for (int n = 0; n < SCORE_PIECES / SCORE_THREADS; n++) {
      int i = n * SCORE_THREADS + threadIdx.x, corner = i / CORNER;
      // A lone query reads no other corner than that which counts.
      if (i < pieces && (!lone || (corner % 2 == 1) == (queries[first + corner / 2] < 0.f))) {
        const uint4* from = reinterpret_cast<const uint4*>(run) + size_t(first) * 2 * CORNER + i;
        __pipeline_memcpy_async(&ring[stage % SCORE_STAGES * SCORE_PIECES + i], from, 16);
      }
    }
  };
  for (int stage = 0; stage < SCORE_STAGES - 1; stage++) {
    if (stage < stages) {
      fetch(stage);
    }
    __pipeline_commit();
  }
  float sums[Q][2] = {};
#pragma unroll 1
  for (int stage = 0; stage < stages; stage++) {
    __pipeline_wait_prior(SCORE_STAGES - 2);
    // All have their pieces and the queries, and are done with the stage before, which is filled again.
    __syncthreads();
    if (stage + SCORE_STAGES - 1 < stages) {
      fetch(stage + SCORE_STAGES - 1);
    }
    __pipeline_commit();
    // The corners of the next channel.
    const T* most = reinterpret_cast<const T*>(ring + stage % SCORE_STAGES * SCORE_PIECES) + 2 * lane;
    const T* least = most + GROUP_PAGES;
    int first = stage * CHANNELS, channels = warp < n ? min(CHANNELS, dim - first) : 0;
    // The last query again where there are no more.
    auto numbers = [&](int i, int channel) {
      return queries + min(warp + i * SCORE_WARPS, n - 1) * dim + first + channel;
    };
    auto add = [&](int i, int channel, float q) {
      float low, high;
      load_pair((q < 0.f ? least : most) + 2 * channel * GROUP_PAGES, low, high);
      sums[i][0] = fmaf(q, low, sums[i][0]);
      sums[i][1] = fmaf(q, high, sums[i][1]);
    };
    int channel = 0;
    // Rows of queries that 16 bytes do not divide begin at any address.
    if (dim % TOGETHER == 0) {
#pragma unroll UNROLL
      for (; channel + TOGETHER <= channels; channel += TOGETHER) {
#pragma unroll
        for (int i = 0; i < Q; i++) {
          float q[TOGETHER];
          load_wide(numbers(i, channel), q);
#pragma unroll
          for (int c = 0; c < TOGETHER; c++) {
            add(i, c, q[c]);
          }
        }
        most += 2 * TOGETHER * GROUP_PAGES;
        least += 2 * TOGETHER * GROUP_PAGES;
      }
    }
#pragma unroll 1
    for (; channel < channels; channel++) {
#pragma unroll
      for (int i = 0; i < Q; i++) {
        add(i, 0, *numbers(i, channel));
      }
      most += 2 * GROUP_PAGES;
      least += 2 * GROUP_PAGES;
    }
  }
  float best[2] = {-INFINITY, -INFINITY};
#pragma unroll
  for (int i = 0; i < Q; i++) {
    if (warp < n) {
      best[0] = fmaxf(best[0], ranked(sums[i][0]));
      best[1] = fmaxf(best[1], ranked(sums[i][1]));
    }
  }
  found[warp][2 * lane] = best[0];
  found[warp][2 * lane + 1] = best[1];
}

template <class T>
__device__ __forceinline__ void score_tile(const float* qkv, const T* boxes, const u32* tables, const Tile* tiles,
                                           const u32* selecting, float* scores, PageShape shape, int group,
                                           int width, int most_pages) {
  TS_DYN_SHARED(float, queries);
  TS_SHARED(uint4, ring, [SCORE_STAGES * SCORE_PIECES]);
  TS_SHARED(float, found, [SCORE_WARPS][GROUP_PAGES]);
  TS_SHARED(u32, scattered, [1]);
  u32 number = selecting[blockIdx.x];
  if (number == NO_TILE) {
    wait_for_launches();
    return;
  }
  Tile tile = tiles[number];
  int kv_head = blockIdx.y, dim = shape.head_dim;
  u32 pages = pages_seen(tile, shape.page_size), first = blockIdx.z * GROUP_PAGES;
  if (first >= pages) {
    wait_for_launches();
    return;
  }
  u32 n = min(GROUP_PAGES, pages - first);
  const u32* table = tables + tile.table + first;
  // The thread's own page, and the groups that the others may be of.
  u32 page = table[min(threadIdx.x, n - 1)], one = table[0] / GROUP_PAGES, two = table[n - 1] / GROUP_PAGES;
  if (threadIdx.x == 0) {
    scattered[0] = 0;
  }
  __syncthreads();
  u32 its = page / GROUP_PAGES;
  if (its != one && its != two) {
    atomicOr(&scattered[0], 1u);
  }
  __syncthreads();
  wait_for_launches();
  float* out = scores + (size_t(blockIdx.x) * shape.kv_heads + kv_head) * most_pages + first;
  const float* from = qkv + size_t(tile.row) * width + size_t(kv_head) * group * dim;
#pragma unroll 1
  for (int i = threadIdx.x; i < group * dim; i += SCORE_THREADS) {
    __pipeline_memcpy_async(&queries[i], &from[i], sizeof *queries);
  }
  if (scattered[0] || group == 1) {
    __pipeline_commit();
    __pipeline_wait_prior(0);
    __syncthreads();
  }
  if (scattered[0]) {
    if (threadIdx.x < n) {
      float score[1];
      score_pages<T, 1>(boxes + box_at(shape, page, kv_head), queries, group, dim, score);
      out[threadIdx.x] = score[0];
    }
    return;
  }
  for (int turn = 0; turn < (one == two ? 1 : 2); turn++) {
    u32 now = turn == 0 ? one : two;
    const T* run = boxes + box_at(shape, now * GROUP_PAGES, kv_head);
    float best = -INFINITY;
    for (int query = 0; query < group; query += SCORE_QUERIES) {
      const float* its_queries = queries + query * dim;
      int rest = min(SCORE_QUERIES, group - query);
      if (rest <= SCORE_WARPS) {
        score_group<T, 1>(run, its_queries, rest, group == 1, dim, ring, found);
      } else {
        score_group<T, SCORE_QUERIES / SCORE_WARPS>(run, its_queries, rest, false, dim, ring, found);
      }
      __syncthreads();
      for (int warp = 0; warp < SCORE_WARPS; warp++) {
        best = fmaxf(best, found[warp][page % GROUP_PAGES]);
      }
      // What was found is replaced behind the barriers of the next stages.
    }
    if (threadIdx.x < n && its == now) {
      out[threadIdx.x] = best;
    }
  }
}

}  // namespace ts

#define SCORE_PAGES(name, T)                                                                                \
  extern "C" __global__ void __launch_bounds__(128)                                                         \
  name(const float* qkv, const T* boxes, const ts::u32* tables, const ts::Tile* tiles,                      \
       const ts::u32* selecting, float* scores, ts::PageShape shape, int group, int width, int most_pages) { \
    ts::score_tile(qkv, boxes, tables, tiles, selecting, scores, shape, group, width, most_pages);          \
  }
SCORE_PAGES(score_pages_f32, float)
SCORE_PAGES(score_pages_f16, __half)
SCORE_PAGES(score_pages_bf16, __nv_bfloat16)
