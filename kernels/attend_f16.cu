// Paged attention over pages of f16 keys and values; see attend_tile.cuh.
//
// Must move tokens·head_dim·2·2 bytes per list and KV head, once per Q queries.
#include "attend_tile.cuh"

ATTEND_TENSOR(attend_f16_64, __half, 1)
ATTEND_TENSOR(attend_f16_128, __half, 2)
ATTEND_FLOATS(attend_f16_8, __half, true, 8)
ATTEND_FLOATS(attend_f16_any, __half, false, 4)
