// The pointwise half of a feed-forward layer: f(x), or f(gate)·up.
//
// x [rows, width], or [rows, 2·width] with gate beside up; out [rows, width], all f32.
// Grid (rows, ceil(width / 256)), block 256: one thread per output.
// Must move rows·width·8 bytes, 12 when gated.
#include "activate.cuh"

extern "C" __global__ void activate(const float* x, float* out, int activation, int gated, int width) {
  ts::wait_for_launches();
  int channel = blockIdx.y * blockDim.x + threadIdx.x;
  size_t row = blockIdx.x;
  if (channel < width) {
    const float* gate = x + row * (gated ? 2 * width : width) + channel;
    float y = ts::activated(activation, gate[0]);
    out[row * width + channel] = gated ? y * gate[width] : y;
  }
}
