// Scoring, selection and attention over pages of int4 and open pages of f16 in one launch; see fused_decode.cuh.
//
// Must move pages·head_dim·4 bytes of boxes, half of it for a query alone, and budget·page_size·(head_dim·2·1/2 + 4
// per group of a value's channels) of keys and values, per KV head.
#include "fused_decode.cuh"

FUSED_CODES(fused_decode_int4_1, 4, 1)
FUSED_CODES(fused_decode_int4_4, 4, 4)
FUSED_CODES(fused_decode_int4_8, 4, 8)
