// Copies keys, values and boxes of a page within a layer, for copy on write.
//
// pages [·][head] elements of 2 or 4 bytes, `head` of them for keys and values of a head of a page, which lie
// as pages.cuh has them; boxes as there. copy_open copies a slot of open pages in all layers, n halves.
// Grid (kv_heads), block 256, or (ceil(n / 256)) for copy_open.
// Must move 2·(head + 2·head_dim) elements per head, or 4·n bytes.
#include "pages.cuh"

template <class T>
__device__ __forceinline__ void copy_page(T* pages, T* boxes, ts::u32 from, ts::u32 to, ts::PageShape shape,
                                          int head) {
  int kv_head = blockIdx.x;
  auto at = [&](ts::u32 page) {
    size_t run = size_t(page / ts::GROUP_PAGES) * shape.kv_heads + kv_head;
    return (run * ts::GROUP_PAGES + page % ts::GROUP_PAGES) * head;
  };
  const T* source = pages + at(from);
  T* target = pages + at(to);
  for (int i = threadIdx.x; i < head; i += blockDim.x) {
    target[i] = source[i];
  }
  const T* old_box = boxes + ts::box_at(shape, from, kv_head);
  T* new_box = boxes + ts::box_at(shape, to, kv_head);
  for (int i = threadIdx.x; i < 2 * shape.head_dim; i += blockDim.x) {
    new_box[size_t(i) * ts::GROUP_PAGES] = old_box[size_t(i) * ts::GROUP_PAGES];
  }
}

extern "C" __global__ void copy_page_16(unsigned short* pages, unsigned short* boxes, ts::u32 from, ts::u32 to,
                                        ts::PageShape shape, int head) {
  copy_page(pages, boxes, from, to, shape, head);
}

extern "C" __global__ void copy_page_32(ts::u32* pages, ts::u32* boxes, ts::u32 from, ts::u32 to,
                                        ts::PageShape shape, int head) {
  copy_page(pages, boxes, from, to, shape, head);
}

extern "C" __global__ void copy_open(unsigned short* open, int from, int to, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) {
    open[size_t(to) * n + i] = open[size_t(from) * n + i];
  }
}
