// Projections through weights in f32, as project.cuh has them.
//
// Must move outputs·inputs·4 bytes of weights once per R rows; x comes out of the caches.
#include "project.cuh"

PROJECT_ROWS(project_f32, float)
