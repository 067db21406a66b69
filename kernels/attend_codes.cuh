// How attention reads pages of codes, and the open page, which is in halves: that of a tile's rows.
#pragma once
#include "attend.cuh"
#include "codes.cuh"

namespace ts {

// `WIDE`: loads of 16 bytes, where page_size is a power of two and it and head_dim are multiples of 4.
template <int BITS, bool WIDE> struct CodePages {
  using C = Codes<BITS>;
  static constexpr int N = WIDE ? 4 : 1;
  static constexpr int PER_WORD = C::PER_WORD;
  static constexpr int MOST_GROUPS = BITS == 4 ? ATTEND_MOST_DIM / CODE_GROUP_CHANNELS : 1;
  const u32* pages;
  const __half* boxes;
  const __half* open;
  // Heads of all layers: the distance of two slots.
  int heads;
  // Scales, as lower halves, and minima of the values of a chunk, by group and token, in shared memory.
  u32 (*ranges)[CHUNK];

  // Place in the sequence of the page that the tile's rows are in.
  static __device__ __forceinline__ u32 own_place(const Tile& tile, PageShape shape) {
    return (tile.visible - 1) / shape.page_size;
  }

  // Pages of a chunk that hold codes: all of them but the rows' own, which comes last.
  __device__ __forceinline__ int sealed_pages(const AttendJob& job, const Chunk& chunk) const {
    u32 last = chunk.positions[chunk.pages - 1] / job.shape.page_size;
    return chunk.pages - (last == own_place(job.tile, job.shape));
  }

  template <int Q, int WARPS> __device__ __forceinline__ void scores(const AttendJob& job, const Chunk& chunk) {
    // Minimum, as lower half, and maximum of each channel of the page that a warp is at.
    TS_SHARED(u32, corners, [WARPS][ATTEND_MOST_DIM]);
    TS_SHARED(u32, of_values, [WARPS][MOST_GROUPS][CHUNK]);
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    ranges = of_values[warp];
    int dim = job.shape.head_dim, page_size = job.shape.page_size;
    int sealed = sealed_pages(job, chunk), groups = C::groups(job.shape);
    if (lane < sealed * chunk.offsets) {
      const u32* head = C::keys(pages, job.shape, chunk.page_ids[lane / chunk.offsets], job.kv_head);
      const unsigned short* scales = reinterpret_cast<const unsigned short*>(head) + C::scales(job.shape);
      for (int group = 0; group < groups; group++) {
        int at = group * page_size + chunk.piece + lane % chunk.offsets;
        ranges[group][lane] = scales[at] | u32(scales[groups * page_size + at]) << 16;
      }
    }
    for (int page = 0; page < sealed; page++) {
      u32 id = chunk.page_ids[page];
      // The lanes are done with the page before.
      __syncwarp();
      const unsigned short* box = reinterpret_cast<const unsigned short*>(boxes) + box_at(job.shape, id, job.kv_head);
      for (int channel = lane; channel < dim; channel += WARP) {
        const unsigned short* corner = box + size_t(channel) * 2 * GROUP_PAGES;
        corners[warp][channel] = corner[GROUP_PAGES] | u32(corner[0]) << 16;
      }
      __syncwarp();
      const u32* words = C::keys(pages, job.shape, id, job.kv_head) + chunk.piece;
      code_scores<Q>(words, corners[warp], job, chunk, page);
    }
    if (sealed < chunk.pages) {
      const __half* keys = open + open_at(job.shape, job.tile.open, heads, job.kv_head) + chunk.piece;
      page_scores<N, Q>(keys, job, chunk, sealed);
    }
  }

  // The words of `N` neighbours.
  static __device__ __forceinline__ void load_words(const u32* from, u32 (&raw)[N]) {
    if constexpr (WIDE) {
      uint4 four = *reinterpret_cast<const uint4*>(from);
      raw[0] = four.x;
      raw[1] = four.y;
      raw[2] = four.z;
      raw[3] = four.w;
    } else {
      raw[0] = *from;
    }
  }

  // Scores of the tokens of a sealed page; their words of keys begin at `words`.
  template <int Q>
  __device__ __forceinline__ void code_scores(const u32* words, const u32* corners, const AttendJob& job,
                                              const Chunk& chunk, int page) {
    // Words whose loads are on their way together.
    constexpr int ROWS = 4;
    int dim = job.shape.head_dim, page_size = job.shape.page_size;
    int n_words = C::key_words(job.shape), row = chunk.offsets / N;
    // A row is the tokens of a word of channels; where it is no power of two, every lane lies along it.
    Lanes lanes(WIDE ? row : WARP);
    float products[Q * N] = {};
    int token = lanes.column * N;
    bool inside = lanes.column < row;
    int end = inside ? n_words : 0;
#pragma unroll 1
    for (int first = lanes.first; first < end; first += ROWS * lanes.down) {
      u32 raw[ROWS][N];
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        int word = first + r * lanes.down;
        if (word < end) {
          load_words(words + word * page_size + token, raw[r]);
        }
      }
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
#pragma unroll
        for (int i = 0; i < PER_WORD; i++) {
          int channel = (first + r * lanes.down) * PER_WORD + i;
          if (channel < dim) {
            float least, most;
            widen_pair(corners[channel], least, most, __half());
            float step = (most - least) * (1.f / C::HIGHEST);
            float k[N];
#pragma unroll
            for (int n = 0; n < N; n++) {
              k[n] = fmaf(step, C::code(raw[r][n], i), least);
            }
#pragma unroll
            for (int q = 0; q < Q; q++) {
              float x = chunk.queries[q][channel];
#pragma unroll
              for (int n = 0; n < N; n++) {
                products[q * N + n] = fmaf(x, k[n], products[q * N + n]);
              }
            }
          }
        }
      }
    }
    store_scores<N, Q>(products, lanes, chunk, page, token, inside);
  }

  template <int Q>
  __device__ __forceinline__ void add(const AttendJob& job, const Chunk& chunk, int column, const Share& share,
                                      float (&total)[Q][N]) {
    int dim = job.shape.head_dim, sealed = sealed_pages(job, chunk);
    // Every row sees all tokens of the pages before its own.
    int n_words = (chunk.offsets + PER_WORD - 1) / PER_WORD;
    const u32* of_group = ranges[column * N / C::group_channels(job.shape)];
#pragma unroll 1
    for (int i = share.slice; i < sealed * n_words; i += share.slices) {
      int page = i / n_words, word = i % n_words;
      const u32* values = C::keys(pages, job.shape, chunk.page_ids[page], job.kv_head) + C::values(job.shape);
      const u32* from = values + size_t(chunk.piece / PER_WORD + word) * dim + column * N;
      u32 raw[N];
      load_words(from, raw);
#pragma unroll
      for (int t = 0; t < PER_WORD; t++) {
        int offset = word * PER_WORD + t;
        if (offset < chunk.offsets) {
          int token = page * chunk.offsets + offset;
          float scale, minimum;
          widen_pair(of_group[token], scale, minimum, __half());
          float x[N];
          for (int n = 0; n < N; n++) {
            x[n] = fmaf(scale, C::code(raw[n], t), minimum);
          }
#pragma unroll
          for (int q = 0; q < Q; q++) {
            float weight = chunk.weights[q][token];
            for (int n = 0; n < N; n++) {
              total[q][n] = fmaf(weight, x[n], total[q][n]);
            }
          }
        }
      }
    }
    if (sealed < chunk.pages) {
      const __half* values = open + open_at(job.shape, job.tile.open, heads, job.kv_head) +
                             size_t(job.shape.page_size) * dim;
      for (int offset = share.slice; offset < chunk.offsets; offset += share.slices) {
        // What lies beyond the sequence may be anything.
        if (chunk.positions[sealed] + offset < chunk.seen) {
          Packed<__half, N> packed;
          packed.load(values + size_t(chunk.piece + offset) * dim + column * N);
          float x[N];
          packed.widen_to(x);
          add_value<Q>(x, chunk, sealed * chunk.offsets + offset, total);
        }
      }
    }
  }

  __device__ __forceinline__ float key(const Tile& tile, PageShape shape, int kv_head, u32 page, u32 place,
                                       int token, int channel) const {
    if (place == own_place(tile, shape)) {
      return widen(open[open_at(shape, tile.open, heads, kv_head) + size_t(channel) * shape.page_size + token]);
    }
    u32 word = C::keys(pages, shape, page, kv_head)[size_t(channel / PER_WORD) * shape.page_size + token];
    const __half* box = boxes + box_at(shape, page, kv_head) + size_t(channel) * 2 * GROUP_PAGES;
    float most = widen(box[0]), least = widen(box[GROUP_PAGES]);
    return fmaf((most - least) * (1.f / C::HIGHEST), C::code(word, channel % PER_WORD), least);
  }
};

}  // namespace ts
