// Scores every page of the tiles that select by the mean and the standard deviation of its keys.
//
//   score = max over the group's queries of  q·mean + Σ_d |q_d|·deviation_d
//
// qkv [rows, width] f32, of which the queries [kv_heads·group, head_dim] come first; pages as pages.cuh and
// codes.cuh have them; scores [tiles, kv_heads, most_pages] f32. Every sum is taken in the order of
// tinyserve-kv's `mean-std`, and rounded as there: pages that are alike there are alike here.
// Grid (selecting tiles, kv_heads, ceil(most_pages / 8)), block 128: threads take the channels of eight pages,
// then one thread each query of a page.
// Must move tokens·head_dim·element bytes per KV head: there is no summary that lies ready, as boxes do.
#include "attend_codes.cuh"
#include "attend_floats.cuh"
#include "score.cuh"

constexpr int MOMENT_PAGES = 8;
constexpr int MOMENT_THREADS = 128;

template <class Reader>
__device__ __forceinline__ void score_moments(const float* qkv, const Reader& reader, const ts::u32* tables,
                                              const ts::Tile* tiles, const ts::u32* selecting, float* scores,
                                              ts::PageShape shape, int group, int width, int most_pages) {
  TS_SHARED(float, means, [MOMENT_PAGES][ts::ATTEND_MOST_DIM]);
  TS_SHARED(float, deviations, [MOMENT_PAGES][ts::ATTEND_MOST_DIM]);
  TS_SHARED(float, found, [MOMENT_PAGES][MOMENT_THREADS / MOMENT_PAGES]);
  ts::wait_for_launches();
  ts::u32 number = selecting[blockIdx.x];
  if (number == ts::NO_TILE) {
    return;
  }
  ts::Tile tile = tiles[number];
  int kv_head = blockIdx.y, dim = shape.head_dim, size = shape.page_size;
  int first = blockIdx.z * MOMENT_PAGES;
  int pages = min(MOMENT_PAGES, int(ts::pages_seen(tile, size)) - first);
  if (pages <= 0) {
    return;
  }
  for (int i = threadIdx.x; i < pages * dim; i += MOMENT_THREADS) {
    int page = i / dim, channel = i % dim;
    ts::u32 place = first + page, id = tables[tile.table + place];
    int n = min(size, int(tile.visible) - int(place) * size);
    float mean = 0.f, variance = 0.f;
    for (int token = 0; token < n; token++) {
      float k = reader.key(tile, shape, kv_head, id, place, token, channel);
      mean = __fadd_rn(mean, __fdiv_rn(k, float(n)));
    }
    for (int token = 0; token < n; token++) {
      float apart = __fadd_rn(reader.key(tile, shape, kv_head, id, place, token, channel), -mean);
      variance = __fadd_rn(variance, __fdiv_rn(__fmul_rn(apart, apart), float(n)));
    }
    means[page][channel] = mean;
    deviations[page][channel] = sqrtf(variance);
  }
  __syncthreads();
  const float* queries = qkv + size_t(tile.row) * width + size_t(kv_head) * group * dim;
  constexpr int LANES = MOMENT_THREADS / MOMENT_PAGES;
  int page = threadIdx.x / LANES, lane = threadIdx.x % LANES;
  float best = -INFINITY;
  for (int head = lane; head < group && page < pages; head += LANES) {
    float sum = 0.f;
    for (int channel = 0; channel < dim; channel++) {
      float q = queries[size_t(head) * dim + channel];
      float term = __fadd_rn(__fmul_rn(q, means[page][channel]), __fmul_rn(fabsf(q), deviations[page][channel]));
      sum = __fadd_rn(sum, term);
    }
    best = fmaxf(best, ts::ranked(sum));
  }
  found[page][lane] = best;
  __syncthreads();
  if (threadIdx.x < pages) {
    float* out = scores + (size_t(blockIdx.x) * shape.kv_heads + kv_head) * most_pages + first;
    float score = -INFINITY;
    for (int i = 0; i < LANES; i++) {
      score = fmaxf(score, found[threadIdx.x][i]);
    }
    out[threadIdx.x] = score;
  }
}

#define SCORE_FLOATS(name, T)                                                                               \
  extern "C" __global__ void __launch_bounds__(128)                                                         \
  name(const float* qkv, const T* pages, const ts::u32* tables, const ts::Tile* tiles,                      \
       const ts::u32* selecting, float* scores, ts::PageShape shape, int group, int width, int most_pages) { \
    ts::FloatPages<T, false> reader = {pages};                                                              \
    score_moments(qkv, reader, tables, tiles, selecting, scores, shape, group, width, most_pages);          \
  }
SCORE_FLOATS(score_moments_f32, float)
SCORE_FLOATS(score_moments_f16, __half)
SCORE_FLOATS(score_moments_bf16, __nv_bfloat16)

#define SCORE_CODES(name, BITS)                                                                             \
  extern "C" __global__ void __launch_bounds__(128)                                                         \
  name(const float* qkv, const ts::u32* pages, const ts::u32* tables, const ts::Tile* tiles,                \
       const ts::u32* selecting, float* scores, ts::PageShape shape, int group, int width, int most_pages,  \
       const __half* boxes, const __half* open, int heads) {                                                \
    ts::CodePages<BITS, false> reader = {pages, boxes, open, heads, nullptr};                               \
    score_moments(qkv, reader, tables, tiles, selecting, scores, shape, group, width, most_pages);          \
  }
SCORE_CODES(score_moments_int8, 8)
SCORE_CODES(score_moments_int4, 4)
