// Paged attention over pages of f32 keys and values; see attend_tile.cuh.
//
// Must move tokens·head_dim·2·4 bytes per list and KV head, once per Q queries.
#include "attend_tile.cuh"

ATTEND_FLOATS_QUERIES(attend_f32, float)
ATTEND_FLOATS(attend_f32_any, float, false, 4)
