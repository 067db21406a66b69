// Where keys, values and boxes lie: the arithmetic of tinyserve-kv's KvLayout, once for all kernels.
//
// Pages of a layer: [groups][kv_heads][GROUP_PAGES][keys [head_dim, page_size], values [page_size, head_dim]].
// Boxes of a layer: [groups][kv_heads][head_dim][2 (max, min)][GROUP_PAGES].
#pragma once
#include "ts_cuda.cuh"

namespace ts {

constexpr u32 GROUP_PAGES = 64;

struct PageShape {
  int kv_heads;
  int head_dim;
  int page_size;
};

// First key of a head of a page, in elements; its values follow its keys.
__device__ __forceinline__ size_t keys_at(PageShape shape, u32 page, int kv_head) {
  size_t run = size_t(page / GROUP_PAGES) * shape.kv_heads + kv_head;
  return 2 * (run * GROUP_PAGES + page % GROUP_PAGES) * shape.page_size * shape.head_dim;
}

__device__ __forceinline__ size_t values_at(PageShape shape, u32 page, int kv_head) {
  return keys_at(shape, page, kv_head) + size_t(shape.page_size) * shape.head_dim;
}

// Maximum of a page's first channel; its minimum lies GROUP_PAGES further, the next channel twice that.
__device__ __forceinline__ size_t box_at(PageShape shape, u32 page, int kv_head) {
  size_t run = size_t(page / GROUP_PAGES) * shape.kv_heads + kv_head;
  return run * 2 * shape.head_dim * GROUP_PAGES + page % GROUP_PAGES;
}

}  // namespace ts
