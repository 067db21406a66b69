// Gathers the keys of a sequence's pages, widened, for selectors on the host that look at keys.
//
// pages as pages.cuh and codes.cuh have them, table [·] page ids of the sequence, out [kv_heads, tokens, head_dim]
// f32: what attention reads, of the newest row's own page the open one in slot `slot`.
// Grid (pages, kv_heads), block 128: threads take the channels of one token after the other.
// Must move tokens·kv_heads·head_dim·(element + 4) bytes. It serves research: what it waits for is the bus.
#include "attend_codes.cuh"
#include "attend_floats.cuh"

template <class Reader>
__device__ __forceinline__ void gather_keys(const Reader& reader, const ts::u32* table, float* out,
                                            ts::PageShape shape, int tokens, ts::u32 slot) {
  ts::Tile tile = {};
  tile.visible = tokens;
  tile.open = slot;
  ts::u32 place = blockIdx.x;
  int kv_head = blockIdx.y, dim = shape.head_dim, first = int(place) * shape.page_size;
  int n = min(shape.page_size, tokens - first);
  float* to = out + (size_t(kv_head) * tokens + first) * dim;
  for (int i = threadIdx.x; i < n * dim; i += blockDim.x) {
    to[i] = reader.key(tile, shape, kv_head, table[place], place, i / dim, i % dim);
  }
}

#define GATHER_FLOATS(name, T)                                                                               \
  extern "C" __global__ void name(const T* pages, const ts::u32* table, float* out, ts::PageShape shape,     \
                                  int tokens, int slot) {                                                    \
    ts::FloatPages<T, false> reader = {pages};                                                               \
    gather_keys(reader, table, out, shape, tokens, ts::u32(slot));                                           \
  }
GATHER_FLOATS(gather_keys_f32, float)
GATHER_FLOATS(gather_keys_f16, __half)
GATHER_FLOATS(gather_keys_bf16, __nv_bfloat16)

#define GATHER_CODES(name, BITS)                                                                               \
  extern "C" __global__ void name(const ts::u32* pages, const ts::u32* table, float* out, ts::PageShape shape, \
                                  int tokens, int slot, const __half* boxes, const __half* open, int heads) {  \
    ts::CodePages<BITS, false> reader = {pages, boxes, open, heads, nullptr};                                  \
    gather_keys(reader, table, out, shape, tokens, ts::u32(slot));                                             \
  }
GATHER_CODES(gather_keys_int8, 8)
GATHER_CODES(gather_keys_int4, 4)
