// How attention reads pages of floats.
#pragma once
#include "attend.cuh"

namespace ts {

// `WIDE`: loads of 16 bytes, where page_size is a power of two that fills one, and head_dim a multiple.
template <class T, bool WIDE> struct FloatPages {
  // Channels of a thread's vector of a value.
  static constexpr int N = WIDE ? Wide<T>::N : 1;
  const T* pages;

  // Scores of all queries and tokens of a chunk.
  template <int Q, int WARPS> __device__ __forceinline__ void scores(const AttendJob& job, const Chunk& chunk) {
    for (int page = threadIdx.x / WARP; page < chunk.pages; page += WARPS) {
      const T* keys = pages + keys_at(job.shape, chunk.page_ids[page], job.kv_head) + chunk.piece;
      page_scores<N, Q>(keys, job, chunk, page);
    }
  }

  // Adds the weighted values of a slice of the tokens, in channels `column`·N and the next.
  template <int Q>
  __device__ __forceinline__ void add(const AttendJob& job, const Chunk& chunk, int column, const Share& share,
                                      float (&total)[Q][N]) {
    int dim = job.shape.head_dim, n_tokens = chunk.pages * chunk.offsets;
#pragma unroll(Q > 4 ? 1 : 2)
    for (int token = share.slice; token < n_tokens; token += share.slices) {
      int page = token / chunk.offsets, offset = token % chunk.offsets;
      u32 position = chunk.positions[page] + offset;
      // What lies beyond the sequence may be anything.
      if (position < chunk.seen) {
        const T* values = pages + values_at(job.shape, chunk.page_ids[page], job.kv_head);
        add_value<Q, N>(values + size_t(chunk.piece + offset) * dim + column * N, chunk, token, position, total);
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
