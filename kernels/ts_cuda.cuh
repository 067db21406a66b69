// The one include of every kernel: CUDA's own headers under nvcc, the emulator's under a C++ compiler.
//
// What both sides need beyond the dialect lies here: shared memory by macros, element types, 16-byte
// loads, sums over a warp.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>
// `TS_SHARED(float, tile, [4][33]);` declares `float tile[4][33]` in shared memory.
#define TS_SHARED(T, name, ...) __shared__ T name __VA_ARGS__
// `TS_DYN_SHARED(float, x);` is `float* x`, the shared memory whose size the launch states.
#define TS_DYN_SHARED(T, name)                                                \
  extern __shared__ __align__(16) unsigned char ts_dynamic_shared[];         \
  T* name = reinterpret_cast<T*>(ts_dynamic_shared)
#else
#include "cuda_emulator.h"
#endif

namespace ts {

using u32 = unsigned;

constexpr int WARP = 32;
constexpr u32 ALL_LANES = 0xffffffffu;

// What an element is as a float, exactly.
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

// The stored value nearest to `x`; finite numbers stay finite: an infinite key would turn whole rows
// of attention into NaN.
template <class T> struct Stored;

template <> struct Stored<float> {
  static __device__ __forceinline__ float of(float x) { return x; }
};

__device__ __forceinline__ float saturated(float x, float largest) {
  bool finite = fabsf(x) < INFINITY;
  return finite ? fminf(fmaxf(x, -largest), largest) : x;
}

template <> struct Stored<__half> {
  static __device__ __forceinline__ __half of(float x) { return __float2half(saturated(x, 65504.f)); }
};

template <> struct Stored<__nv_bfloat16> {
  static __device__ __forceinline__ __nv_bfloat16 of(float x) {
    return __float2bfloat16(saturated(x, 3.389e38f));
  }
};

// Elements of a 16-byte load.
template <class T> struct Wide {
  static constexpr int N = 16 / int(sizeof(T));
};

// Loads 16 bytes from an aligned address and widens them.
__device__ __forceinline__ void load_wide(const float* p, float (&x)[4]) {
  float4 raw = *reinterpret_cast<const float4*>(p);
  x[0] = raw.x;
  x[1] = raw.y;
  x[2] = raw.z;
  x[3] = raw.w;
}

__device__ __forceinline__ void widen_pair(u32 pair, float& low, float& high, __half) {
  low = __half2float(__ushort_as_half((unsigned short)(pair & 0xffffu)));
  high = __half2float(__ushort_as_half((unsigned short)(pair >> 16)));
}

__device__ __forceinline__ void widen_pair(u32 pair, float& low, float& high, __nv_bfloat16) {
  low = __uint_as_float(pair << 16);
  high = __uint_as_float(pair & 0xffff0000u);
}

// The halves that lie in 8 bytes.
__device__ __forceinline__ void widen_half(uint2 raw, float (&x)[4]) {
  widen_pair(raw.x, x[0], x[1], __half());
  widen_pair(raw.y, x[2], x[3], __half());
}

// Loads 8 bytes.
__device__ __forceinline__ void load_wide(const __half* p, float (&x)[4]) {
  widen_half(*reinterpret_cast<const uint2*>(p), x);
}

// One element, where wider loads do not divide.
template <class T> __device__ __forceinline__ void load_wide(const T* p, float (&x)[1]) { x[0] = widen(*p); }

// The elements that lie in 16 bytes.
__device__ __forceinline__ void widen_wide(uint4 raw, float (&x)[4], float) {
  x[0] = __uint_as_float(raw.x);
  x[1] = __uint_as_float(raw.y);
  x[2] = __uint_as_float(raw.z);
  x[3] = __uint_as_float(raw.w);
}

template <class T> __device__ __forceinline__ void widen_wide(uint4 raw, float (&x)[8], T) {
  widen_pair(raw.x, x[0], x[1], T());
  widen_pair(raw.y, x[2], x[3], T());
  widen_pair(raw.z, x[4], x[5], T());
  widen_pair(raw.w, x[6], x[7], T());
}

// Adds the product of a tile [16, 16] and a tile [16, 8] to `sums`, on tensor cores: a warp has them as PTX's
// mma.m16n8k16 lays them out. With `g` a quarter of the lane's number and `t` the rest, `a` has of rows g and g + 8
// the columns 2t and 2t + 1, then those 8 further; b0 has of column g the rows 2t and 2t + 1, b1 those 8 further;
// `sums` has of rows g, then g + 8, the columns 2t and 2t + 1.
__device__ __forceinline__ void add_tile(float (&sums)[4], const u32 (&a)[4], u32 b0, u32 b1, __half) {
#ifdef __CUDACC__
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  emu_mma_m16n8k16<__half>(sums, a, b0, b1);
#endif
}

__device__ __forceinline__ void add_tile(float (&sums)[4], const u32 (&a)[4], u32 b0, u32 b1, __nv_bfloat16) {
#ifdef __CUDACC__
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  emu_mma_m16n8k16<__nv_bfloat16>(sums, a, b0, b1);
#endif
}

// 2^x in one instruction: about two units in the last place off, and 0 where only subnormal numbers are left.
__device__ __forceinline__ float power_of_2(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  float y = exp2f(x);
  return y < 1.17549435e-38f ? 0.f : y;
#endif
}

template <class T> __device__ __forceinline__ void load_wide(const T* p, float (&x)[8]) {
  widen_wide(*reinterpret_cast<const uint4*>(p), x, T());
}

__device__ __forceinline__ void store_wide(float* p, const float (&x)[4]) {
  *reinterpret_cast<float4*>(p) = {x[0], x[1], x[2], x[3]};
}

__device__ __forceinline__ void store_wide(float* p, const float (&x)[1]) { *p = x[0]; }

// Loads that begin where they stand, whenever their values are used: the compiler moves others down to
// their use, behind barriers and sums that they could have overlapped with.
#ifdef __CUDACC__
// 16 bytes that this block reads once and nobody writes: the first cache is left to what comes again.
__device__ __forceinline__ uint4 load_once(const void* p) {
  uint4 raw;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(raw.x), "=r"(raw.y), "=r"(raw.z), "=r"(raw.w)
               : "l"(__cvta_generic_to_global(p)));
  return raw;
}

// 8 of them.
__device__ __forceinline__ uint2 load_half_once(const void* p) {
  uint2 raw;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
               : "=r"(raw.x), "=r"(raw.y)
               : "l"(__cvta_generic_to_global(p)));
  return raw;
}

__device__ __forceinline__ float load_early(const float* p) {
  float x;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(x) : "l"(__cvta_generic_to_global(p)));
  return x;
}
#else
__device__ __forceinline__ uint4 load_once(const void* p) { return *static_cast<const uint4*>(p); }

__device__ __forceinline__ uint2 load_half_once(const void* p) { return *static_cast<const uint2*>(p); }

__device__ __forceinline__ float load_early(const float* p) { return *p; }
#endif

// Launches of a step overlap where the device and its driver know how (crates/tinyserve-kernels/src/cuda/code.rs,
// which puts the instructions in the places of these comments; elsewhere they stay comments): the next launch begins
// as this one's blocks end, or let it, and then waits where it has to. Before it has waited, a thread reads only
// what no launch of a step writes, as weights and what the host has sent, and writes nothing.
#ifdef __CUDACC__
__device__ __forceinline__ void let_next_begin() { asm volatile("// ts: let next begin" ::: "memory"); }

__device__ __forceinline__ void wait_for_launches() { asm volatile("// ts: wait for launches" ::: "memory"); }
#else
__device__ __forceinline__ void let_next_begin() {}

__device__ __forceinline__ void wait_for_launches() { emu_wait_for_launches(); }
#endif

// The sum over the lanes of a warp, in every lane.
__device__ __forceinline__ float warp_sum(float x) {
  for (int step = WARP / 2; step > 0; step /= 2) {
    x += __shfl_xor_sync(ALL_LANES, x, step);
  }
  return x;
}

// The largest over the lanes of a warp, in every lane.
__device__ __forceinline__ float warp_max(float x) {
  for (int step = WARP / 2; step > 0; step /= 2) {
    x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, step));
  }
  return x;
}

// Puts `y` into `*out`, or adds it to what is there.
__device__ __forceinline__ void store(float* out, float y, int add) { *out = add ? *out + y : y; }

}  // namespace ts
