// Writes keys and values into pages and grows the boxes, in one pass; rotates queries and keys too, if asked.
//
// qkv [rows, width] f32: queries, keys [kv_heads, head_dim] from column `keys` on and values from `values` on;
// angles [rows, head_dim] as rotary.cu has them, or null; pages and boxes as pages.cuh has them.
// Rows of one page are a run, in ascending order of their offsets: one thread takes a channel of a whole run,
// so that a box grows in registers and in order. runs [n]: begin and end in `entries`, the page and, for
// append_kv_open, which writes to open pages instead, see codes.cuh, their slot. entries [at least n]: a row and
// its token in the page. A run of no rows fills up a bucket of runs.
// Grid (runs, kv_heads), or (runs, kv_heads + query heads) to rotate: the queries in place, the keys on their
// way into the pages. Block 128: one thread per channel, or per pair of a row's query.
// Must move rows·kv_heads·head_dim·(8 + 2·element) bytes, and each touched box twice at most; rotating queries
// rows·(width - values + keys)·4 more.
#include "codes.cuh"
#include "rotary.cuh"

// What is appended.
struct Rows {
  float* qkv;
  const float* angles;
  const uint4* runs;
  const uint2* entries;
  int width, keys, values;
};

// The block's run, whose first entry is asked for at the same time where runs have one row each.
struct Run {
  ts::u32 begin, end, page, slot;
  uint2 first;
};

__device__ __forceinline__ Run run_of(const Rows& rows) {
  uint4 run = rows.runs[blockIdx.x];
  uint2 first = rows.entries[blockIdx.x];
  if (run.x != blockIdx.x && run.x != run.y) {
    first = rows.entries[run.x];
  }
  return {run.x, run.y, run.z, run.w, first};
}

// Appends the block's run to a head of a page, keys [head_dim, page_size] and values behind them.
template <class T>
__device__ __forceinline__ void append_run(const Rows& rows, const Run& run, T* key_columns, T* boxes,
                                           ts::PageShape shape) {
  int kv_head = blockIdx.y, dim = shape.head_dim, half = dim / 2;
  T* value_rows = key_columns + size_t(shape.page_size) * dim;
  T* corners = boxes + ts::box_at(shape, run.page, kv_head);
  for (int channel = threadIdx.x; channel < dim; channel += blockDim.x) {
    T* box = corners + size_t(channel) * 2 * ts::GROUP_PAGES;
    int low = channel < half ? channel : channel - half;
    uint2 entry = run.first;
    bool fresh = entry.y == 0;
    T largest = box[0], smallest = box[ts::GROUP_PAGES];
    for (ts::u32 i = run.begin; i < run.end; i++) {
      if (i > run.begin) {
        entry = rows.entries[i];
      }
      size_t row = entry.x;
      ts::u32 token = entry.y;
      const float* head = rows.qkv + row * rows.width + kv_head * dim;
      float value = head[rows.values + channel], x = head[rows.keys + channel];
      if (rows.angles) {
        const float* angles = rows.angles + row * dim;
        float of_low = head[rows.keys + low], of_high = head[rows.keys + low + half];
        float cosine = angles[low], sine = angles[low + half];
        x = channel < half ? ts::rotated_low(of_low, of_high, cosine, sine)
                           : ts::rotated_high(of_low, of_high, cosine, sine);
      }
      T key = ts::Stored<T>::of(x);
      key_columns[size_t(channel) * shape.page_size + token] = key;
      value_rows[size_t(token) * dim + channel] = ts::Stored<T>::of(value);
      // A NaN is neither above nor below, and does not go away again.
      x = ts::widen(key);
      float upper = ts::widen(largest), lower = ts::widen(smallest);
      if (fresh || !(x <= upper || upper != upper)) {
        largest = key;
      }
      if (fresh || !(x >= lower || lower != lower)) {
        smallest = key;
      }
      fresh = false;
    }
    box[0] = largest;
    box[ts::GROUP_PAGES] = smallest;
  }
}

// Rotates a query head of the run's rows in place.
__device__ __forceinline__ void rotate_run(const Rows& rows, const Run& run, ts::PageShape shape) {
  int dim = shape.head_dim, half = dim / 2;
  for (int i = threadIdx.x; i < int(run.end - run.begin) * half; i += blockDim.x) {
    int channel = i % half;
    size_t row = i < half ? run.first.x : rows.entries[run.begin + i / half].x;
    float* head = rows.qkv + row * rows.width + (blockIdx.y - shape.kv_heads) * dim;
    const float* angles = rows.angles + row * dim;
    float low = head[channel], high = head[half + channel];
    float cosine = angles[channel], sine = angles[half + channel];
    head[channel] = ts::rotated_low(low, high, cosine, sine);
    head[half + channel] = ts::rotated_high(low, high, cosine, sine);
  }
}

#define APPEND_KV(name, T)                                                                              \
  extern "C" __global__ void name(float* qkv, const float* angles, T* pages, T* boxes, const uint4* runs, \
                                  const uint2* entries, ts::PageShape shape, int width, int keys,       \
                                  int values) {                                                         \
    Rows rows = {qkv, angles, runs, entries, width, keys, values};                                      \
    Run run = run_of(rows);                                                                             \
    ts::wait_for_launches();                                                                            \
    if (run.begin == run.end) {                                                                         \
      return;                                                                                           \
    }                                                                                                   \
    if (blockIdx.y < ts::u32(shape.kv_heads)) {                                                         \
      append_run(rows, run, pages + ts::keys_at(shape, run.page, blockIdx.y), boxes, shape);            \
    } else {                                                                                            \
      rotate_run(rows, run, shape);                                                                     \
    }                                                                                                   \
  }
APPEND_KV(append_kv_f32, float)
APPEND_KV(append_kv_f16, __half)
APPEND_KV(append_kv_bf16, __nv_bfloat16)

extern "C" __global__ void append_kv_open(float* qkv, const float* angles, __half* open, __half* boxes,
                                          const uint4* runs, const uint2* entries, ts::PageShape shape, int width,
                                          int keys, int values, int heads) {
  Rows rows = {qkv, angles, runs, entries, width, keys, values};
  Run run = run_of(rows);
  ts::wait_for_launches();
  if (run.begin == run.end) {
    return;
  }
  if (blockIdx.y < ts::u32(shape.kv_heads)) {
    append_run(rows, run, open + ts::open_at(shape, run.slot, heads, blockIdx.y), boxes, shape);
  } else {
    rotate_run(rows, run, shape);
  }
}
