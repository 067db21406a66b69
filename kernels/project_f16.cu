// Projections through weights in f16, as project.cuh has them.
//
// Must move outputs·inputs·2 bytes of weights once per R rows; x comes out of the caches.
#include "project.cuh"

PROJECT_ROWS(project_f16, __half)
