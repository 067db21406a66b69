// Paged attention over pages of int4 keys and values and open pages of f16; see attend_tile.cuh.
//
// Must move tokens·(head_dim·2·1/2 + 4 per group of a value's channels) bytes and a box, head_dim·4, per page, for
// each list and KV head, once per Q queries.
#include "attend_tile.cuh"

ATTEND_CODES_QUERIES(attend_int4, 4)
