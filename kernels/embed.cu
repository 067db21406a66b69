// Rows of an embedding table.
//
// table [vocab, hidden], ids [rows] below vocab, out [rows, hidden] f32, replaced or added to.
// Grid (rows, ceil(hidden / 256)), block 256: one thread per channel.
// Must move rows·hidden·(element + 4) bytes, and as many again of out when it adds. A step looks up
// few rows: loads are coalesced, and wider ones would gain nothing that shows.
#include "ts_cuda.cuh"

template <class T>
__device__ __forceinline__ void embed(const T* table, const ts::u32* ids, float* out, int hidden, int add) {
  ts::wait_for_launches();
  int channel = blockIdx.y * blockDim.x + threadIdx.x;
  size_t row = blockIdx.x;
  if (channel < hidden) {
    float x = ts::widen(table[size_t(ids[row]) * hidden + channel]);
    ts::store(&out[row * hidden + channel], x, add);
  }
}

#define EMBED(name, T)                                                                             \
  extern "C" __global__ void name(const T* table, const ts::u32* ids, float* out, int hidden, int add) { \
    embed(table, ids, out, hidden, add);                                                           \
  }
EMBED(embed_f32, float)
EMBED(embed_f16, __half)
EMBED(embed_bf16, __nv_bfloat16)
