// Scoring, selection and attention over pages of f16 in one launch; see fused_decode.cuh.
//
// Must move pages·head_dim·2·2 bytes of boxes, half of it for a query alone, and budget·page_size·head_dim·2·2 of
// keys and values, per KV head.
#include "fused_decode.cuh"

FUSED_TENSOR(fused_decode_f16_64, __half, 1)
FUSED_TENSOR(fused_decode_f16_128, __half, 2)
FUSED_FLOATS(fused_decode_f16_8, __half, 8)
