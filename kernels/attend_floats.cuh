// How attention reads pages of floats.
#pragma once
#include "attend.cuh"

namespace ts {

// `WIDE`: loads of 16 bytes, where page_size is a power of two that fills one, and head_dim a multiple.
template <class T, bool WIDE> struct FloatPages {
  // Channels of a lane's vector of a value.
  static constexpr int N = WIDE ? Wide<T>::N : 1;
  const T* pages;

  // Scores of all queries and tokens of a chunk.
  template <int Q, int WARPS> __device__ __forceinline__ void scores(const AttendJob& job, const Chunk& chunk) {
    for (int page = 0; page < chunk.pages; page++) {
      const T* keys = pages + keys_at(job.shape, chunk.page_ids[page], job.kv_head) + chunk.piece;
      page_scores<N, Q>(keys, job, chunk, page);
    }
  }

  // Adds the weighted values of a slice of the tokens, in channels `column`·N and the next.
  template <int Q>
  __device__ __forceinline__ void add(const AttendJob& job, const Chunk& chunk, int column, const Share& share,
                                      float (&total)[Q][N]) {
    // Tokens whose loads are on their way together.
    constexpr int TOKENS = LOADS;
    int dim = job.shape.head_dim;
    for (int page = 0; page < chunk.pages; page++) {
      const T* values = pages + values_at(job.shape, chunk.page_ids[page], job.kv_head) + chunk.piece * dim + column * N;
      // What lies beyond the sequence may be anything.
      u32 position = chunk.positions[page];
      int end = position < chunk.seen ? int(min(u32(chunk.offsets), chunk.seen - position)) : 0;
      for (int first = share.slice; first < end; first += TOKENS * share.slices) {
        Packed<T, N> tokens[TOKENS];
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
          int offset = first + t * share.slices;
          if (offset < end) {
            tokens[t].load(values + offset * dim);
          }
        }
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
          int offset = first + t * share.slices;
          if (offset < end) {
            float x[N];
            tokens[t].widen_to(x);
            add_value<Q>(x, chunk, page * chunk.offsets + offset, total);
          }
        }
      }
    }
  }

  // Channel `channel` of the key of a token.
  __device__ __forceinline__ float key(const Tile&, PageShape shape, int kv_head, u32 page, u32, int token,
                                       int channel) const {
    return widen(pages[keys_at(shape, page, kv_head) + size_t(channel) * shape.page_size + token]);
  }
};

}  // namespace ts
