// Attention of a few queries over listed pages: one pass over keys and values for all of them.
//
// Warps share out the pages in chunks of up to 32 tokens, each lane one token: scores of all queries, an online
// softmax update, weighted sums of the values. No warp waits for another before all of them are merged, so that
// some load while others compute. Dense attention is the same code over every page. The order of every sum depends
// on the list alone, never on the batch or on what other queries share the pass. Scores are in units of ln 2, so
// that a weight is a power of two. How pages are read is a `Reader`'s: attend_floats.cuh, attend_codes.cuh.
#pragma once
#include "packed.cuh"
#include "tile.cuh"

namespace ts {

// Tokens of a chunk.
constexpr int CHUNK = WARP;
constexpr int ATTEND_MOST_DIM = 256;
// Numbers of a query's state beside its sums: largest score, sum of weights, and the sum of weights times
// scores relative to the largest, from which the entropy follows.
constexpr int ATTEND_STATE = 3;
// The weight of a token that a query does not see.
constexpr float UNSEEN = -1.f;

// Loads of a lane that are on their way together.
constexpr int LOADS = 8;

// What a block reads, and for whom.
struct AttendJob {
  Tile tile;
  PageShape shape;
  int kv_head;
  // Query heads that share a KV head; query `j` of a tile is head `j % group` of row `j / group`.
  int group;
  // First query of the tile that is the block's, and queries that the tile has.
  int first_query, n_queries;
  // Row width of `qkv`, and the factor of scores.
  int width;
  float scale;
  // Page ids of the sequence, and places of the listed pages in it; null lists every page.
  const u32* table;
  const u32* list;
  // The block's part of the list.
  u32 begin, end;
};

// Pages of a chunk, or a piece of a page that is larger than one, and what the queries have to do with them.
struct Chunk {
  // Pages, tokens of each, and where in their pages these begin.
  int pages, offsets, piece;
  // Of each page, in shared memory: its id, and the position of its first token.
  const u32 *page_ids, *positions;
  // Queries, and their scores, which become weights, by token of the chunk; in shared memory.
  float (*queries)[ATTEND_MOST_DIM];
  float (*weights)[CHUNK];
  // Tokens that each query sees, and that the last row sees.
  const u32* visible;
  u32 seen;
};

// How lanes share out the values: `vector` of `vectors` vectors of channels, and every `slices`th token.
struct Share {
  int vectors, slices, vector, slice;
};

// How the lanes of a warp lie along a row of keys, which are the tokens of a channel, then along the channels.
struct Lanes {
  // Lanes along a row, and rows at once; the lane's place in either.
  int across, down, column, first;

  __device__ __forceinline__ Lanes(int most_across) {
    int lane = threadIdx.x % WARP;
    across = min(most_across, WARP);
    down = WARP / across;
    column = lane % across;
    first = lane / across;
  }
};

// Adds up values over the lanes that are `step`, 2·`step` and so on apart, and calls `store(i, sum)` for each by one
// lane. While there are several values, lanes share them out: of each pair, one adds up the upper half of them;
// `first` is the first that is the lane's.
template <int COUNT, int ALL, class Store>
__device__ __forceinline__ void sum_columns(float (&values)[ALL], int step, int first, bool own, Store store) {
  if (step >= WARP) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      if (own) {
        store(first + i, values[i]);
      }
    }
    return;
  }
  bool upper = (threadIdx.x & step) != 0;
  if constexpr (COUNT > 1) {
    constexpr int HALF = COUNT / 2;
#pragma unroll
    for (int i = 0; i < HALF; i++) {
      float given = upper ? values[i] : values[i + HALF];
      float kept = upper ? values[i + HALF] : values[i];
      values[i] = kept + __shfl_xor_sync(ALL_LANES, given, step);
    }
    sum_columns<HALF>(values, 2 * step, upper ? first + HALF : first, own, store);
  } else {
    // No halves are left: every lane adds all up, and one of a pair stores.
    for (; step < WARP; step *= 2) {
      values[0] += __shfl_xor_sync(ALL_LANES, values[0], step);
      own = own && (threadIdx.x & step) == 0;
    }
    if (own) {
      store(first, values[0]);
    }
  }
}

// Adds up the products of the lanes of a column, [Q][N] for tokens `token`.. of page `page` of a chunk, and stores
// the scores, unless the column is outside of the row.
template <int N, int Q>
__device__ __forceinline__ void store_scores(float (&products)[Q * N], const Lanes& lanes, const Chunk& chunk,
                                             int page, int token, bool inside) {
  float* to = chunk.weights[0] + page * chunk.offsets + token;
  sum_columns<Q * N>(products, lanes.across, 0, inside, [&](int i, float sum) { to[i / N * CHUNK + i % N] = sum; });
}

// Scores of the tokens of a page of a chunk, whose keys [head_dim, page_size] begin at `keys`, by a warp.
//
// With `N` above 1, the page's tokens are a power of two of vectors of `N`.
template <int N, int Q, class T>
__device__ __forceinline__ void page_scores(const T* keys, const AttendJob& job, const Chunk& chunk, int page) {
  int lane = threadIdx.x % WARP, dim = job.shape.head_dim, page_size = job.shape.page_size;
  if constexpr (N > 1) {
    // Rows whose loads are on their way together.
    constexpr int ROWS = LOADS;
    Lanes lanes(chunk.offsets / N);
    float products[Q * N] = {};
    int token = lanes.column * N;
    for (int first = lanes.first; first < dim; first += ROWS * lanes.down) {
      Packed<T, N> rows[ROWS];
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        int channel = first + r * lanes.down;
        if (channel < dim) {
          rows[r].load(keys + channel * page_size + token);
        }
      }
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        int channel = first + r * lanes.down;
        if (channel < dim) {
          float k[N];
          rows[r].widen_to(k);
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
    store_scores<N, Q>(products, lanes, chunk, page, token, true);
  } else {
    if (lane < chunk.offsets) {
      float products[Q] = {};
      for (int channel = 0; channel < dim; channel++) {
        float k = widen(keys[size_t(channel) * page_size + lane]);
        for (int q = 0; q < Q; q++) {
          products[q] = fmaf(chunk.queries[q][channel], k, products[q]);
        }
      }
      for (int q = 0; q < Q; q++) {
        chunk.weights[q][page * chunk.offsets + lane] = products[q];
      }
    }
  }
}

// Adds the value `x` of token `token` of the chunk.
template <int Q, int N>
__device__ __forceinline__ void add_value(const float (&x)[N], const Chunk& chunk, int token, float (&total)[Q][N]) {
#pragma unroll
  for (int q = 0; q < Q; q++) {
    float weight = chunk.weights[q][token];
#pragma unroll
    for (int n = 0; n < N; n++) {
      // A later row's value is none of an earlier row's, not even times zero.
      total[q][n] = weight != UNSEEN ? fmaf(weight, x[n], total[q][n]) : total[q][n];
    }
  }
}

// A warp's online softmax of `Q` queries. What each lane has of a query's sums of weights, and of weights times scores
// relative to the largest, lies in shared memory, unless a block of many warps has too little: registers are for values.
template <int Q, bool IN_REGISTERS> struct Softmax {
  float largest[Q];
  float own_masses[IN_REGISTERS ? Q : 1], own_tilts[IN_REGISTERS ? Q : 1];
  float (*masses)[CHUNK], (*tilts)[CHUNK];

  __device__ __forceinline__ Softmax(float (*of_masses)[CHUNK], float (*of_tilts)[CHUNK])
      : masses(of_masses), tilts(of_tilts) {
#pragma unroll
    for (int q = 0; q < Q; q++) {
      largest[q] = -INFINITY;
      mass(q) = 0.f;
      tilt(q) = 0.f;
    }
  }

  // The lane's sums of a query.
  __device__ __forceinline__ float& mass(int q) {
    if constexpr (IN_REGISTERS) {
      return own_masses[q];
    } else {
      return masses[q][threadIdx.x % WARP];
    }
  }
  __device__ __forceinline__ float& tilt(int q) {
    if constexpr (IN_REGISTERS) {
      return own_tilts[q];
    } else {
      return tilts[q][threadIdx.x % WARP];
    }
  }

  // Takes in the score of a query and the lane's token, -∞ if there is none; the token's weight, and by how much
  // what came before counts less now.
  __device__ __forceinline__ float weigh(int q, float score, float& factor) {
    float next = fmaxf(largest[q], warp_max(score));
    // Before the first visible token there is nothing to scale, and no difference to take.
    float fall = largest[q] == -INFINITY ? 0.f : largest[q] - next;
    factor = largest[q] == -INFINITY ? 0.f : exp2f(fall);
    float weight = score == -INFINITY ? 0.f : exp2f(score - next);
    tilt(q) = factor * fmaf(mass(q), fall, tilt(q)) + (weight == 0.f ? 0.f : weight * (score - next));
    mass(q) = fmaf(mass(q), factor, weight);
    largest[q] = next;
    return weight;
  }
};

// The pages of a warp's chunks of up to `TOKENS` tokens, whose ids are asked for ahead of time.
template <int TOKENS> struct ListPages {
  // Tokens of a page in a chunk at most, pages of a chunk, and chunks of a page.
  int offsets, together, pieces;
  u32 chunks;

  __device__ __forceinline__ ListPages(const AttendJob& job) {
    int page_size = job.shape.page_size;
    offsets = min(TOKENS, page_size);
    together = page_size < TOKENS ? TOKENS / page_size : 1;
    pieces = (page_size + TOKENS - 1) / TOKENS;
    u32 n = job.end - job.begin;
    chunks = pieces > 1 ? n * pieces : (n + together - 1) / together;
  }

  // The first page of a chunk in the list.
  __device__ __forceinline__ u32 first(const AttendJob& job, u32 chunk) const {
    return job.begin + (pieces > 1 ? chunk / pieces : chunk * together);
  }

  // Place in the sequence, and id, of the lane's page of a chunk.
  __device__ __forceinline__ void ask(const AttendJob& job, u32 chunk, u32& place, u32& id) const {
    int lane = threadIdx.x % WARP;
    u32 at = first(job, chunk) + lane;
    if (chunk < chunks && lane < together && at < job.end) {
      place = job.list ? job.list[at] : at;
      id = job.table[place];
    }
  }
};

// What `WARPS` warps have of query `q`, merged in their order into `merged`; the factor of each warp's sums takes the
// place of its largest score.
template <int WARPS, int Q>
__device__ __forceinline__ void merge_states(float (&states)[WARPS][Q][ATTEND_STATE], int q,
                                             float (&merged)[ATTEND_STATE]) {
  float largest = -INFINITY, mass = 0.f, tilt = 0.f;
  for (int w = 0; w < WARPS; w++) {
    largest = fmaxf(largest, states[w][q][0]);
  }
  for (int w = 0; w < WARPS; w++) {
    float* state = states[w][q];
    float fall = state[0] == -INFINITY ? 0.f : state[0] - largest;
    float factor = state[0] == -INFINITY ? 0.f : exp2f(fall);
    mass = fmaf(factor, state[1], mass);
    tilt = fmaf(factor, fmaf(state[1], fall, state[2]), tilt);
    state[0] = factor;
  }
  merged[0] = largest;
  merged[1] = mass;
  merged[2] = tilt;
}

// Calls `finish(query, channel, sum, state)` for every query of the block and channel, by one thread each.
// Every thread of the block of `WARPS` warps calls it.
template <class Reader, int Q, int WARPS, class Finish>
__device__ __forceinline__ void attend(const float* qkv, Reader reader, const AttendJob& job, Finish finish) {
  constexpr int N = Reader::N;
  constexpr int THREADS = WARPS * WARP;
  // Vectors of channels that a lane adds up.
  constexpr int VECTORS = (ATTEND_MOST_DIM / N + WARP - 1) / WARP;
  // The sums of the warps lie where the queries were, which nobody reads any more then.
  constexpr int SUM_ROWS = THREADS * N / ATTEND_MOST_DIM;
  TS_SHARED(float, queries, [Q > SUM_ROWS ? Q : SUM_ROWS][ATTEND_MOST_DIM]);
  TS_SHARED(float, weights, [WARPS][Q][CHUNK]);
  constexpr bool IN_REGISTERS = WARPS > 4;
  TS_SHARED(float, masses, [IN_REGISTERS ? 1 : WARPS][Q][CHUNK]);
  TS_SHARED(float, tilts, [IN_REGISTERS ? 1 : WARPS][Q][CHUNK]);
  TS_SHARED(u32, page_ids, [WARPS][CHUNK]);
  TS_SHARED(u32, positions, [WARPS][CHUNK]);
  TS_SHARED(float, states, [WARPS][Q][ATTEND_STATE]);
  TS_SHARED(float, merged, [Q][ATTEND_STATE]);
  // Tokens that each query sees; none for a query that the tile does not have.
  TS_SHARED(u32, visible, [Q]);

  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  int dim = job.shape.head_dim, page_size = job.shape.page_size;
  ListPages<CHUNK> pages(job);
  u32 place = 0, id = 0;
  pages.ask(job, warp, place, id);
  if (threadIdx.x < Q) {
    int query = job.first_query + threadIdx.x;
    visible[threadIdx.x] = query < job.n_queries ? job.tile.visible + query / job.group : 0;
  }
  for (int i = threadIdx.x; i < Q * dim; i += THREADS) {
    int query = job.first_query + i / dim;
    float x = 0.f;
    if (query < job.n_queries) {
      size_t row = job.tile.row + query / job.group;
      int head = job.kv_head * job.group + query % job.group;
      x = qkv[row * job.width + size_t(head) * dim + i % dim] * job.scale;
    }
    queries[i / dim][i % dim] = x;
  }
  __syncthreads();

  // Lanes share out the channels, and what is left of them the tokens.
  Share share;
  share.vectors = dim / N;
  share.slices = share.vectors < WARP ? WARP / share.vectors : 1;
  share.slice = share.vectors < WARP ? lane / share.vectors : 0;
  share.vector = share.vectors < WARP ? lane % share.vectors : lane;
  float total[VECTORS][Q][N] = {};
  int own = IN_REGISTERS ? 0 : warp;
  Softmax<Q, IN_REGISTERS> softmax(masses[own], tilts[own]);

  Chunk chunk;
  chunk.page_ids = page_ids[warp];
  chunk.positions = positions[warp];
  chunk.queries = queries;
  chunk.weights = weights[warp];
  chunk.visible = visible;
  chunk.seen = job.tile.visible + job.tile.rows - 1;
  for (u32 number = warp; number < pages.chunks; number += WARPS) {
    chunk.pages = int(min(u32(pages.together), job.end - pages.first(job, number)));
    chunk.piece = pages.pieces > 1 ? int(number % pages.pieces) * CHUNK : 0;
    chunk.offsets = min(pages.offsets, page_size - chunk.piece);
    int n_tokens = chunk.pages * chunk.offsets;
    // The lanes are done with the chunk before.
    __syncwarp();
    if (lane < chunk.pages) {
      page_ids[warp][lane] = id;
      positions[warp][lane] = place * page_size + chunk.piece;
    }
    __syncwarp();
    pages.ask(job, number + WARPS, place, id);
    reader.template scores<Q, WARPS>(job, chunk);
    __syncwarp();

    u32 position = lane < n_tokens ? positions[warp][lane / chunk.offsets] + lane % chunk.offsets : 0xffffffffu;
    float factors[Q];
#pragma unroll
    for (int q = 0; q < Q; q++) {
      bool sees = position < visible[q];
      float weight = softmax.weigh(q, sees ? weights[warp][q][lane] : -INFINITY, factors[q]);
      weights[warp][q][lane] = sees ? weight : UNSEEN;
    }
    __syncwarp();

#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
      int column = share.vector + v * WARP;
      if (column < share.vectors && share.slice < share.slices) {
#pragma unroll
        for (int q = 0; q < Q; q++) {
          for (int n = 0; n < N; n++) {
            total[v][q][n] *= factors[q];
          }
        }
        reader.template add<Q>(job, chunk, column, share, total[v]);
      }
    }
  }

  // What the warps have, merged in their order.
#pragma unroll
  for (int q = 0; q < Q; q++) {
    float mass = warp_sum(softmax.mass(q)), tilt = warp_sum(softmax.tilt(q));
    if (lane == 0) {
      states[warp][q][0] = softmax.largest[q];
      states[warp][q][1] = mass;
      states[warp][q][2] = tilt;
    }
  }
  __syncthreads();
  if (threadIdx.x < Q) {
    merge_states<WARPS, Q>(states, threadIdx.x, merged[threadIdx.x]);
  }
  __syncthreads();
  // The sums of a query's slices, one query after the other.
  float* sums = queries[0];
#pragma unroll
  for (int q = 0; q < Q; q++) {
    if (job.first_query + q < job.n_queries) {
      float factor = states[warp][q][0];
#pragma unroll
      for (int v = 0; v < VECTORS; v++) {
        int column = share.vector + v * WARP, width = min(share.vectors, WARP);
        if (column < share.vectors && share.slice < share.slices) {
          for (int n = 0; n < N; n++) {
            sums[((warp * share.slices + share.slice) * width + share.vector) * N + n] = factor * total[v][q][n];
          }
        }
        __syncthreads();
        int columns = min(dim - v * WARP * N, width * N);
        for (int i = threadIdx.x; i < columns; i += THREADS) {
          float sum = 0.f;
          for (int s = 0; s < WARPS * share.slices; s++) {
            sum += sums[s * width * N + i];
          }
          finish(job.first_query + q, v * WARP * N + i, sum, merged[q]);
        }
        __syncthreads();
      }
    }
  }
}

}  // namespace ts
