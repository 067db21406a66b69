// Rotary embedding (rotate-half): the angles of a step, and the rotation of queries and keys.
//
// rotary_angles: positions [rows], frequencies [half] f32 -> out [rows, 2·half]: cosines, then sines.
// Grid (rows), block 128: one thread per frequency. Once per step, for all layers: the angle is rounded
// to f32 as models are trained, and its cosine is computed in f64, which is the CPU's to the last bit.
//
// rotary: angles [rows, head_dim], qkv [rows, width] f32, of which the first `heads` heads (queries and
// keys) are rotated in place. Grid (rows, heads), block 64: one thread per pair of channels.
// Must move rows·heads·head_dim·8 bytes, and the angles once.
#include "rotary.cuh"

extern "C" __global__ void rotary_angles(const ts::u32* positions, const float* frequencies, float* out, int half) {
  ts::wait_for_launches();
  size_t row = blockIdx.x;
  for (int i = threadIdx.x; i < half; i += blockDim.x) {
    // Rounded to f32 before it is widened: no fused or wider product may replace it.
    float angle = __fmul_rn(float(positions[row]), frequencies[i]);
    double sine, cosine;
    sincos(double(angle), &sine, &cosine);
    out[row * 2 * half + i] = float(cosine);
    out[row * 2 * half + half + i] = float(sine);
  }
}

extern "C" __global__ void rotary(const float* angles, float* qkv, int head_dim, int width) {
  ts::wait_for_launches();
  int half = head_dim / 2;
  angles += size_t(blockIdx.x) * head_dim;
  float* head = qkv + size_t(blockIdx.x) * width + size_t(blockIdx.y) * head_dim;
  for (int i = threadIdx.x; i < half; i += blockDim.x) {
    float low = head[i], high = head[half + i], cosine = angles[i], sine = angles[half + i];
    head[i] = ts::rotated_low(low, high, cosine, sine);
    head[half + i] = ts::rotated_high(low, high, cosine, sine);
  }
}
