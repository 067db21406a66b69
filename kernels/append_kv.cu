// Writes keys and values into pages and grows the boxes, in one pass.
//
// qkv [rows, width] f32, of which keys [kv_heads, head_dim] begin at column `keys` and values at
// `values`; pages and boxes as pages.cuh has them. Row order[i] goes to token offsets[order[i]] of page
// slots[order[i]]. Rows of one page are a run, starts[run]..starts[run + 1], in ascending order of their
// offsets: one thread takes a channel of a whole run, so that a box grows in registers and in order.
// A run of no rows fills up a bucket of runs. append_kv_open writes to the slots open_slots[run] of open pages
// instead, see codes.cuh.
// Grid (runs, kv_heads), block 128: one thread per channel.
// Must move rows·kv_heads·head_dim·(8 + 2·element) bytes, and each touched box twice at most.
#include "codes.cuh"

// What is appended.
struct Rows {
  const float* qkv;
  const ts::u32 *slots, *offsets, *order, *starts;
  int width, keys, values;
};

// Whether the block's run is one of no rows.
__device__ __forceinline__ bool is_empty_run(const ts::u32* starts) {
  return starts[blockIdx.x] == starts[blockIdx.x + 1];
}

// Appends the block's run to a head of a page, keys [head_dim, page_size] and values behind them.
template <class T>
__device__ __forceinline__ void append_run(const Rows& rows, T* key_columns, T* boxes, ts::PageShape shape) {
  int kv_head = blockIdx.y, dim = shape.head_dim;
  ts::u32 begin = rows.starts[blockIdx.x], end = rows.starts[blockIdx.x + 1];
  T* value_rows = key_columns + size_t(shape.page_size) * dim;
  T* corners = boxes + ts::box_at(shape, rows.slots[rows.order[begin]], kv_head);
  for (int channel = threadIdx.x; channel < dim; channel += blockDim.x) {
    T* box = corners + size_t(channel) * 2 * ts::GROUP_PAGES;
    bool fresh = rows.offsets[rows.order[begin]] == 0;
    T largest = box[0], smallest = box[ts::GROUP_PAGES];
    for (ts::u32 i = begin; i < end; i++) {
      size_t row = rows.order[i];
      ts::u32 token = rows.offsets[row];
      const float* from = rows.qkv + row * rows.width + kv_head * dim + channel;
      T key = ts::Stored<T>::of(from[rows.keys]);
      key_columns[size_t(channel) * shape.page_size + token] = key;
      value_rows[size_t(token) * dim + channel] = ts::Stored<T>::of(from[rows.values]);
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

#define APPEND_KV(name, T)                                                                              \
  extern "C" __global__ void name(const float* qkv, T* pages, T* boxes, const ts::u32* slots,           \
                                  const ts::u32* offsets, const ts::u32* order, const ts::u32* starts,  \
                                  ts::PageShape shape, int width, int keys, int values) {               \
    if (is_empty_run(starts)) {                                                                         \
      return;                                                                                           \
    }                                                                                                   \
    ts::u32 page = slots[order[starts[blockIdx.x]]];                                                    \
    Rows rows = {qkv, slots, offsets, order, starts, width, keys, values};                              \
    append_run(rows, pages + ts::keys_at(shape, page, blockIdx.y), boxes, shape);                       \
  }
APPEND_KV(append_kv_f32, float)
APPEND_KV(append_kv_f16, __half)
APPEND_KV(append_kv_bf16, __nv_bfloat16)

extern "C" __global__ void append_kv_open(const float* qkv, __half* open, __half* boxes, const ts::u32* slots,
                                          const ts::u32* offsets, const ts::u32* order, const ts::u32* starts,
                                          ts::PageShape shape, int width, int keys, int values,
                                          const ts::u32* open_slots, int heads) {
  if (is_empty_run(starts)) {
    return;
  }
  Rows rows = {qkv, slots, offsets, order, starts, width, keys, values};
  append_run(rows, open + ts::open_at(shape, open_slots[blockIdx.x], heads, blockIdx.y), boxes, shape);
}
