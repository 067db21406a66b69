// Projections through weights in bf16, as project.cuh has them.
//
// Must move outputs·inputs·2 bytes of weights once per R rows; x comes out of the caches.
#include "project.cuh"

PROJECT_ROWS(project_bf16, __nv_bfloat16)
