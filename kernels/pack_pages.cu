// Packs a page as files have it, and puts it back: for each layer its heads' keys and values, then their boxes.
//
// pages [layers][groups][kv_heads][GROUP_PAGES][head] elements of 2 or 4 bytes, `head` of them for keys and values
// of a head of a page; boxes of as many layers and groups, as pages.cuh has them; packed
// [layers][kv_heads·(head + 2·head_dim)].
// Grid (kv_heads, layers), block 256: threads take neighbouring elements.
// Must move 2·(head + 2·head_dim) elements per head and layer. The bus, which the packed page crosses in one copy,
// is slower by far.
#include "pages.cuh"

template <class T, bool PACK>
__device__ __forceinline__ void pack(T* pages, T* boxes, T* packed, ts::u32 page, ts::PageShape shape, int head,
                                     int groups) {
  int kv_head = blockIdx.x, layer = blockIdx.y, corners = 2 * shape.head_dim;
  size_t group = size_t(layer) * groups + page / ts::GROUP_PAGES;
  size_t run = group * shape.kv_heads + kv_head;
  T* own = pages + (run * ts::GROUP_PAGES + page % ts::GROUP_PAGES) * head;
  T* box = boxes + run * corners * ts::GROUP_PAGES + page % ts::GROUP_PAGES;
  T* layer_packed = packed + size_t(layer) * shape.kv_heads * (head + corners);
  T* packed_head = layer_packed + size_t(kv_head) * head;
  T* packed_box = layer_packed + size_t(shape.kv_heads) * head + size_t(kv_head) * corners;
  for (int i = threadIdx.x; i < head; i += blockDim.x) {
    if (PACK) {
      packed_head[i] = own[i];
    } else {
      own[i] = packed_head[i];
    }
  }
  for (int i = threadIdx.x; i < corners; i += blockDim.x) {
    if (PACK) {
      packed_box[i] = box[size_t(i) * ts::GROUP_PAGES];
    } else {
      box[size_t(i) * ts::GROUP_PAGES] = packed_box[i];
    }
  }
}

#define PACK_PAGE(name, T, PACK)                                                                              \
  extern "C" __global__ void name(T* pages, T* boxes, T* packed, ts::u32 page, ts::PageShape shape, int head, \
                                  int groups) {                                                               \
    pack<T, PACK>(pages, boxes, packed, page, shape, head, groups);                                           \
  }
PACK_PAGE(pack_page_16, unsigned short, true)
PACK_PAGE(pack_page_32, ts::u32, true)
PACK_PAGE(unpack_page_16, unsigned short, false)
PACK_PAGE(unpack_page_32, ts::u32, false)
