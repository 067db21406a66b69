// Kernels with one mistake each, and one with none: what the checker says of them, a line for each.
#include "cuda_emulator.h"

extern "C" void right(float* out, int n) {
  TS_SHARED(float, row, [64]);
  row[threadIdx.x] = float(n);
  __syncthreads();
  out[threadIdx.x] = row[63 - threadIdx.x];
}
extern "C" void no_barrier(float* out, int n) {
  TS_SHARED(float, row, [64]);
  row[threadIdx.x] = float(n);
  out[threadIdx.x] = row[63 - threadIdx.x];
}
// Written again while others still read.
extern "C" void one_barrier_of_two(float* out, int n) {
  TS_SHARED(float, row, [64]);
  for (int i = 0; i < n; i++) {
    row[threadIdx.x] = float(i);
    __syncthreads();
    out[threadIdx.x] = row[63 - threadIdx.x];
  }
}
// The shuffle behind it brings the lanes together here, and orders nothing on a GPU.
extern "C" void no_syncwarp(float* out, int n) {
  TS_SHARED(float, row, [64]);
  row[threadIdx.x] = float(n);
  float other = __shfl_xor_sync(~0u, float(n), 1);
  out[threadIdx.x] = row[threadIdx.x ^ 1] + other;
}
extern "C" void lost_update(float* out, int) { *out = *out + 1; }
extern "C" void past_the_end(float* out, int n) { out[threadIdx.x + 1] = float(n); }
extern "C" void unset(float* out, int) {
  TS_SHARED(float, row, [64]);
  out[threadIdx.x] = row[threadIdx.x];
}
extern "C" void misaligned(float* out, int n) {
  *reinterpret_cast<double*>(out + 1) = n;
}
extern "C" void divergent(float* out, int n) {
  if (threadIdx.x < 32)
    __syncthreads();
  out[threadIdx.x] = float(n);
}
extern "C" void early_read(float* out, int n) {
  float before = out[threadIdx.x];
  emu_wait_for_launches();
  out[threadIdx.x] = before + n;
}
extern "C" void early_write(float* out, int n) {
  out[threadIdx.x] = float(n);
  emu_wait_for_launches();
}
extern "C" void never_waits(float*, int) {}
EMU_REGISTER(early_read)
EMU_REGISTER(early_write)
EMU_REGISTER(never_waits)
EMU_REGISTER(right)
EMU_REGISTER(no_barrier)
EMU_REGISTER(one_barrier_of_two)
EMU_REGISTER(no_syncwarp)
EMU_REGISTER(lost_update)
EMU_REGISTER(past_the_end)
EMU_REGISTER(unset)
EMU_REGISTER(misaligned)
EMU_REGISTER(divergent)
__attribute__((no_sanitize("thread"))) int main() {
  float* out = static_cast<float*>(aligned_alloc(256, 256));
  cuda_emulator_track(out, 64 * sizeof *out);
  int n = 2;
  void* params[] = {&out, &n};
  unsigned grid[3] = {1, 1, 1}, block[3] = {64, 1, 1};
  for (emu::Kernel* k = emu::registry; k; k = k->next) {
    // Some are wrong only where the launch before may still run.
    bool early = strstr(k->name, "early") || strstr(k->name, "never");
    char error[900] = "nothing";
    if (early)
      cuda_emulator_launch("right", grid, block, 0, false, params, 0, error, sizeof error);
    cuda_emulator_launch(k->name, grid, block, 0, early, params, 0, error, sizeof error);
    printf("%s: %s\n", k->name, error);
  }
}
