// What attention tells about its weights, out of the states that it leaves behind.
//
// observe: states [n][3] f32 as attend_tile.cuh has them -> lse and entropy [n] f32, in nats; n is rows·q_heads.
// Grid (ceil(n / 256)), block 256. Must move n·20 bytes.
//
// mass_*: adds up the weights of each token of one sequence, over its rows begin..end and the query heads of a
// KV head; out [kv_heads, pages, page_size] f32, replaced or added to. Tokens that were not read have no mass.
// Grid (pages, kv_heads), block 128: one thread per token, which takes the products again, row by row, in order.
// Must move tokens·head_dim·element bytes of keys per KV head, once per query out of the caches.
#include "attend_codes.cuh"
#include "attend_floats.cuh"

extern "C" __global__ void observe(const float* states, float* lse, float* entropy, int n) {
  ts::wait_for_launches();
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) {
    const float* state = states + size_t(i) * ts::ATTEND_STATE;
    constexpr float LN_2 = 0.6931471805599453f;
    float logarithm = log2f(state[1]);
    lse[i] = LN_2 * (state[0] + logarithm);
    entropy[i] = LN_2 * (logarithm - state[2] / state[1]);
  }
}

// Whether `page` is in the ascending `list` of `n` pages.
__device__ __forceinline__ bool is_listed(const ts::u32* list, ts::u32 n, ts::u32 page) {
  ts::u32 low = 0, high = n;
  while (low < high) {
    ts::u32 middle = (low + high) / 2;
    if (list[middle] < page) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low < n && list[low] == page;
}

template <class Reader>
__device__ __forceinline__ void mass(const float* qkv, const Reader& reader, const ts::u32* tables, const ts::Tile* tiles,
                                     const ts::u32* lists, const ts::u32* lengths, const float* states, float* out,
                                     ts::PageShape shape, int group, int width, float scale, int n_tiles, ts::u32 begin,
                                     ts::u32 end, int add) {
  int kv_head = blockIdx.y, dim = shape.head_dim;
  ts::u32 page = blockIdx.x;
  ts::u32 id = tables[tiles[0].table + page];
  for (int token = threadIdx.x; token < shape.page_size; token += blockDim.x) {
    ts::u32 position = page * shape.page_size + token;
    float sum = 0.f;
    for (int i = 0; i < n_tiles; i++) {
      ts::Tile tile = tiles[i];
      if (tile.list_stride > 0 && !is_listed(lists + tile.list + size_t(kv_head) * tile.list_stride,
                                             lengths[tile.lengths + kv_head], page)) {
        continue;
      }
      for (ts::u32 row = tile.row; row < tile.row + tile.rows; row++) {
        if (row < begin || row >= end || position >= tile.visible + row - tile.row) {
          continue;
        }
        for (int head = kv_head * group; head < (kv_head + 1) * group; head++) {
          const float* query = qkv + size_t(row) * width + size_t(head) * dim;
          float product = 0.f;
          for (int channel = 0; channel < dim; channel++) {
            float k = reader.key(tile, shape, kv_head, id, page, token, channel);
            product = fmaf(query[channel] * scale, k, product);
          }
          const float* state = states + (size_t(row) * shape.kv_heads * group + head) * ts::ATTEND_STATE;
          sum += exp2f(product - state[0]) / state[1];
        }
      }
    }
    size_t at = (size_t(kv_head) * gridDim.x + page) * shape.page_size + token;
    ts::store(&out[at], sum, add);
  }
}

#define MASS_FLOATS(name, T)                                                                                       \
  extern "C" __global__ void name(const float* qkv, const T* pages, const ts::u32* tables, const ts::Tile* tiles,  \
                                  const ts::u32* lists, const ts::u32* lengths, const float* states, float* out,   \
                                  ts::PageShape shape, int group, int width, float scale, int n_tiles, int begin,  \
                                  int end, int add) {                                                              \
    ts::FloatPages<T, false> reader = {pages};                                                                     \
    mass(qkv, reader, tables, tiles, lists, lengths, states, out, shape, group, width, scale, n_tiles, begin, end, \
         add);                                                                                                     \
  }
MASS_FLOATS(mass_f32, float)
MASS_FLOATS(mass_f16, __half)
MASS_FLOATS(mass_bf16, __nv_bfloat16)

#define MASS_CODES(name, BITS)                                                                                     \
  extern "C" __global__ void name(const float* qkv, const ts::u32* pages, const ts::u32* tables,                   \
                                  const ts::Tile* tiles, const ts::u32* lists, const ts::u32* lengths,             \
                                  const float* states, float* out, ts::PageShape shape, int group, int width,      \
                                  float scale, int n_tiles, int begin, int end, int add, const __half* boxes,      \
                                  const __half* open, int heads) {                                                 \
    ts::CodePages<BITS, false> reader = {pages, boxes, open, heads, nullptr};                                      \
    mass(qkv, reader, tables, tiles, lists, lengths, states, out, shape, group, width, scale, n_tiles, begin, end, \
         add);                                                                                                     \
  }
MASS_CODES(mass_int8, 8)
MASS_CODES(mass_int4, 4)
