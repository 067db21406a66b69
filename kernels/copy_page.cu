// Copies keys, values and boxes of a page within a layer, for copy on write.
//
// pages and boxes as pages.cuh has them, elements of 2 or 4 bytes.
// Grid (kv_heads), block 256. Must move 2·(2·page_size + 2)·head_dim elements per head.
#include "pages.cuh"

template <class T>
__device__ __forceinline__ void copy_page(T* pages, T* boxes, ts::u32 from, ts::u32 to, ts::PageShape shape) {
  int kv_head = blockIdx.x;
  const T* source = pages + ts::keys_at(shape, from, kv_head);
  T* target = pages + ts::keys_at(shape, to, kv_head);
  for (int i = threadIdx.x; i < 2 * shape.page_size * shape.head_dim; i += blockDim.x) {
    target[i] = source[i];
  }
  const T* old_box = boxes + ts::box_at(shape, from, kv_head);
  T* new_box = boxes + ts::box_at(shape, to, kv_head);
  for (int i = threadIdx.x; i < 2 * shape.head_dim; i += blockDim.x) {
    new_box[size_t(i) * ts::GROUP_PAGES] = old_box[size_t(i) * ts::GROUP_PAGES];
  }
}

extern "C" __global__ void copy_page_16(unsigned short* pages, unsigned short* boxes, ts::u32 from, ts::u32 to,
                                        ts::PageShape shape) {
  copy_page(pages, boxes, from, to, shape);
}

extern "C" __global__ void copy_page_32(ts::u32* pages, ts::u32* boxes, ts::u32 from, ts::u32 to,
                                        ts::PageShape shape) {
  copy_page(pages, boxes, from, to, shape);
}
