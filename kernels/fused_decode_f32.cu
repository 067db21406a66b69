// Scoring, selection and attention over pages of f32 in one launch; see fused_decode.cuh.
//
// Must move pages·head_dim·2·4 bytes of boxes, half of it for a query alone, and budget·page_size·head_dim·2·4 of
// keys and values, per KV head.
#include "fused_decode.cuh"

FUSED_FLOATS(fused_decode_f32_1, float, 1)
FUSED_FLOATS(fused_decode_f32_4, float, 4)
FUSED_FLOATS(fused_decode_f32_8, float, 8)
