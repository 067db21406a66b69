// Paged attention over pages of bf16 keys and values; see attend_tile.cuh.
//
// Must move tokens·head_dim·2·2 bytes per list and KV head, once per Q queries.
#include "attend_tile.cuh"

ATTEND_TENSOR(attend_bf16_64, __nv_bfloat16, 1)
ATTEND_TENSOR(attend_bf16_128, __nv_bfloat16, 2)
ATTEND_FLOATS(attend_bf16_8, __nv_bfloat16, true, 8)
ATTEND_FLOATS(attend_bf16_any, __nv_bfloat16, false, 4)
