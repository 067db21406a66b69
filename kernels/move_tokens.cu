// Moves tokens within the pages of a layer, in order, and rebuilds the boxes of the pages that they reach.
//
// moves [n][4]: page and offset that a token leaves, page and offset that it reaches; pages and boxes as pages.cuh
// has them. Moves to one page are neighbours; its box becomes that of its tokens up to the last one that came.
// Grid (kv_heads), block 128: one thread per channel, which makes all moves, so that they stay in order.
// Must move n·head_dim·4 elements per head, and page_size·head_dim of each page that is reached.
#include "pages.cuh"

template <class T>
__device__ __forceinline__ void move_tokens(T* pages, T* boxes, const uint4* moves, int n, ts::PageShape shape) {
  int kv_head = blockIdx.x, dim = shape.head_dim, page_size = shape.page_size;
  for (int channel = threadIdx.x; channel < dim; channel += blockDim.x) {
    for (int i = 0; i < n; i++) {
      uint4 move = moves[i];
      T* from = pages + ts::keys_at(shape, move.x, kv_head);
      T* to = pages + ts::keys_at(shape, move.z, kv_head);
      to[size_t(channel) * page_size + move.w] = from[size_t(channel) * page_size + move.y];
      from = pages + ts::values_at(shape, move.x, kv_head);
      to = pages + ts::values_at(shape, move.z, kv_head);
      to[size_t(move.w) * dim + channel] = from[size_t(move.y) * dim + channel];
    }
    for (int i = 0; i < n;) {
      ts::u32 page = moves[i].z, last = 0;
      for (; i < n && moves[i].z == page; i++) {
        last = max(last, moves[i].w);
      }
      const T* keys = pages + ts::keys_at(shape, page, kv_head) + size_t(channel) * page_size;
      T largest = keys[0], smallest = keys[0];
      for (ts::u32 token = 1; token <= last; token++) {
        // A NaN is neither above nor below, and does not go away again.
        float x = ts::widen(keys[token]), high = ts::widen(largest), low = ts::widen(smallest);
        largest = x <= high || high != high ? largest : keys[token];
        smallest = x >= low || low != low ? smallest : keys[token];
      }
      T* box = boxes + ts::box_at(shape, page, kv_head) + size_t(channel) * 2 * ts::GROUP_PAGES;
      box[0] = largest;
      box[ts::GROUP_PAGES] = smallest;
    }
  }
}

#define MOVE_TOKENS(name, T)                                                                                        \
  extern "C" __global__ void name(T* pages, T* boxes, const uint4* moves, int n, ts::PageShape shape) {            \
    move_tokens(pages, boxes, moves, n, shape);                                                                     \
  }
MOVE_TOKENS(move_tokens_f32, float)
MOVE_TOKENS(move_tokens_f16, __half)
MOVE_TOKENS(move_tokens_bf16, __nv_bfloat16)
