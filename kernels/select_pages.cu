// Chooses the pages of the tiles that select, from their scores.
//
// scores [tiles, kv_heads, most_pages] f32 -> the tile's lists, sorted.
// Grid (selecting tiles, kv_heads), block 256: one block per list. Deterministic: counts are whole
// numbers, and ties go to the lower page.
// Must move six times pages·4 bytes, which stay in the caches.
#include "select.cuh"
#include "tile.cuh"

extern "C" __global__ void __launch_bounds__(256)
select_pages(const float* scores, const ts::Tile* tiles, const ts::u32* selecting, ts::u32* lists, int page_size,
             int most_pages) {
  ts::u32 number = selecting[blockIdx.x];
  ts::Tile tile = {};
  if (number != ts::NO_TILE) {
    tile = tiles[number];
  }
  ts::wait_for_launches();
  if (number == ts::NO_TILE) {
    return;
  }
  scores += (size_t(blockIdx.x) * gridDim.y + blockIdx.y) * most_pages;
  ts::u32* list = lists + tile.list + size_t(blockIdx.y) * tile.list_stride;
  ts::select_pages(scores, ts::pages_seen(tile, page_size), tile.budget, tile.sink, tile.recent, list);
}
