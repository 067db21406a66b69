// Paged attention over pages of bf16 keys and values; see attend_tile.cuh.
//
// Must move tokens·head_dim·2·2 bytes per list and KV head, once per Q queries.
#include "attend_tile.cuh"

ATTEND_FLOATS_QUERIES(attend_bf16, __nv_bfloat16)
