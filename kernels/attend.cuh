// Attention of a few queries over listed pages: one pass over keys and values for all of them.
//
// A block works through its pages in chunks of about 256 tokens: scores of all queries, one online
// softmax update, weighted sums of the values. Dense attention is the same code over every page. The
// order of every sum depends on the list alone, never on the batch or on what other queries share the
// pass. Scores are in units of ln 2, so that a weight is a power of two. How pages are read is a `Reader`'s:
// attend_floats.cuh, attend_codes.cuh.
#pragma once
#include "tile.cuh"

namespace ts {

constexpr int ATTEND_TOKENS = 256;
constexpr int ATTEND_MOST_DIM = 256;
// Numbers of a query's state beside its sums: largest score, sum of weights, and the sum of weights times
// scores relative to the largest, from which the entropy follows.
constexpr int ATTEND_STATE = 3;

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
  float (*weights)[ATTEND_TOKENS];
  // Tokens that each query sees, and that the last row sees.
  const u32* visible;
  u32 seen;
};

// How threads share out the values: `vector` of `vectors` vectors of channels, and every `slices`th token.
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

// Adds up the products of the lanes of a column, for tokens `token`.. of page `page` of a chunk, and stores the
// scores, unless the column is outside of the row.
template <int N, int Q>
__device__ __forceinline__ void store_scores(float (&products)[Q][N], const Lanes& lanes, const Chunk& chunk,
                                             int page, int token, bool inside) {
  for (int step = lanes.across; step < WARP; step *= 2) {
#pragma unroll
    for (int i = 0; i < Q * N; i++) {
      products[i / N][i % N] += __shfl_xor_sync(ALL_LANES, products[i / N][i % N], step);
    }
  }
#pragma unroll
  for (int i = 0; i < Q * N; i++) {
    // Every lane of a column has the sum; they take turns in storing.
    if (lanes.first == i % lanes.down && inside) {
      bool sees = chunk.positions[page] + token + i % N < chunk.visible[i / N];
      chunk.weights[i / N][page * chunk.offsets + token + i % N] = sees ? products[i / N][i % N] : -INFINITY;
    }
  }
}

// Scores of the tokens of a page of a chunk, whose keys [head_dim, page_size] begin at `keys`, by one warp.
//
// With `N` above 1, the page's tokens are a power of two of vectors of `N`.
template <int N, int Q, class T>
__device__ __forceinline__ void page_scores(const T* keys, const AttendJob& job, const Chunk& chunk, int page) {
  int lane = threadIdx.x % WARP, dim = job.shape.head_dim, page_size = job.shape.page_size;
  if constexpr (N > 1) {
    int row = chunk.offsets / N;
    Lanes lanes(row);
    for (int start = 0; start < row; start += lanes.across) {
      float products[Q][N] = {};
      int token = (start + lanes.column) * N;
#pragma unroll(Q > 4 ? 1 : Q > 1 ? 2 : 4)
      for (int channel = lanes.first; channel < dim; channel += lanes.down) {
        float k[N];
        load_wide(keys + size_t(channel) * page_size + token, k);
        for (int q = 0; q < Q; q++) {
          float x = chunk.queries[q][channel];
          for (int n = 0; n < N; n++) {
            products[q][n] = fmaf(x, k[n], products[q][n]);
          }
        }
      }
      store_scores(products, lanes, chunk, page, token, true);
    }
  } else {
    for (int token = lane; token < chunk.offsets; token += WARP) {
      float products[Q] = {};
      for (int channel = 0; channel < dim; channel++) {
        float k = widen(keys[size_t(channel) * page_size + token]);
        for (int q = 0; q < Q; q++) {
          products[q] = fmaf(chunk.queries[q][channel], k, products[q]);
        }
      }
      for (int q = 0; q < Q; q++) {
        bool sees = chunk.positions[page] + token < chunk.visible[q];
        chunk.weights[q][page * chunk.offsets + token] = sees ? products[q] : -INFINITY;
      }
    }
  }
}

// Adds the value of the token at `position`, number `token` of the chunk, whose channels begin at `from`.
template <int Q, int N, class T>
__device__ __forceinline__ void add_value(const T* from, const Chunk& chunk, int token, u32 position,
                                          float (&total)[Q][N]) {
  float x[N];
  load_wide(from, x);
#pragma unroll
  for (int q = 0; q < Q; q++) {
    float weight = chunk.weights[q][token];
    for (int n = 0; n < N; n++) {
      // A later row's value is none of an earlier row's, not even times zero.
      total[q][n] = position < chunk.visible[q] ? fmaf(weight, x[n], total[q][n]) : total[q][n];
    }
  }
}

// Calls `finish(query, channel, sum, state)` for every query of the block and channel, by one thread each.
// Every thread of the block of `WARPS` warps calls it.
template <class Reader, int Q, int WARPS, class Finish>
__device__ __forceinline__ void attend(const float* qkv, Reader reader, const AttendJob& job, Finish finish) {
  constexpr int N = Reader::N;
  constexpr int THREADS = WARPS * WARP;
  // Vectors of channels that a thread adds up.
  constexpr int VECTORS = (ATTEND_MOST_DIM / N + THREADS - 1) / THREADS;
  constexpr int OWN_QUERIES = (Q + WARPS - 1) / WARPS;
  TS_SHARED(float, queries, [Q][ATTEND_MOST_DIM]);
  TS_SHARED(float, weights, [Q][ATTEND_TOKENS]);
  TS_SHARED(float, factors, [Q]);
  TS_SHARED(float, states, [Q][ATTEND_STATE]);
  TS_SHARED(u32, page_ids, [ATTEND_TOKENS]);
  TS_SHARED(u32, positions, [ATTEND_TOKENS]);
  TS_SHARED(float, sums, [THREADS * N]);
  // Tokens that each query sees; none for a query that the tile does not have.
  TS_SHARED(u32, visible, [Q]);

  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  int dim = job.shape.head_dim, page_size = job.shape.page_size;
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

  // Threads share out the channels, and what is left of them the tokens.
  Share share;
  share.vectors = dim / N;
  share.slices = share.vectors < THREADS ? THREADS / share.vectors : 1;
  share.slice = share.vectors < THREADS ? int(threadIdx.x) / share.vectors : 0;
  share.vector = share.vectors < THREADS ? int(threadIdx.x) % share.vectors : int(threadIdx.x);
  float total[VECTORS][Q][N] = {};
  // Query `warp + i·WARPS` is this warp's.
  float largest[OWN_QUERIES], mass[OWN_QUERIES], tilt[OWN_QUERIES];
  for (int i = 0; i < OWN_QUERIES; i++) {
    largest[i] = -INFINITY;
    mass[i] = 0.f;
    tilt[i] = 0.f;
  }

  Chunk chunk;
  chunk.page_ids = page_ids;
  chunk.positions = positions;
  chunk.queries = queries;
  chunk.weights = weights;
  chunk.visible = visible;
  chunk.seen = job.tile.visible + job.tile.rows - 1;
  // A chunk is whole pages, or a piece of a page that is larger than a chunk.
  u32 at = job.begin;
  chunk.piece = 0;
  while (at < job.end) {
    chunk.pages = 1;
    chunk.offsets = min(ATTEND_TOKENS, page_size - chunk.piece);
    if (page_size <= ATTEND_TOKENS) {
      chunk.pages = int(min(u32(ATTEND_TOKENS / page_size), job.end - at));
      chunk.offsets = page_size;
    }
    int n_tokens = chunk.pages * chunk.offsets;
    __syncthreads();
    for (int i = threadIdx.x; i < chunk.pages; i += THREADS) {
      u32 place = job.list ? job.list[at + i] : at + i;
      page_ids[i] = job.table[place];
      positions[i] = place * page_size + chunk.piece;
    }
    __syncthreads();

    reader.template scores<Q, WARPS>(job, chunk);
    __syncthreads();

    for (int i = 0; i < OWN_QUERIES; i++) {
      int q = warp + i * WARPS;
      if (q < Q) {
        float next = largest[i];
        for (int token = lane; token < n_tokens; token += WARP) {
          next = fmaxf(next, weights[q][token]);
        }
        next = warp_max(next);
        // Before the first visible token there is nothing to scale, and no difference to take.
        float factor = largest[i] == -INFINITY ? 0.f : exp2f(largest[i] - next);
        float fall = largest[i] == -INFINITY ? 0.f : largest[i] - next;
        float sum = 0.f, weighted = 0.f;
        for (int token = lane; token < n_tokens; token += WARP) {
          float score = weights[q][token];
          float weight = score == -INFINITY ? 0.f : exp2f(score - next);
          weights[q][token] = weight;
          sum += weight;
          weighted += weight == 0.f ? 0.f : weight * (score - next);
        }
        tilt[i] = factor * (tilt[i] + mass[i] * fall) + warp_sum(weighted);
        mass[i] = mass[i] * factor + warp_sum(sum);
        largest[i] = next;
        if (lane == 0) {
          factors[q] = factor;
        }
      }
    }
    __syncthreads();

#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
      int column = share.vector + v * THREADS;
      if (column < share.vectors && share.slice < share.slices) {
#pragma unroll
        for (int q = 0; q < Q; q++) {
          float factor = factors[q];
          for (int n = 0; n < N; n++) {
            total[v][q][n] *= factor;
          }
        }
        reader.template add<Q>(job, chunk, column, share, total[v]);
      }
    }
    chunk.piece += chunk.offsets;
    if (page_size <= ATTEND_TOKENS || chunk.piece == page_size) {
      at += chunk.pages;
      chunk.piece = 0;
    }
  }

  for (int i = 0; i < OWN_QUERIES; i++) {
    int q = warp + i * WARPS;
    if (q < Q && lane == 0) {
      states[q][0] = largest[i];
      states[q][1] = mass[i];
      states[q][2] = tilt[i];
    }
  }
  // The sums of a query's slices, one query after the other.
#pragma unroll
  for (int q = 0; q < Q; q++) {
    if (job.first_query + q < job.n_queries) {
#pragma unroll
      for (int v = 0; v < VECTORS; v++) {
        int column = share.vector + v * THREADS, width = min(share.vectors, THREADS);
        if (column < share.vectors && share.slice < share.slices) {
          for (int n = 0; n < N; n++) {
            sums[(share.slice * width + share.vector) * N + n] = total[v][q][n];
          }
        }
        __syncthreads();
        int columns = min(dim - v * THREADS * N, width * N);
        for (int i = threadIdx.x; i < columns; i += THREADS) {
          float sum = 0.f;
          for (int s = 0; s < share.slices; s++) {
            sum += sums[s * width * N + i];
          }
          finish(job.first_query + q, v * THREADS * N + i, sum, states[q]);
        }
        __syncthreads();
      }
    }
  }
}

}  // namespace ts
