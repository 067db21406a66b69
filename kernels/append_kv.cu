// Writes keys and values into pages and grows the boxes, in one pass.
//
// qkv [rows, width] f32, of which keys [kv_heads, head_dim] begin at column `keys` and values at
// `values`; pages and boxes as pages.cuh has them. Row order[i] goes to token offsets[order[i]] of page
// slots[order[i]]. Rows of one page are a run, starts[run]..starts[run + 1], in ascending order of their
// offsets: one thread takes a channel of a whole run, so that a box grows in registers and in order.
// Grid (runs, kv_heads), block 128: one thread per channel.
// Must move rows·kv_heads·head_dim·(8 + 2·element) bytes, and each touched box twice at most.
#include "pages.cuh"

template <class T>
__device__ __forceinline__ void append_kv(const float* qkv, T* pages, T* boxes, const ts::u32* slots,
                                          const ts::u32* offsets, const ts::u32* order, const ts::u32* starts,
                                          ts::PageShape shape, int width, int keys, int values) {
  int kv_head = blockIdx.y, dim = shape.head_dim;
  ts::u32 begin = starts[blockIdx.x], end = starts[blockIdx.x + 1];
  ts::u32 page = slots[order[begin]];
  T* key_columns = pages + ts::keys_at(shape, page, kv_head);
  T* value_rows = pages + ts::values_at(shape, page, kv_head);
  T* corners = boxes + ts::box_at(shape, page, kv_head);
  for (int channel = threadIdx.x; channel < dim; channel += blockDim.x) {
    T* box = corners + size_t(channel) * 2 * ts::GROUP_PAGES;
    bool fresh = offsets[order[begin]] == 0;
    T largest = box[0], smallest = box[ts::GROUP_PAGES];
    for (ts::u32 i = begin; i < end; i++) {
      size_t row = order[i];
      ts::u32 token = offsets[row];
      const float* from = qkv + row * width + kv_head * dim + channel;
      T key = ts::Stored<T>::of(from[keys]);
      key_columns[size_t(channel) * shape.page_size + token] = key;
      value_rows[size_t(token) * dim + channel] = ts::Stored<T>::of(from[values]);
      // A NaN is neither above nor below, and does not go away again.
      float x = ts::widen(key), high = ts::widen(largest), low = ts::widen(smallest);
      if (fresh || !(x <= high || high != high)) {
        largest = key;
      }
      if (fresh || !(x >= low || low != low)) {
        smallest = key;
      }
      fresh = false;
    }
    box[0] = largest;
    box[ts::GROUP_PAGES] = smallest;
  }
}

#define APPEND_KV(name, T)                                                                            \
  extern "C" __global__ void name(const float* qkv, T* pages, T* boxes, const ts::u32* slots,         \
                                  const ts::u32* offsets, const ts::u32* order, const ts::u32* starts, \
                                  ts::PageShape shape, int width, int keys, int values) {             \
    append_kv(qkv, pages, boxes, slots, offsets, order, starts, shape, width, keys, values);          \
  }
APPEND_KV(append_kv_f32, float)
APPEND_KV(append_kv_f16, __half)
APPEND_KV(append_kv_bf16, __nv_bfloat16)
