// Products of a few rows with quantised weights, in integers, and the quantising of the rows.
//
// Weights lie as crates/tinyserve-kernels/src/cpu/packed.rs packs them: for each 16 outputs and 32 inputs one
// record of codes (int8: [8 quads][16 outputs][4] + 128; int4: [4][16][4], quad i low and quad i + 4 high), then
// f16 scales [16], and in int4 minima [16]. bias [outputs, filled up to 16] f32.
//
// quantise_rows: x [rows, inputs] f32 -> codes [rows, groups, 32] int8, scales and sums [rows, groups] f32.
// Grid (rows, ceil(groups / 4)), block 128: one warp per group. Must move rows·inputs·5 bytes.
//
// gemv_int8_*, gemv_int4_*: out [rows, width] f32, replaced or added to. Grid (ceil(outputs / 16), ceil(rows / R)),
// block 32x8: the warps of a block share out the groups of 16 outputs; a warp reads a record of int8, or two of
// int4, in one 16-byte load of each lane. A quad of products is exact; quads and groups are added up in f32.
// Must move outputs·inputs·(17/16) bytes of int8 or outputs·inputs·(5/8) of int4, once per R rows.
//
// embed_int8, embed_int4: rows of a table, as embed.cu. Grid (rows, ceil(hidden / 256)), block 256.
#include "ts_cuda.cuh"

constexpr int QUANTISED_GROUP = 32;
constexpr int QUANTISED_OUTPUTS = 16;
constexpr int QUANTISED_WARPS = 8;

extern "C" __global__ void quantise_rows(const float* x, signed char* codes, float* scales, float* sums, int inputs,
                                         int groups) {
  ts::wait_for_launches();
  int lane = threadIdx.x % ts::WARP, group = blockIdx.y * (blockDim.x / ts::WARP) + threadIdx.x / ts::WARP;
  size_t row = blockIdx.x;
  // The whole warp leaves together.
  if (group >= groups) {
    return;
  }
  int input = group * QUANTISED_GROUP + lane;
  float value = input < inputs ? x[row * inputs + input] : 0.f;
  // The bits of a NaN are above every number's, so that it is the largest.
  ts::u32 most = __float_as_uint(fabsf(value));
  for (int step = ts::WARP / 2; step > 0; step /= 2) {
    most = max(most, __shfl_xor_sync(ts::ALL_LANES, most, step));
  }
  float largest = __uint_as_float(most);
  float inverse = largest > 0.f ? __fdiv_rn(127.f, largest) : 0.f;
  // Adding 1.5·2^23 leaves the nearest whole number in the lowest bits; rounded twice, as on the CPU.
  int code = int((signed char)(__float_as_uint(__fadd_rn(__fmul_rn(value, inverse), 12582912.f)) & 0xff));
  int sum = code;
  for (int step = ts::WARP / 2; step > 0; step /= 2) {
    sum += __shfl_xor_sync(ts::ALL_LANES, sum, step);
  }
  size_t at = row * groups + group;
  codes[at * QUANTISED_GROUP + lane] = (signed char)code;
  if (lane == 0) {
    float scale = largest < INFINITY ? __fdiv_rn(largest, 127.f) : __uint_as_float(0x7fc00000u);
    scales[at] = scale;
    sums[at] = scale * float(sum);
  }
}

template <bool FOUR> struct Record {
  static constexpr int CODES = QUANTISED_GROUP * QUANTISED_OUTPUTS / (FOUR ? 2 : 1);
  static constexpr int BYTES = CODES + 2 * QUANTISED_OUTPUTS * (FOUR ? 2 : 1);
};

__device__ __forceinline__ float half_at(const unsigned char* record, int index) {
  return __half2float(reinterpret_cast<const __half*>(record)[index]);
}

template <bool FOUR, int R>
__device__ __forceinline__ void gemv_quantised(const unsigned char* records, const signed char* codes,
                                               const float* scales, const float* sums, const float* bias, float* out,
                                               int outputs, int groups, int rows, int add) {
  constexpr int LANES = FOUR ? ts::WARP / 2 : ts::WARP;
  TS_SHARED(float, totals, [QUANTISED_WARPS][R][QUANTISED_OUTPUTS]);
  int lane = threadIdx.x, warp = threadIdx.y;
  int row = blockIdx.y * R;
  // A lane has one quad (two in int4) of four outputs.
  int quad = lane % LANES / 4, four = lane % 4 * 4;
  const unsigned char* block = records + size_t(blockIdx.x) * groups * Record<FOUR>::BYTES;
  float total[R][4] = {};
  constexpr int STRIDE = ts::WARP / LANES;
  // Records on their way before the first is used. Beyond the last it is loaded again, and not used.
  constexpr int LOADS = R == 1 ? 8 : 4;
  constexpr int TURN = QUANTISED_WARPS * STRIDE;
  uint4 raw[LOADS];
  uint2 raw_scale[LOADS], raw_minimum[LOADS];
  auto load = [&](int begin) {
    for (int u = 0; u < LOADS; u++) {
      const unsigned char* record = block + size_t(min(begin + u * TURN, groups - 1)) * Record<FOUR>::BYTES;
      const unsigned char* scales_at = record + Record<FOUR>::CODES + four * 2;
      raw[u] = ts::load_once(record + lane % LANES * 16);
      raw_scale[u] = ts::load_half_once(scales_at);
      if (FOUR) {
        raw_minimum[u] = ts::load_half_once(scales_at + QUANTISED_OUTPUTS * 2);
      }
    }
  };
  int first = warp * STRIDE + lane / LANES;
  if (R == 1) {
    ts::let_next_begin();
  }
  load(first);
  ts::wait_for_launches();
  for (int begin = first; begin < groups; begin += LOADS * TURN) {
    if (begin > first) {
      load(begin);
    }
    for (int u = 0; u < LOADS; u++) {
      int group = begin + u * TURN;
      if (group >= groups) {
        break;
      }
      ts::u32 words[4] = {raw[u].x, raw[u].y, raw[u].z, raw[u].w};
      float scale[4], minimum[4] = {};
      ts::widen_half(raw_scale[u], scale);
      if (FOUR && quad == 0) {
        ts::widen_half(raw_minimum[u], minimum);
      }
      for (int r = 0; r < R; r++) {
        size_t at = size_t(min(row + r, rows - 1)) * groups + group;
        const int* quads = reinterpret_cast<const int*>(codes + at * QUANTISED_GROUP);
        int first = quads[quad], second = FOUR ? quads[quad + 4] : 0;
        float factor = scales[at], sum = FOUR ? sums[at] : 0.f;
        for (int o = 0; o < 4; o++) {
          int products;
          if (FOUR) {
            products = __dp4a(int(words[o] & 0x0f0f0f0fu), first, 0);
            products = __dp4a(int(words[o] >> 4 & 0x0f0f0f0fu), second, products);
          } else {
            // Codes are 128 too large: without their highest bit turned they would be unsigned.
            products = __dp4a(int(words[o] ^ 0x80808080u), first, 0);
          }
          total[r][o] = fmaf(float(products) * scale[o], factor, total[r][o]);
          if (FOUR) {
            total[r][o] = fmaf(minimum[o], sum, total[r][o]);
          }
        }
      }
    }
  }
  for (int r = 0; r < R; r++) {
    for (int o = 0; o < 4; o++) {
      for (int step = 4; step < ts::WARP; step *= 2) {
        total[r][o] += __shfl_xor_sync(ts::ALL_LANES, total[r][o], step);
      }
      if (lane < 4) {
        totals[warp][r][four + o] = total[r][o];
      }
    }
  }
  __syncthreads();
  int place = warp * ts::WARP + lane;
  if (place < R * QUANTISED_OUTPUTS) {
    int r = place / QUANTISED_OUTPUTS, output = blockIdx.x * QUANTISED_OUTPUTS + place % QUANTISED_OUTPUTS;
    float sum = 0.f;
    for (int i = 0; i < QUANTISED_WARPS; i++) {
      sum += totals[i][r][place % QUANTISED_OUTPUTS];
    }
    if (row + r < rows && output < outputs) {
      ts::store(&out[size_t(row + r) * outputs + output], sum + bias[output], add);
    }
  }
}

#define GEMV_QUANTISED(name, FOUR, R)                                                                          \
  extern "C" __global__ void __launch_bounds__(256)                                                            \
  name(const unsigned char* records, const signed char* codes, const float* scales, const float* sums,         \
       const float* bias, float* out, int outputs, int groups, int rows, int add) {                            \
    gemv_quantised<FOUR, R>(records, codes, scales, sums, bias, out, outputs, groups, rows, add);              \
  }
GEMV_QUANTISED(gemv_int8_1, false, 1)
GEMV_QUANTISED(gemv_int8_4, false, 4)
GEMV_QUANTISED(gemv_int4_1, true, 1)
GEMV_QUANTISED(gemv_int4_4, true, 4)

template <bool FOUR>
__device__ __forceinline__ void embed_quantised(const unsigned char* records, const ts::u32* ids, float* out, int hidden,
                                                int groups, int add) {
  ts::wait_for_launches();
  int channel = blockIdx.y * blockDim.x + threadIdx.x;
  size_t row = blockIdx.x;
  if (channel < hidden) {
    ts::u32 id = ids[row];
    int group = channel / QUANTISED_GROUP, input = channel % QUANTISED_GROUP, lane = id % QUANTISED_OUTPUTS;
    const unsigned char* record = records + (size_t(id / QUANTISED_OUTPUTS) * groups + group) * Record<FOUR>::BYTES;
    int quad = input / 4;
    int code = record[(FOUR ? quad % 4 : quad) * 4 * QUANTISED_OUTPUTS + 4 * lane + input % 4];
    code = FOUR ? (quad < 4 ? code & 15 : code >> 4) : code - 128;
    float scale = half_at(record + Record<FOUR>::CODES, lane);
    float minimum = FOUR ? half_at(record + Record<FOUR>::CODES, QUANTISED_OUTPUTS + lane) : 0.f;
    // Rounded twice, as on the CPU.
    ts::store(&out[row * hidden + channel], __fadd_rn(__fmul_rn(scale, float(code)), minimum), add);
  }
}

extern "C" __global__ void embed_int8(const unsigned char* records, const ts::u32* ids, float* out, int hidden,
                                      int groups, int add) {
  embed_quantised<false>(records, ids, out, hidden, groups, add);
}

extern "C" __global__ void embed_int4(const unsigned char* records, const ts::u32* ids, float* out, int hidden,
                                      int groups, int add) {
  embed_quantised<true>(records, ids, out, hidden, groups, add);
}
