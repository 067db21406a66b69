// Merges the parts of the tiles that were attended to in parts, in their order.
//
// parts [parts, kv_heads, group][head_dim + 3] f32 as attend.cu leaves them; out [rows, q_heads·head_dim] f32;
// states [rows, q_heads][3] f32 or null.
// Grid (tiles, q_heads), block 128: one thread per channel.
// Must move parts·q_heads·(head_dim + 3)·4 bytes, about a hundredth of what attention reads.
#include "attend.cuh"

extern "C" __global__ void __launch_bounds__(128)
combine(const float* parts, const ts::Tile* tiles, const ts::u32* lengths, float* out, float* states,
        ts::PageShape shape, int group, int part_pages) {
  ts::Tile tile = tiles[blockIdx.x];
  if (tile.parts == ts::NO_PARTS || tile.parts == ts::FUSED) {
    return;
  }
  int head = blockIdx.y, kv_head = head / group, dim = shape.head_dim;
  ts::u32 pages = tile.list_stride > 0 ? lengths[tile.lengths + kv_head] : ts::pages_seen(tile, shape.page_size);
  ts::u32 of_part = ts::pages_of_part(pages, part_pages), n = (pages + of_part - 1) / of_part;
  size_t stride = size_t(shape.kv_heads) * group * (dim + ts::ATTEND_STATE);
  const float* first = parts + tile.parts * stride + size_t(head) * (dim + ts::ATTEND_STATE);
  float largest = -INFINITY;
  for (ts::u32 i = 0; i < n; i++) {
    largest = fmaxf(largest, first[i * stride + dim]);
  }
  float mass = 0.f, tilt = 0.f;
  for (ts::u32 i = 0; i < n; i++) {
    const float* state = first + i * stride + dim;
    float fall = state[0] - largest, factor = exp2f(fall);
    mass += factor * state[1];
    tilt += factor * (state[2] + state[1] * fall);
  }
  size_t to = size_t(tile.row) * shape.kv_heads * group + head;
  for (int channel = threadIdx.x; channel < dim; channel += blockDim.x) {
    float sum = 0.f;
    for (ts::u32 i = 0; i < n; i++) {
      sum = fmaf(exp2f(first[i * stride + dim] - largest), first[i * stride + channel], sum);
    }
    out[to * dim + channel] = sum / mass;
  }
  if (threadIdx.x == 0 && states) {
    states[to * ts::ATTEND_STATE] = largest;
    states[to * ts::ATTEND_STATE + 1] = mass;
    states[to * ts::ATTEND_STATE + 2] = tilt;
  }
}
