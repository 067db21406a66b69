// The score of a page: the largest product that any key in its box could have with a query.
//
//   score = max over the group's queries of  Σ_d max(q_d·min_d, q_d·max_d)
//
// Terms are added in channel order with fused multiply-adds, so that a score is, to the last bit, what
// the CPU's vector kernels compute: both choose the same pages.
#pragma once
#include "pages.cuh"

namespace ts {

// Pages whose boxes are loaded together: 16 bytes of one corner.
template <class T> struct ScorePages {
  static constexpr int N = Wide<T>::N;
};

// A score that is not a number bounds nothing: its page is read.
__device__ __forceinline__ float ranked(float score) { return score != score ? INFINITY : score; }

// Scores `N` pages whose boxes begin at `box` and lie side by side.
//
// `queries` is [group, head_dim] in shared memory.
template <class T, int N>
__device__ __forceinline__ void score_pages(const T* box, const float* queries, int group, int dim,
                                            float (&scores)[N]) {
  constexpr int QUERIES = 4;
  for (int n = 0; n < N; n++) {
    scores[n] = -INFINITY;
  }
  for (int first = 0; first < group; first += QUERIES) {
    float sums[QUERIES][N] = {};
#pragma unroll 4
    for (int channel = 0; channel < dim; channel++) {
      const T* corners = box + size_t(channel) * 2 * GROUP_PAGES;
      // The sign of a query's channel says which corner counts; a lone query reads no other.
      bool low = group == 1 && queries[channel] < 0.f;
      float most[N], least[N];
      if constexpr (N == 1) {
        most[0] = widen(corners[low ? GROUP_PAGES : 0]);
        least[0] = group == 1 ? most[0] : widen(corners[GROUP_PAGES]);
      } else {
        load_wide(corners + (low ? GROUP_PAGES : 0), most);
        if (group == 1) {
          for (int n = 0; n < N; n++) {
            least[n] = most[n];
          }
        } else {
          load_wide(corners + GROUP_PAGES, least);
        }
      }
      for (int i = 0; i < QUERIES; i++) {
        if (first + i < group) {
          float q = queries[(first + i) * dim + channel];
          for (int n = 0; n < N; n++) {
            sums[i][n] = fmaf(q, q < 0.f ? least[n] : most[n], sums[i][n]);
          }
        }
      }
    }
    for (int i = 0; i < QUERIES; i++) {
      for (int n = 0; n < N && first + i < group; n++) {
        scores[n] = fmaxf(scores[n], ranked(sums[i][n]));
      }
    }
  }
}

// Scores pages `first`..`first + ScorePages<T>::N` of a table of `pages` pages into `scores` [pages].
//
// Pages that lie side by side in one group are loaded together, others one by one.
template <class T>
__device__ __forceinline__ void score_run(const T* boxes, const u32* table, u32 pages, u32 first, int kv_head,
                                          const float* queries, int group, PageShape shape, float* scores) {
  constexpr u32 N = ScorePages<T>::N;
  bool together = first + N <= pages && table[first] % N == 0;
  for (u32 n = 1; n < N && together; n++) {
    together = table[first + n] == table[first] + n;
  }
  if (together) {
    float found[N];
    score_pages<T, int(N)>(boxes + box_at(shape, table[first], kv_head), queries, group, shape.head_dim, found);
    for (u32 n = 0; n < N; n++) {
      scores[first + n] = found[n];
    }
    return;
  }
  for (u32 page = first; page < first + N && page < pages; page++) {
    float found[1];
    score_pages<T, 1>(boxes + box_at(shape, table[page], kv_head), queries, group, shape.head_dim, found);
    scores[page] = found[0];
  }
}

}  // namespace ts
