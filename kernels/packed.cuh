// Vectors of elements as they lie in memory: loaded together, widened when they are needed, so that more of
// them fit into the registers while they are on their way.
#pragma once
#include "ts_cuda.cuh"

namespace ts {

template <class T, int N> struct Packed;

// 16 bytes of 16-bit elements.
template <class T> struct Packed<T, 8> {
  uint4 bits;
  __device__ __forceinline__ void load(const T* p) { bits = *reinterpret_cast<const uint4*>(p); }
  __device__ __forceinline__ void widen_to(float (&x)[8]) const {
    widen_pair(bits.x, x[0], x[1], T());
    widen_pair(bits.y, x[2], x[3], T());
    widen_pair(bits.z, x[4], x[5], T());
    widen_pair(bits.w, x[6], x[7], T());
  }
};

// 8 bytes of halves.
template <> struct Packed<__half, 4> {
  uint2 bits;
  __device__ __forceinline__ void load(const __half* p) { bits = *reinterpret_cast<const uint2*>(p); }
  __device__ __forceinline__ void widen_to(float (&x)[4]) const {
    widen_pair(bits.x, x[0], x[1], __half());
    widen_pair(bits.y, x[2], x[3], __half());
  }
};

template <> struct Packed<float, 4> {
  float4 bits;
  __device__ __forceinline__ void load(const float* p) { bits = *reinterpret_cast<const float4*>(p); }
  __device__ __forceinline__ void widen_to(float (&x)[4]) const {
    x[0] = bits.x;
    x[1] = bits.y;
    x[2] = bits.z;
    x[3] = bits.w;
  }
};

// One element, where wider loads do not divide.
template <class T> struct Packed<T, 1> {
  T bits;
  __device__ __forceinline__ void load(const T* p) { bits = *p; }
  __device__ __forceinline__ void widen_to(float (&x)[1]) const { x[0] = widen(bits); }
};

}  // namespace ts
