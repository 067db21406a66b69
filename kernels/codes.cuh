// Sealed pages as codes: the arithmetic of tinyserve-kv's CodeLayout, once for all kernels.
//
// One head of a page: keys [ceil(head_dim / n)][page_size], values [ceil(page_size / n)][head_dim] in words of
// n = 32 / BITS codes, then scales and minima of the values [groups][page_size] in f16. A word of keys is
// neighbouring channels of a token, a word of values neighbouring tokens of a channel. A key's channel has the
// page's box as its range. Open pages lie apart: [slots][layers][kv_heads][keys [head_dim, page_size],
// values [page_size, head_dim]] in f16.
#pragma once
#include "pages.cuh"

namespace ts {

// Channels of a value that share a range when codes have 4 bits.
constexpr int CODE_GROUP_CHANNELS = 64;

template <int BITS> struct Codes {
  static constexpr int PER_WORD = 32 / BITS;
  static constexpr u32 MASK = (1u << BITS) - 1;
  static constexpr float HIGHEST = float(MASK);

  // Where code `i` lies in its word: with 4 bits the lower halves of the bytes come first.
  static __device__ __forceinline__ int shift(int i) { return 8 * (i % 4) + 4 * (i / 4); }

  // Code `i` of a word, exactly: a number of 2^23 and the code has the code as its lowest bits.
  static __device__ __forceinline__ float code(u32 word, int i) {
    return __uint_as_float((word >> shift(i) & MASK) | 0x4b000000u) - 8388608.f;
  }

  static __device__ __forceinline__ int key_words(PageShape shape) {
    return (shape.head_dim + PER_WORD - 1) / PER_WORD;
  }

  static __device__ __forceinline__ int value_words(PageShape shape) {
    return (shape.page_size + PER_WORD - 1) / PER_WORD;
  }

  static __device__ __forceinline__ int group_channels(PageShape shape) {
    return BITS == 4 ? CODE_GROUP_CHANNELS : shape.head_dim;
  }

  static __device__ __forceinline__ int groups(PageShape shape) {
    return BITS == 4 ? (shape.head_dim + CODE_GROUP_CHANNELS - 1) / CODE_GROUP_CHANNELS : 1;
  }

  // Words of one head of a page: keys, values, scales and minima.
  static __device__ __forceinline__ size_t head_words(PageShape shape) {
    return size_t(key_words(shape) + groups(shape)) * shape.page_size + size_t(value_words(shape)) * shape.head_dim;
  }

  // The keys of a head of a page.
  static __device__ __forceinline__ u32* keys(u32* pages, PageShape shape, u32 page, int kv_head) {
    size_t run = size_t(page / GROUP_PAGES) * shape.kv_heads + kv_head;
    return pages + (run * GROUP_PAGES + page % GROUP_PAGES) * head_words(shape);
  }

  static __device__ __forceinline__ const u32* keys(const u32* pages, PageShape shape, u32 page, int kv_head) {
    return keys(const_cast<u32*>(pages), shape, page, kv_head);
  }

  // From the keys of a head, its values.
  static __device__ __forceinline__ size_t values(PageShape shape) {
    return size_t(key_words(shape)) * shape.page_size;
  }

  // From the keys of a head, in halves, its scales; the minima follow, groups·page_size further.
  static __device__ __forceinline__ size_t scales(PageShape shape) {
    return 2 * (values(shape) + size_t(value_words(shape)) * shape.head_dim);
  }
};

// The keys of a head in an open page's slot; `heads` are those of all layers.
__device__ __forceinline__ size_t open_at(PageShape shape, u32 slot, int heads, int kv_head) {
  return 2 * (size_t(slot) * heads + kv_head) * shape.page_size * shape.head_dim;
}

}  // namespace ts
