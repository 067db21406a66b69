// The likeliest tokens of rows of logits, and what makes probabilities of them: a draw without the logits.
//
// logits [·, vocab] f32, rows [n], each a row of them; a record is 2 + 2·k words: the largest logit, the sum
// of exp(logit - largest), k tokens and their logits, largest first, ties to the lower token; k is at most 128.
//
// top_logits_parts: the records parts [n, slices] of slices of 8192 logits. A slice of fewer than k tokens is
// filled up with NO_TOKEN. Grid (slices, n), block 256.
// Must move n·vocab·4 bytes of logits; the passes after the first read them out of the caches.
//
// top_logits_merge: the records out [n] of whole rows; k is at most vocab. Grid (n), block 256.
// Must move n·slices·(2 + 2·k)·4 bytes.
#include "block.cuh"
#include "select.cuh"

constexpr ts::u32 LOGITS_SLICE = 8192;
constexpr ts::u32 MOST_TOP = 128;
constexpr ts::u32 NO_TOKEN = 0xffffffffu;
constexpr int TOP_WARPS = ts::SELECT_BINS / ts::WARP;

// Calls `take(at, place)` for the `k` of `n` places with the highest ranks, `at` counting from the best.
template <class Rank, class Take>
__device__ __forceinline__ void best_first(Rank rank_at, ts::u32 n, ts::u32 k, Take take) {
  TS_SHARED(ts::u32, places, [MOST_TOP]);
  TS_SHARED(ts::u32, ranks, [MOST_TOP]);
  ts::choose(rank_at, n, 0, n, k, [&](ts::u32 at, ts::u32 place) {
    places[at] = place;
    ranks[at] = rank_at(place);
  });
  __syncthreads();
  if (threadIdx.x < k) {
    ts::u32 own = ranks[threadIdx.x], better = 0;
    for (ts::u32 i = 0; i < k; i++) {
      better += ranks[i] > own || (ranks[i] == own && i < threadIdx.x);
    }
    take(better, places[threadIdx.x]);
  }
}

extern "C" __global__ void __launch_bounds__(256)
top_logits_parts(const float* logits, const ts::u32* rows, ts::u32* parts, int vocab, int k) {
  ts::wait_for_launches();
  ts::u32 begin = blockIdx.x * LOGITS_SLICE, n = min(LOGITS_SLICE, ts::u32(vocab) - begin);
  const float* x = logits + size_t(rows[blockIdx.y]) * vocab + begin;
  ts::u32* part = parts + (size_t(blockIdx.y) * gridDim.x + blockIdx.x) * (2 + 2 * k);
  float largest = -INFINITY;
  for (ts::u32 i = threadIdx.x; i < n; i += blockDim.x) {
    largest = fmaxf(largest, x[i]);
  }
  largest = ts::block_max<TOP_WARPS>(largest);
  // Where nothing is above -∞, nothing can be taken off. What is not a number stays so.
  float taken_off = largest == -INFINITY ? 0.f : largest, sum = 0.f;
  for (ts::u32 i = threadIdx.x; i < n; i += blockDim.x) {
    sum += expf(x[i] - taken_off);
  }
  sum = ts::block_sum<TOP_WARPS>(sum);
  if (threadIdx.x == 0) {
    part[0] = __float_as_uint(largest);
    part[1] = __float_as_uint(sum);
  }
  ts::u32 *tokens = part + 2, *values = tokens + k;
  ts::u32 found = min(n, ts::u32(k));
  best_first([&](ts::u32 i) { return ts::rank_of(x[i]); }, n, found, [&](ts::u32 at, ts::u32 i) {
    tokens[at] = begin + i;
    values[at] = __float_as_uint(x[i]);
  });
  for (ts::u32 i = found + threadIdx.x; i < ts::u32(k); i += blockDim.x) {
    tokens[i] = NO_TOKEN;
    values[i] = __float_as_uint(-INFINITY);
  }
}

extern "C" __global__ void __launch_bounds__(256)
top_logits_merge(const ts::u32* parts, ts::u32* out, int slices, int k) {
  ts::wait_for_launches();
  ts::u32 record = 2 + 2 * k;
  parts += size_t(blockIdx.x) * slices * record;
  out += size_t(blockIdx.x) * record;
  if (threadIdx.x == 0) {
    float largest = -INFINITY, sum = 0.f;
    for (int i = 0; i < slices; i++) {
      largest = fmaxf(largest, __uint_as_float(parts[size_t(i) * record]));
    }
    for (int i = 0; i < slices; i++) {
      const ts::u32* part = parts + size_t(i) * record;
      sum += __uint_as_float(part[1]) * expf(__uint_as_float(part[0]) - largest);
    }
    out[0] = __float_as_uint(largest);
    out[1] = __float_as_uint(sum);
  }
  // Slices come in the order of their tokens, and so do equal logits of a slice: of equal ones the lower token
  // is at the lower place.
  auto token_at = [&](ts::u32 i) { return parts + size_t(i / k) * record + 2 + i % k; };
  auto rank_at = [&](ts::u32 i) {
    const ts::u32* token = token_at(i);
    // No token ranks below the lowest that there is, which is -∞'s.
    return *token == NO_TOKEN ? 0 : ts::rank_of(__uint_as_float(token[k]));
  };
  best_first(rank_at, ts::u32(slices * k), ts::u32(k), [&](ts::u32 at, ts::u32 i) {
    const ts::u32* token = token_at(i);
    out[2 + at] = *token;
    out[2 + k + at] = token[k];
  });
}
