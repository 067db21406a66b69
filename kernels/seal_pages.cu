// Turns full pages into codes, as tinyserve-kv's `seal` does it, to the last bit.
//
// filled [n][2]: a page, or 0xffffffff for none, and the slot of `open` that holds it; pages, boxes and open as codes.cuh and pages.cuh
// have them, those of one layer. A channel of the keys with a number that is not finite gets NaN in both
// corners of the box, a group of a value NaN for its minimum: codes cannot hide it.
// Grid (n, kv_heads), block 256. Must move head_dim·page_size·(4 + BITS / 4) bytes per head of a page; keys
// are read twice and values three times, out of the caches after the first.
#include "codes.cuh"

constexpr int SEAL_MOST_DIM = 256;

// The code nearest to `x`; 0 for NaN.
__device__ __forceinline__ ts::u32 nearest(float x, float highest) {
  return ts::u32(fminf(fmaxf(__fadd_rn(x, 0.5f), 0.f), highest + 0.5f));
}

// The lowest half that is not below `x`, which is not negative.
__device__ __forceinline__ __half at_least(float x) {
  __half near = __float2half(x);
  return __half2float(near) < x ? __ushort_as_half((unsigned short)(__half_as_ushort(near) + 1)) : near;
}

template <int BITS>
__device__ __forceinline__ void seal_pages(const __half* open, ts::u32* pages, __half* boxes, const ts::u32* filled,
                                           ts::PageShape shape, int heads) {
  using Codes = ts::Codes<BITS>;
  TS_SHARED(float, lowest, [SEAL_MOST_DIM]);
  TS_SHARED(float, steps, [SEAL_MOST_DIM]);
  ts::wait_for_launches();
  ts::u32 page = filled[2 * blockIdx.x], slot = filled[2 * blockIdx.x + 1];
  int kv_head = blockIdx.y, dim = shape.head_dim, size = shape.page_size;
  // The whole block leaves together.
  if (page == 0xffffffffu) {
    return;
  }
  const __half* from_keys = open + ts::open_at(shape, slot, heads, kv_head);
  const __half* from_values = from_keys + size_t(size) * dim;
  ts::u32* keys = Codes::keys(pages, shape, page, kv_head);
  ts::u32* values = keys + Codes::values(shape);
  __half* scales = reinterpret_cast<__half*>(keys) + Codes::scales(shape);
  __half* minima = scales + size_t(Codes::groups(shape)) * size;
  __half* box = boxes + ts::box_at(shape, page, kv_head);

  for (int channel = threadIdx.x; channel < dim; channel += blockDim.x) {
    float low = INFINITY, high = -INFINITY;
    bool finite = true;
    for (int token = 0; token < size; token++) {
      float x = __half2float(from_keys[size_t(channel) * size + token]);
      finite = finite && fabsf(x) < INFINITY;
      low = fminf(low, x);
      high = fmaxf(high, x);
    }
    __half* corners = box + size_t(channel) * 2 * ts::GROUP_PAGES;
    corners[0] = finite ? __float2half(high) : __ushort_as_half(0x7e00);
    corners[ts::GROUP_PAGES] = finite ? __float2half(low) : __ushort_as_half(0x7e00);
    lowest[channel] = low;
    // A channel that is not finite has codes 0.
    steps[channel] = finite && high > low ? Codes::HIGHEST / (high - low) : 0.f;
    if (!finite) {
      lowest[channel] = 0.f;
    }
  }
  // A warp takes a token's group of channels.
  int lane = threadIdx.x % ts::WARP, warp = threadIdx.x / ts::WARP, warps = blockDim.x / ts::WARP;
  int group_channels = Codes::group_channels(shape), groups = Codes::groups(shape);
  for (int i = warp; i < groups * size; i += warps) {
    int first = i / size * group_channels, end = min(first + group_channels, dim), token = i % size;
    float low = INFINITY, high = -INFINITY;
    bool finite = true;
    for (int channel = first + lane; channel < end; channel += ts::WARP) {
      float x = __half2float(from_values[size_t(token) * dim + channel]);
      finite = finite && fabsf(x) < INFINITY;
      low = fminf(low, x);
      high = fmaxf(high, x);
    }
    low = -ts::warp_max(-low);
    high = ts::warp_max(high);
    finite = __ballot_sync(ts::ALL_LANES, !finite) == 0;
    if (lane == 0) {
      scales[i] = finite ? at_least((high - low) / Codes::HIGHEST) : __ushort_as_half(0);
      minima[i] = finite ? __float2half(low) : __ushort_as_half(0x7e00);
    }
  }
  __syncthreads();

  for (int i = threadIdx.x; i < Codes::key_words(shape) * size; i += blockDim.x) {
    int first = i / size * Codes::PER_WORD, token = i % size;
    ts::u32 word = 0;
    for (int n = 0; n < Codes::PER_WORD && first + n < dim; n++) {
      int channel = first + n;
      float x = __half2float(from_keys[size_t(channel) * size + token]);
      float code = __fmul_rn(__fadd_rn(x, -lowest[channel]), steps[channel]);
      word |= (steps[channel] > 0.f ? nearest(code, Codes::HIGHEST) : 0u) << Codes::shift(n);
    }
    keys[i] = word;
  }
  for (int i = threadIdx.x; i < Codes::value_words(shape) * dim; i += blockDim.x) {
    int first = i / dim * Codes::PER_WORD, channel = i % dim;
    ts::u32 word = 0;
    for (int n = 0; n < Codes::PER_WORD && first + n < size; n++) {
      int token = first + n;
      float x = __half2float(from_values[size_t(token) * dim + channel]);
      size_t at = size_t(channel / group_channels) * size + token;
      float scale = __half2float(scales[at]);
      float step = scale > 0.f ? 1.f / scale : 0.f;
      float code = __fmul_rn(__fadd_rn(x, -__half2float(minima[at])), step);
      word |= nearest(code, Codes::HIGHEST) << Codes::shift(n);
    }
    values[i] = word;
  }
}

#define SEAL_PAGES(name, BITS)                                                                                   \
  extern "C" __global__ void __launch_bounds__(256)                                                              \
  name(const __half* open, ts::u32* pages, __half* boxes, const ts::u32* filled, ts::PageShape shape, int heads) { \
    seal_pages<BITS>(open, pages, boxes, filled, shape, heads);                                                  \
  }
SEAL_PAGES(seal_pages_int8, 8)
SEAL_PAGES(seal_pages_int4, 4)
