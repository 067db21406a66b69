// The places with the highest ranks, exactly, in ascending order; ties go to the lower place.
//
// A radix select finds the lowest rank that is chosen, in at most four passes over eight bits each; one more
// pass lists the places. Of pages, the first `sink` and the last `recent` are always listed.
#pragma once
#include "ts_cuda.cuh"

namespace ts {

constexpr int SELECT_BINS = 256;

// A whole number for each score, in the same order; +0 and -0 are one.
__device__ __forceinline__ u32 rank_of(float score) {
  u32 bits = __float_as_uint(score == 0.f ? 0.f : score);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Places that a thread lists at a time, side by side, and those of the block.
constexpr int SELECT_RUN = 8;
constexpr u32 SELECT_TILE = SELECT_BINS * SELECT_RUN;

// The sum of `x` over the lanes of a warp up to this one.
__device__ __forceinline__ u32 sum_up_to(u32 x) {
  u32 lane = threadIdx.x % WARP;
  for (int step = 1; step < WARP; step *= 2) {
    u32 below = __shfl_up_sync(ALL_LANES, x, step);
    x += lane >= u32(step) ? below : 0;
  }
  return x;
}

// The bin with the `wanted`th element from the top, how many of them are its own, and how many it has.
struct Found {
  u32 bin, wanted, has;
};

// Every lane of a warp calls it, and gets the same; `bins` [SELECT_BINS] has `wanted` elements, which are 1 at least.
__device__ __forceinline__ Found find_bin(const u32* bins, u32 wanted) {
  constexpr int BINS = SELECT_BINS / WARP;
  u32 lane = threadIdx.x % WARP, counts[BINS], sum = 0;
  // The first lane has the highest bins.
  const u32* own = bins + (WARP - 1 - lane) * BINS;
#pragma unroll
  for (int i = 0; i < BINS; i++) {
    counts[i] = own[i];
    sum += counts[i];
  }
  u32 up_to = sum_up_to(sum), above = up_to - sum;
  Found found = {0, 0, 0};
#pragma unroll
  for (int i = BINS - 1; i >= 0; i--) {
    if (above < wanted && wanted <= above + counts[i]) {
      found = {(WARP - 1 - lane) * BINS + i, wanted - above, counts[i]};
    }
    above += counts[i];
  }
  int from = __ffs(__ballot_sync(ALL_LANES, found.has > 0)) - 1;
  found.bin = __shfl_sync(ALL_LANES, found.bin, from);
  found.wanted = __shfl_sync(ALL_LANES, found.wanted, from);
  found.has = __shfl_sync(ALL_LANES, found.has, from);
  return found;
}

// Calls `take(at, place)` for each chosen one of `n` places, `at` counting them in ascending order: every
// place before `begin` and from `end` on, and of those between the `wanted` with the highest ranks, at most
// all of them. Every thread of a block of `SELECT_BINS` threads calls it.
//
// Ranks of the first `SELECT_TILE` places stay in registers; those behind are read again in every pass.
template <class Rank, class Take>
__device__ __forceinline__ void choose(Rank rank_at, u32 n, u32 begin, u32 end, u32 wanted, Take take) {
  constexpr int PASSES = 4, WARPS = SELECT_BINS / WARP;
  // One array a pass, so that none is cleared while others still read it.
  TS_SHARED(u32, bins, [PASSES][SELECT_BINS]);
  TS_SHARED(u32, totals, [2][WARPS]);
  u32 ranks[SELECT_RUN];
  auto is_candidate = [&](u32 place) { return wanted > 0 && place >= begin && place < end; };
  auto read_run = [&](u32 first) {
#pragma unroll
    for (int i = 0; i < SELECT_RUN; i++) {
      ranks[i] = is_candidate(first + i) ? rank_at(first + i) : 0;
    }
  };
  for (int pass = 0; pass < PASSES; pass++) {
    bins[pass][threadIdx.x] = 0;
  }
  read_run(threadIdx.x * SELECT_RUN);
  __syncthreads();
  // Ranks whose bits above `shift` are those of `prefix` may be the lowest that is chosen.
  u32 prefix = 0, missing = wanted;
  bool open = wanted > 0;
#pragma unroll 1
  for (int pass = 0; pass < PASSES && open; pass++) {
    int shift = 24 - 8 * pass;
    u32 bin = 0, count = 0;
    // Neighbours are often alike: those of one bin are added at once.
    auto add = [&](u32 place, u32 rank) {
      // In two steps: a shift by 32 is not defined.
      if (is_candidate(place) && ((rank >> shift) >> 8) == ((prefix >> shift) >> 8)) {
        u32 its = (rank >> shift) & 0xff;
        if (its != bin && count > 0) {
          atomicAdd(&bins[pass][bin], count);
          count = 0;
        }
        bin = its;
        count++;
      }
    };
#pragma unroll
    for (int i = 0; i < SELECT_RUN; i++) {
      add(threadIdx.x * SELECT_RUN + i, ranks[i]);
    }
    for (u32 place = SELECT_TILE + threadIdx.x; place < end; place += SELECT_BINS) {
      add(place, is_candidate(place) ? rank_at(place) : 0);
    }
    if (count > 0) {
      atomicAdd(&bins[pass][bin], count);
    }
    __syncthreads();
    // Each warp for itself: no barrier is needed before all know.
    Found found = find_bin(bins[pass], missing);
    prefix |= found.bin << shift;
    missing = found.wanted;
    // When all of the bin are chosen, none of its ranks need be told apart.
    open = found.wanted < found.has;
  }
  u32 chosen = 0, ties = 0, turn = 0;
#pragma unroll 1
  for (u32 tile = 0; tile < n; tile += SELECT_TILE) {
    u32 first = tile + threadIdx.x * SELECT_RUN;
    if (tile > 0) {
      read_run(first);
    }
    auto is_tie = [&](int i) { return is_candidate(first + i) && ranks[i] == prefix; };
    auto is_sure = [&](int i) {
      u32 place = first + i;
      return place < n && (place < begin || place >= end || (is_candidate(place) && ranks[i] > prefix));
    };
    // Ties in the low half, places that are chosen in any case in the high one.
    u32 own = 0;
#pragma unroll
    for (int i = 0; i < SELECT_RUN; i++) {
      own += (is_tie(i) ? 1u : 0u) + (is_sure(i) ? 1u << 16 : 0u);
    }
    u32 before = sum_up_to(own), all = 0;
    if (threadIdx.x % WARP == WARP - 1) {
      totals[turn][threadIdx.x / WARP] = before;
    }
    before -= own;
    __syncthreads();
    for (u32 i = 0; i < WARPS; i++) {
      before += i < threadIdx.x / WARP ? totals[turn][i] : 0;
      all += totals[turn][i];
    }
    // What is read here is replaced two tiles on, behind the barrier of the next one.
    turn ^= 1;
    u32 tie = ties + (before & 0xffff);
    u32 at = chosen + (before >> 16) + min(tie, missing) - min(ties, missing);
#pragma unroll
    for (int i = 0; i < SELECT_RUN; i++) {
      bool tied = is_tie(i);
      if (is_sure(i) || (tied && tie < missing)) {
        take(at, first + i);
        at++;
      }
      tie += tied;
    }
    u32 ties_after = ties + (all & 0xffff);
    chosen += (all >> 16) + min(ties_after, missing) - min(ties, missing);
    ties = ties_after;
  }
}

// Lists min(pages, max(budget, sink + recent)) pages of `scores` [pages] in `list`; recent is 1 at least.
// Every thread of a block of `SELECT_BINS` threads calls it.
__device__ __forceinline__ void select_pages(const float* scores, u32 pages, u32 budget, u32 sink, u32 recent,
                                             u32* list) {
  sink = min(sink, pages);
  u32 tail = pages - min(recent, pages - sink);
  u32 kept = sink + pages - tail;
  u32 wanted = min(budget > kept ? budget - kept : 0u, tail - sink);
  choose([&](u32 page) { return rank_of(scores[page]); }, pages, sink, tail, wanted,
         [&](u32 at, u32 page) { list[at] = page; });
}

}  // namespace ts
