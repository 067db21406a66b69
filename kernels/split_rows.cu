// Rows as sums of halves, for products on tensor cores, and what becomes of the products.
//
// split_f16: x [rows, inputs] f32 -> parts [2, rows, inputs] f16, whose sum is x·2^exponents[row] to 22 bits of
// the row's largest number, which lies in 2^14 to 2^15 then.
// split_bf16: x -> parts [3, rows, inputs] bf16, whose sum is x to 24 bits.
// Grid (rows), block 256: one block per row.
// Must move rows·inputs·(4 + 2·parts) bytes to split, of which f16 reads x again out of the caches.
//
// store_products: products [rows, outputs] f32, divided by 2^exponents[row] where there are exponents, and
// bias [outputs] f32 -> columns column..column + outputs of out [rows, width] f32, replaced or added to.
// Grid (rows, ceil(outputs / 256)), block 256.
// Must move rows·outputs·8 bytes to store, 12 when it adds.
#include "block.cuh"

constexpr int SPLIT_WARPS = 8;

// 2^exponent, of exponents from -126 to 127.
__device__ __forceinline__ float power_of_two(int exponent) { return __uint_as_float(ts::u32(127 + exponent) << 23); }

extern "C" __global__ void __launch_bounds__(256)
split_f16(const float* x, __half* parts, int* exponents, int inputs, int rows) {
  size_t row = blockIdx.x, all = size_t(rows) * inputs;
  x += row * inputs;
  parts += row * inputs;
  float largest = 0.f;
  for (int i = threadIdx.x; i < inputs; i += blockDim.x) {
    largest = fmaxf(largest, fabsf(x[i]));
  }
  largest = ts::block_max<SPLIT_WARPS>(largest);
  // Powers of two change no digit. Numbers that are nearly nothing are multiplied as far as a power goes.
  int above = int(__float_as_uint(largest) >> 23) - 127;
  int exponent = largest < INFINITY ? min(14 - above, 126) : 0;
  float factor = power_of_two(exponent);
  for (int i = threadIdx.x; i < inputs; i += blockDim.x) {
    float value = x[i] * factor;
    __half high = __float2half(value);
    parts[i] = high;
    parts[all + i] = __float2half(value - __half2float(high));
  }
  if (threadIdx.x == 0) {
    exponents[row] = exponent;
  }
}

extern "C" __global__ void __launch_bounds__(256)
split_bf16(const float* x, __nv_bfloat16* parts, int inputs, int rows) {
  size_t row = blockIdx.x, all = size_t(rows) * inputs;
  for (int i = threadIdx.x; i < inputs; i += blockDim.x) {
    float rest = x[row * inputs + i];
    for (int part = 0; part < 3; part++) {
      __nv_bfloat16 of_part = ts::Stored<__nv_bfloat16>::of(rest);
      parts[part * all + row * inputs + i] = of_part;
      rest -= __bfloat162float(of_part);
    }
  }
}

extern "C" __global__ void store_products(const float* products, const int* exponents, const float* bias, float* out,
                                          int outputs, int width, int column, int add) {
  int output = blockIdx.y * blockDim.x + threadIdx.x;
  size_t row = blockIdx.x;
  if (output < outputs) {
    float product = products[row * outputs + output];
    if (exponents) {
      product *= power_of_two(-exponents[row]);
    }
    ts::store(&out[row * width + column + output], product + bias[output], add);
  }
}
