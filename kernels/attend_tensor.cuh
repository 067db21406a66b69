// Attention over pages of 16-bit floats on tensor cores: one pass over keys and values for up to eight queries.
//
// Warps share out the pages in chunks of 64 tokens, of which a lane quartet g (lanes 4g to 4g + 3) loads the keys of
// tokens 8g to 8g + 7 and vectors of channels of the values; a lane holds the scores of query g and tokens 16t to
// 16t + 15, with t its place in the quartet. Products are of halves with sums in f32. A query's channels and its
// weights go in as sums of halves: the higher ones as rows 0 to 7 of a tile, the lower ones as rows 8 to 15, so that
// one product of tiles takes in both, to 22 bits; bf16 has a third part, in a tile of its own.
//
// Nothing but page ids is exchanged before the warps are merged. The order of every sum depends on the list alone.
#pragma once
#include "attend.cuh"

namespace ts {

constexpr int TENSOR_QUERIES = 8;
constexpr int TENSOR_TOKENS = 64;
// Channels of a step of the scores, and of a pass over the values.
constexpr int STEP_CHANNELS = 16;
constexpr int PASS_CHANNELS = 64;
// Distance of the sums of one channel of all lanes in shared memory: no two that are read together share a bank.
constexpr int SUM_STRIDE = WARP + 1;
// Weights are multiplied with 2 to the power of it, so that small ones keep their digits as sums of halves.
constexpr float WEIGHT_POWER = 14.f, WEIGHT_FACTOR = 16384.f;

// Two numbers as a sum of pairs of halves: the highest one first. `INFINITE` is the exponent of what is no number.
template <class T> struct Parts;

template <> struct Parts<__half> {
  static constexpr int N = 2;
  static constexpr u32 INFINITE = 0x7c00;
  u32 of[N];
  __device__ __forceinline__ Parts(float low, float high) {
    for (int i = 0; i < N; i++) {
      __half a = __float2half(low), b = __float2half(high);
      of[i] = __half_as_ushort(a) | u32(__half_as_ushort(b)) << 16;
      low -= __half2float(a);
      high -= __half2float(b);
    }
  }
};

template <> struct Parts<__nv_bfloat16> {
  static constexpr int N = 3;
  static constexpr u32 INFINITE = 0x7f80;
  u32 of[N];
  __device__ __forceinline__ Parts(float low, float high) {
    for (int i = 0; i < N; i++) {
      of[i] = __bfloat16_as_ushort(__float2bfloat16(low)) | u32(__bfloat16_as_ushort(__float2bfloat16(high))) << 16;
      low -= __uint_as_float(of[i] << 16);
      high -= __uint_as_float(of[i] & 0xffff0000u);
    }
  }
};

// The left tiles of four numbers of query g: those of columns 2t and 2t + 1, and those 8 further.
template <class T> struct LeftTiles {
  static constexpr int N = (Parts<T>::N + 1) / 2;
  u32 of[N][4];

  __device__ __forceinline__ LeftTiles() {}
  __device__ __forceinline__ LeftTiles(float a, float b, float c, float d) {
    Parts<T> near(a, b), far(c, d);
#pragma unroll
    for (int i = 0; i < 2 * N; i++) {
      bool there = i < Parts<T>::N;
      of[i / 2][i % 2] = there ? near.of[min(i, Parts<T>::N - 1)] : 0;
      of[i / 2][2 + i % 2] = there ? far.of[min(i, Parts<T>::N - 1)] : 0;
    }
  }
  __device__ __forceinline__ void add_product(float (&sums)[4], u32 b0, u32 b1) const {
#pragma unroll
    for (int i = 0; i < N; i++) {
      add_tile(sums, of[i], b0, b1, T());
    }
  }
};

// Four rows of 8 neighbours each, which become the right tiles of 8 products: tile `j` is of the `j`th neighbours.
struct RightTiles {
  uint4 rows[4];

  template <class T> __device__ __forceinline__ void load(int i, const T* from, bool there) {
    rows[i] = uint4{0, 0, 0, 0};
    if (there) {
      rows[i] = *reinterpret_cast<const uint4*>(from);
    }
  }
  // Pairs of the first two rows and of the last two.
  __device__ __forceinline__ void tile(int j, u32& b0, u32& b1) const {
    u32 which = j % 2 ? 0x7632 : 0x5410;
    b0 = __byte_perm(word(rows[0], j / 2), word(rows[1], j / 2), which);
    b1 = __byte_perm(word(rows[2], j / 2), word(rows[3], j / 2), which);
  }
  static __device__ __forceinline__ u32 word(const uint4& row, int i) {
    return i == 0 ? row.x : i == 1 ? row.y : i == 2 ? row.z : row.w;
  }
};

// Whether a value of the lane's channels, of its `n` tokens from either address on, is infinite or no number.
template <int PASSES, class T>
__device__ __forceinline__ bool has_no_number(const T* const (&from)[2], const int (&n)[2]) {
  constexpr u32 exponent = Parts<T>::INFINITE;
  bool found = false;
#pragma unroll 1
  for (int i = 0; i < 16 * PASSES; i++) {
    int half = i / (8 * PASSES), token = i % 8, pass = i / 8 % PASSES;
    if (token < (half ? n[1] : n[0])) {
      uint4 bits = *reinterpret_cast<const uint4*>((half ? from[1] : from[0]) + (token * PASSES + pass) * PASS_CHANNELS);
      for (int word = 0; word < 4; word++) {
        u32 pair = RightTiles::word(bits, word);
        found = found || (pair & exponent) == exponent || (pair >> 16 & exponent) == exponent;
      }
    }
  }
  return found;
}

// Adds up, without tensor cores, the values of the tokens that the lane's query sees, in the lane's channels.
template <class T, int PASSES>
__device__ __forceinline__ void add_seen_values(const T* const (&first_value)[2], const int (&n_visible)[2],
                                                const float (&weights)[16], float (&total)[PASSES][8][4]) {
  int lane = threadIdx.x % WARP, t = lane % 4;
#pragma unroll 1
  for (int quarter = 0; quarter < 4; quarter++) {
#pragma unroll
    for (int i = 0; i < 16; i++) {
      // The lane of the query that has the token, and the one whose channels are the first.
      float weight = __shfl_sync(ALL_LANES, weights[i], lane - t + quarter);
      bool sees = i % 8 < __shfl_sync(ALL_LANES, n_visible[i / 8], lane - t + quarter);
      const T* from = first_value[i / 8];
      from = reinterpret_cast<const T*>(
          __shfl_sync(ALL_LANES, reinterpret_cast<unsigned long long>(from), quarter));
      from += i % 8 * PASSES * PASS_CHANNELS + 16 * t;
      if (sees) {
#pragma unroll
        for (int channel = 0; channel < 16 * PASSES; channel++) {
          float& sum = total[channel / 16][channel % 8][channel % 16 / 8];
          sum = fmaf(weight, widen(from[channel / 16 * PASS_CHANNELS + channel % 16]), sum);
        }
      }
    }
  }
}

// As `ListPages`, of pages whose tokens are a power of two.
template <int TOKENS> struct PowerPages {
  int log_offsets, log_pieces, together;
  u32 chunks;

  __device__ __forceinline__ PowerPages(const AttendJob& job) {
    constexpr int LOG_TOKENS = 6;
    static_assert(1 << LOG_TOKENS == TOKENS, "");
    int log_size = 31 - __clz(job.shape.page_size);
    log_offsets = min(log_size, LOG_TOKENS);
    log_pieces = log_size - log_offsets;
    together = TOKENS >> log_offsets;
    u32 n = job.end - job.begin;
    chunks = log_pieces > 0 ? n << log_pieces : (n + together - 1) >> (LOG_TOKENS - log_offsets);
  }

  __device__ __forceinline__ u32 first(const AttendJob& job, u32 chunk) const {
    return job.begin + (log_pieces > 0 ? chunk >> log_pieces : chunk * together);
  }

  // Where in its page a chunk begins.
  __device__ __forceinline__ int piece(u32 chunk) const { return int(chunk & ((1u << log_pieces) - 1)) * TOKENS; }

  __device__ __forceinline__ void ask(const AttendJob& job, u32 chunk, u32& place, u32& id) const {
    int lane = threadIdx.x % WARP;
    u32 at = first(job, chunk) + lane;
    if (chunk < chunks && lane < together && at < job.end) {
      place = job.list ? job.list[at] : at;
      id = job.table[place];
    }
  }
};

// Calls `finish(query, channel, sum, state)` for every query of the block and channel, by one thread each.
// Every thread of the block of `WARPS` warps calls it. page_size is a power of two from 8 on, head_dim is PASSES·64.
// `ONE_ROW`: every tile has one row.
template <class T, int PASSES, int WARPS, bool ONE_ROW, class Finish>
__device__ __forceinline__ void attend_tensor(const float* qkv, const T* pages, const AttendJob& job, Finish finish) {
  constexpr int Q = TENSOR_QUERIES;
  constexpr int DIM = PASSES * PASS_CHANNELS;
  constexpr int STEPS = DIM / STEP_CHANNELS;
  constexpr int THREADS = WARPS * WARP;
  constexpr int TILES = LeftTiles<T>::N;
  // Steps whose loads may be on their way together: as many as there are registers for.
  constexpr int STEPS_TOGETHER = 4;
  // Sums of half of the warps lie where the queries were, which nobody reads any more then.
  constexpr int SUMS = PASSES * 16, QUERY_VECTORS = STEPS * TILES * WARP;
  constexpr int SUM_VECTORS = (WARPS / 2 * SUMS * SUM_STRIDE + 3) / 4;
  TS_SHARED(uint4, queries, [QUERY_VECTORS > SUM_VECTORS ? QUERY_VECTORS : SUM_VECTORS]);
  // What scores are multiplied with: queries are scaled to where halves have most digits.
  TS_SHARED(float, factors, [Q]);
  TS_SHARED(float, states, [WARPS][Q][ATTEND_STATE]);
  TS_SHARED(float, merged, [Q][ATTEND_STATE]);

  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
  int page_size = job.shape.page_size;
  PowerPages<TENSOR_TOKENS> ahead(job);
  u32 place = 0, id = 0;
  ahead.ask(job, warp, place, id);
  u32 seen = job.tile.visible + job.tile.rows - 1;

  int own_query = job.first_query + g;
  bool is_there = own_query < job.n_queries;
  u32 visible = is_there ? job.tile.visible + own_query / job.group : 0;
  size_t query_row = job.tile.row + own_query / job.group;
  const float* query = qkv + query_row * job.width + size_t(job.kv_head * job.group + own_query % job.group) * DIM;
  {
    float largest = 0.f;
    for (int channel = t; channel < DIM && is_there; channel += 4) {
      largest = fmaxf(largest, fabsf(query[channel] * job.scale));
    }
    largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 2));
    // Powers of two change no digit.
    int above = int(__float_as_uint(largest) >> 23) - 127;
    int exponent = largest < INFINITY ? max(min(14 - above, 126), -126) : 0;
    float up = __uint_as_float(u32(127 + exponent) << 23), down = __uint_as_float(u32(127 - exponent) << 23);
    if (warp == 0 && t == 0) {
      factors[g] = down;
    }
    for (int step = warp; step < STEPS; step += WARPS) {
      float x[4];
      for (int i = 0; i < 4; i++) {
        int channel = step * STEP_CHANNELS + 4 * i + t;
        x[i] = is_there ? query[channel] * job.scale * up : 0.f;
      }
      LeftTiles<T> tiles(x[0], x[1], x[2], x[3]);
      for (int i = 0; i < TILES; i++) {
        queries[(step * TILES + i) * WARP + lane] = uint4{tiles.of[i][0], tiles.of[i][1], tiles.of[i][2], tiles.of[i][3]};
      }
    }
  }
  __syncthreads();
  float factor = factors[g];

  float total[PASSES][8][4] = {};
  // The largest score is that of all four lanes of a query, the sums are of the lane's own tokens.
  float largest = -INFINITY, mass = 0.f, tilt = 0.f;
  for (u32 number = warp; number < ahead.chunks; number += WARPS) {
    int n_pages = int(min(u32(ahead.together), job.end - ahead.first(job, number)));
    int piece = ahead.piece(number);
    // Vector `v` of 8 tokens: its page, the page's id, the tokens before it in the page, and its first position.
    auto vector = [&](int v, u32& of_page, int& offset) {
      int page = 8 * v >> ahead.log_offsets;
      offset = piece + (8 * v & ((1 << ahead.log_offsets) - 1));
      u32 in_list = __shfl_sync(ALL_LANES, place, page);
      of_page = __shfl_sync(ALL_LANES, id, page);
      return page < n_pages ? in_list * page_size + offset : 0xffffffffu;
    };
    u32 key_page, value_pages[2];
    int key_offset, value_offsets[2];
    bool has_keys = vector(g, key_page, key_offset) < seen;
    // Of the lane's tokens, those that its query sees, and those that any does.
    int n_visible[2], n_there[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      u32 position = vector(2 * t + half, value_pages[half], value_offsets[half]);
      n_visible[half] = position < visible ? int(min(visible - position, 8u)) : 0;
      n_there[half] = position < seen ? int(min(seen - position, 8u)) : 0;
    }
    ahead.ask(job, number + WARPS, place, id);

    const T* first_value[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      first_value[half] = pages + values_at(job.shape, value_pages[half], job.kv_head) + value_offsets[half] * DIM + 8 * g;
    }

    // A later row's value is none of an earlier row's, not even times zero, which no value notices but one that is no
    // number.
    bool one_by_one = !ONE_ROW &&
                    __any_sync(ALL_LANES, is_there && (n_visible[0] < n_there[0] || n_visible[1] < n_there[1])) &&
                    __any_sync(ALL_LANES, has_no_number<PASSES>(first_value, n_there));

    // Scores.
    float scores[8][4] = {};
    const T* keys = pages + keys_at(job.shape, key_page, job.kv_head) + key_offset + t * page_size;
#pragma unroll STEPS_TOGETHER
    for (int step = 0; step < STEPS; step++) {
      RightTiles right;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        right.load(i, keys + 4 * i * page_size, has_keys);
      }
      keys += STEP_CHANNELS * page_size;
      LeftTiles<T> left;
#pragma unroll
      for (int i = 0; i < TILES; i++) {
        uint4 of = queries[(step * TILES + i) * WARP + lane];
        left.of[i][0] = of.x;
        left.of[i][1] = of.y;
        left.of[i][2] = of.z;
        left.of[i][3] = of.w;
      }
#pragma unroll
      for (int j = 0; j < 8; j++) {
        u32 b0, b1;
        right.tile(j, b0, b1);
        left.add_product(scores[j], b0, b1);
      }
    }

    // Weights.
    float weights[16];
    float next = largest;
#pragma unroll
    for (int i = 0; i < 16; i++) {
      float score = (scores[i % 8][i / 8] + scores[i % 8][2 + i / 8]) * factor;
      weights[i] = i % 8 < n_visible[i / 8] ? score : -INFINITY;
      next = fmaxf(next, weights[i]);
    }
    next = fmaxf(next, __shfl_xor_sync(ALL_LANES, next, 1));
    next = fmaxf(next, __shfl_xor_sync(ALL_LANES, next, 2));
    // Before the first visible token there is nothing to scale, and no difference to take.
    float fall = largest == -INFINITY ? 0.f : largest - next;
    float lower = largest == -INFINITY ? 0.f : power_of_2(fall), level = next == -INFINITY ? 0.f : next;
    tilt = lower * fmaf(mass, fall, tilt);
    mass *= lower;
    largest = next;
#pragma unroll
    for (int i = 0; i < 16; i++) {
      float below = weights[i] - level;
      // Its weight is 0, and the product with it is, too. What is not a number stays so.
      below = below < -1000.f ? -1000.f : below;
      weights[i] = power_of_2(below + WEIGHT_POWER);
      mass += weights[i];
      tilt = fmaf(weights[i], below, tilt);
    }
#pragma unroll
    for (int i = 0; i < PASSES * 8 * 4; i++) {
      total[i / 32][i / 4 % 8][i % 4] *= lower;
    }

    if (one_by_one) {
      add_seen_values<T, PASSES>(first_value, n_visible, weights, total);
      continue;
    }
#pragma unroll
    for (int step = 0; step < 4; step++) {
      int first = 4 * step, half = first / 8;
      LeftTiles<T> left(weights[first], weights[first + 1], weights[first + 2], weights[first + 3]);
      const T* values = first_value[half] + first % 8 * DIM;
#pragma unroll
      for (int pass = 0; pass < PASSES; pass++) {
        RightTiles right;
#pragma unroll
        for (int i = 0; i < 4; i++) {
          // What lies beyond the sequence may be anything.
          right.load(i, values + i * DIM + pass * PASS_CHANNELS, first % 8 + i < n_there[half]);
        }
#pragma unroll
        for (int j = 0; j < 8; j++) {
          u32 b0, b1;
          right.tile(j, b0, b1);
          left.add_product(total[pass][j], b0, b1);
        }
      }
    }
  }

  // What the warps have, merged in their order.
  mass += __shfl_xor_sync(ALL_LANES, mass, 1);
  mass += __shfl_xor_sync(ALL_LANES, mass, 2);
  tilt += __shfl_xor_sync(ALL_LANES, tilt, 1);
  tilt += __shfl_xor_sync(ALL_LANES, tilt, 2);
  if (t == 0) {
    states[warp][g][0] = largest;
    states[warp][g][1] = mass * (1.f / WEIGHT_FACTOR);
    states[warp][g][2] = tilt * (1.f / WEIGHT_FACTOR);
  }
  __syncthreads();
  if (threadIdx.x < Q) {
    merge_states<WARPS, Q>(states, threadIdx.x, merged[threadIdx.x]);
  }
  __syncthreads();
  float* sums = reinterpret_cast<float*>(queries) + lane;
  float share = states[warp][g][0] * (1.f / WEIGHT_FACTOR);
  // Of channel `i` of the lane, in place.
  auto own = [&](int i) -> float& { return total[i / 16][i % 8][i % 16 / 8]; };
#pragma unroll
  for (int i = 0; i < SUMS; i++) {
    own(i) = share * (own(i) + total[i / 16][i % 8][2 + i % 16 / 8]);
  }
  // The upper half of the warps gives its sums to the lower half, until one warp has them all.
#pragma unroll
  for (int half = WARPS / 2; half > 0; half /= 2) {
    if (warp >= half && warp < 2 * half) {
#pragma unroll
      for (int i = 0; i < SUMS; i++) {
        sums[((warp - half) * SUMS + i) * SUM_STRIDE] = own(i);
      }
    }
    __syncthreads();
    if (warp < half) {
#pragma unroll
      for (int i = 0; i < SUMS; i++) {
        own(i) += sums[(warp * SUMS + i) * SUM_STRIDE];
      }
    }
    __syncthreads();
  }
  if (warp == 0) {
#pragma unroll
    for (int i = 0; i < SUMS; i++) {
      sums[i * SUM_STRIDE] = own(i);
    }
  }
  __syncthreads();
  int n_queries = min(Q, job.n_queries - job.first_query);
  for (int i = threadIdx.x; i < n_queries * DIM; i += THREADS) {
    int q = i / DIM, channel = i % DIM, place_in_pass = channel % PASS_CHANNELS;
    int sum = channel / PASS_CHANNELS * 16 + place_in_pass % 16;
    float of = reinterpret_cast<float*>(queries)[sum * SUM_STRIDE + 4 * q + place_in_pass / 16];
    finish(job.first_query + q, channel, of, merged[q]);
  }
}

}  // namespace ts
