// The places with the highest ranks, exactly, in ascending order; ties go to the lower place.
//
// A radix select finds the lowest rank that is chosen, in four passes over eight bits each; one more pass
// lists the places. Of pages, the first `sink` and the last `recent` are always listed.
#pragma once
#include "ts_cuda.cuh"

namespace ts {

constexpr int SELECT_BINS = 256;

// A whole number for each score, in the same order; +0 and -0 are one.
__device__ __forceinline__ u32 rank_of(float score) {
  u32 bits = __float_as_uint(score == 0.f ? 0.f : score);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// How many lanes below this one, warps below this one included, have `flag`; `total` is all of them.
// Every thread of the block of `SELECT_BINS` threads calls it.
__device__ __forceinline__ u32 rank_in_block(bool flag, u32& total) {
  constexpr int WARPS = SELECT_BINS / WARP;
  TS_SHARED(u32, counts, [WARPS]);
  u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  u32 votes = __ballot_sync(ALL_LANES, flag);
  // What the call before left is read by all before it is replaced.
  __syncthreads();
  if (lane == 0) {
    counts[warp] = __popc(votes);
  }
  __syncthreads();
  u32 before = __popc(votes & ((1u << lane) - 1));
  total = 0;
  for (u32 i = 0; i < WARPS; i++) {
    before += i < warp ? counts[i] : 0;
    total += counts[i];
  }
  return before;
}

// Calls `take(at, place)` for each chosen one of `n` places, `at` counting them in ascending order: every
// place before `begin` and from `end` on, and of those between the `wanted` with the highest ranks, at most
// all of them. Every thread of a block of `SELECT_BINS` threads calls it.
template <class Rank, class Take>
__device__ __forceinline__ void choose(Rank rank_at, u32 n, u32 begin, u32 end, u32 wanted, Take take) {
  TS_SHARED(u32, bins, [SELECT_BINS]);
  TS_SHARED(u32, found, [2]);
  // Ranks whose bits above `shift` are those of `prefix` may be the lowest that is chosen.
  u32 prefix = 0, missing = wanted;
  for (int shift = 24; shift >= 0 && wanted > 0; shift -= 8) {
    bins[threadIdx.x] = 0;
    __syncthreads();
    for (u32 place = begin + threadIdx.x; place < end; place += SELECT_BINS) {
      u32 rank = rank_at(place);
      // In two steps: a shift by 32 is not defined.
      if (((rank >> shift) >> 8) == ((prefix >> shift) >> 8)) {
        atomicAdd(&bins[(rank >> shift) & 0xff], 1u);
      }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      u32 left = missing, bin = SELECT_BINS - 1;
      while (bins[bin] < left) {
        left -= bins[bin];
        bin--;
      }
      found[0] = bin;
      found[1] = left;
    }
    __syncthreads();
    prefix |= found[0] << shift;
    missing = found[1];
    // `bins` and `found` are written again only behind the barriers of the next pass or below.
    __syncthreads();
  }
  u32 chosen = 0, ties = 0;
  for (u32 first = 0; first < n; first += SELECT_BINS) {
    u32 place = first + threadIdx.x, n_ties, n_kept;
    bool candidate = place >= begin && place < end && wanted > 0;
    u32 rank = candidate ? rank_at(place) : 0;
    bool tie = candidate && rank == prefix;
    u32 before = rank_in_block(tie, n_ties);
    bool keep = place < n && (place < begin || place >= end || (candidate && rank > prefix) ||
                              (tie && ties + before < missing));
    u32 at = rank_in_block(keep, n_kept);
    if (keep) {
      take(chosen + at, place);
    }
    chosen += n_kept;
    ties += n_ties;
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
