// What selection and attention work through: tiles, which are neighbouring rows of one sequence.
#pragma once
#include "pages.cuh"

namespace ts {

// As TileRecord in crates/tinyserve-kernels/src/cuda/attend/plan.rs has it.
struct Tile {
  // First row of the batch, and rows; a tile that reads a list has one.
  u32 row, rows;
  // Tokens that the first row sees; each next row sees one more.
  u32 visible;
  // Where the sequence's page ids begin in `tables`.
  u32 table;
  // Where the lists of the tile's KV heads begin in `lists`, `list_stride` apart; every page is read,
  // and there is no list, when the stride is 0.
  u32 list, list_stride;
  // Where the tile's KV heads begin in `lengths`, which has the length of each list.
  u32 lengths;
  // Where the tile's parts begin in the buffer of parts, in parts of one KV head; NO_PARTS when the
  // list is read in one piece, FUSED when the launch that selects reads it, too.
  u32 parts;
  // How pages are selected: how many, and how many first and last ones always are.
  u32 budget, sink, recent;
  // Slot of the page that the tile's rows are in themselves, where sealed pages hold codes.
  u32 open;
};

constexpr u32 NO_PARTS = 0xffffffffu;
constexpr u32 FUSED = 0xfffffffeu;
// What fills up a list of tiles to a bucket; a list of records is filled up with tiles of no rows.
constexpr u32 NO_TILE = 0xffffffffu;

// Pages that the last row of a tile sees.
__device__ __forceinline__ u32 pages_seen(const Tile& tile, int page_size) {
  u32 tokens = tile.visible + tile.rows - 1;
  return (tokens + page_size - 1) / page_size;
}

// Parts of a list of `pages` pages, the most that there are, and pages of each but the last: all about as long, so
// that blocks end together. As in crates/tinyserve-kernels/src/cuda/attend/parts.rs.
__device__ __forceinline__ u32 parts_of_list(u32 pages, u32 least_pages) {
  u32 least = min(4u, (pages + least_pages - 1) / least_pages);
  return max(least, (pages + 2 * least_pages - 1) / (2 * least_pages));
}

__device__ __forceinline__ u32 pages_of_part(u32 pages, u32 least_pages) {
  u32 parts = max(1u, parts_of_list(pages, least_pages));
  return max(1u, (pages + parts - 1) / parts);
}

}  // namespace ts
