// The CUDA dialect of the kernels as plain C++17, for g++ 12 or clang 15 and later. ts_cuda.cuh includes it.
//
// Half and bfloat16 are storage types: every operation rounds. Fast variants of functions are the accurate
// ones here, and sums may be fused on a GPU: compare with tolerances.
#pragma once
#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>
#include <utility>
#define EMU_INL inline __attribute__((always_inline))
#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ EMU_INL
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// static shared memory: TS_SHARED(float, tile, [4][33]);  (a macro, so that the checker sees every access:
// gcc's tsan pass skips plain statics whose address is never taken).
#define TS_SHARED(T, name, ...)      \
  using ts_t_##name = T __VA_ARGS__; \
  static char ts_key_##name;         \
  auto& name = *static_cast<ts_t_##name*>(emu::shared_at(&ts_key_##name, sizeof(ts_t_##name)))
#define TS_DYN_SHARED(T, name) T* name = reinterpret_cast<T*>(emu::S.dynamic)
struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
#define EMU_VEC(T, n)                                                               \
  struct __align__(sizeof(T) * 2) n##2 { T x, y; };                                 \
  struct n##3 { T x, y, z; };                                                       \
  struct __align__(sizeof(T) * 4 > 16 ? 16 : sizeof(T) * 4) n##4 { T x, y, z, w; }; \
  EMU_INL n##2 make_##n##2(T a, T b) { return {a, b}; }                             \
  EMU_INL n##4 make_##n##4(T a, T b, T c, T d) { return {a, b, c, d}; }
EMU_VEC(float, float) EMU_VEC(int, int) struct __align__(8) uint2 {
  unsigned x, y;
};
struct __align__(16) uint4 {
  unsigned x, y, z, w;
};
EMU_INL uint4 make_uint4(unsigned a, unsigned b, unsigned c, unsigned d) { return {a, b, c, d}; }
struct char4 {
  signed char x, y, z, w;
};
constexpr int warpSize = 32;

namespace emu {
// A CUDA thread. `barriers` and `warp_syncs` count what it has passed, which orders its accesses.
struct Fiber {
  void* sp;
  uint3 tid;
  unsigned number, lane, warp, barriers, warp_syncs, state, line, mask;
  // Whether the launches before have ended, as far as this thread knows.
  bool waited;
};
struct State {
  Fiber* current;
  uint3 block;
  dim3 block_dim, grid_dim;
  char* dynamic;
  size_t dynamic_bytes;
  uint64_t block_number;
  // Whether the launch before may still run when this one begins.
  bool early;
};
extern State S;
void barrier(unsigned line);
// Shared memory of a declaration, out of the block's 48 KB.
void* shared_at(const void* key, size_t n);
// A warp collective: every lane of `mask` deposits `v`, and sees what all have deposited.
const uint64_t* gather(uint32_t mask, uint64_t v, unsigned op, unsigned line);
void cp_async(void* dst, const void* src, size_t n);
void cp_commit();
void cp_wait(unsigned prior);
void maybe_yield();
void note_atomic(void* p, size_t n);
void note_copy(void* d, const void* s, size_t n);
template <class T>
EMU_INL uint64_t bits(T v) {
  static_assert(sizeof(T) <= 8, "");
  uint64_t r = 0;
  memcpy(&r, &v, sizeof v);
  return r;
}
template <class T>
EMU_INL T unbits(uint64_t r) {
  T v;
  memcpy(&v, &r, sizeof v);
  return v;
}
enum { SHUFFLE = 1, VOTE, SYNC_WARP, MMA };
template <class T>
EMU_INL T shfl(uint32_t m, T v, unsigned src, bool ok, unsigned line) {
  const uint64_t* b = gather(m, bits(v), SHUFFLE, line);
  return ok ? unbits<T>(b[src & 31]) : v;
}
}  // namespace emu
#define threadIdx (emu::S.current->tid)
#define blockIdx (emu::S.block)
#define blockDim (emu::S.block_dim)
#define gridDim (emu::S.grid_dim)
#define __syncthreads() emu::barrier(__builtin_LINE())
#define EMU_L unsigned line = __builtin_LINE()
#define EMU_LANE (emu::S.current->lane)
EMU_INL void __syncwarp(unsigned m = ~0u, EMU_L) { emu::gather(m, 0, emu::SYNC_WARP, line); }
template <class T>
EMU_INL T __shfl_sync(unsigned m, T v, int src, int w = 32, EMU_L) {
  return emu::shfl(m, v, (EMU_LANE & ~(w - 1)) | (src & (w - 1)), true, line);
}
template <class T>
EMU_INL T __shfl_xor_sync(unsigned m, T v, int x, int w = 32, EMU_L) {
  unsigned s = EMU_LANE ^ x;
  return emu::shfl(m, v, s, (s & ~(w - 1)) <= (EMU_LANE & ~(w - 1)), line);
}
template <class T>
EMU_INL T __shfl_down_sync(unsigned m, T v, unsigned d, int w = 32, EMU_L) {
  unsigned s = EMU_LANE + d;
  return emu::shfl(m, v, s, (EMU_LANE & (w - 1)) + d < unsigned(w), line);
}
template <class T>
EMU_INL T __shfl_up_sync(unsigned m, T v, unsigned d, int w = 32, EMU_L) {
  return emu::shfl(m, v, EMU_LANE - d, (EMU_LANE & (w - 1)) >= d, line);
}
EMU_INL unsigned __ballot_sync(unsigned m, int p, EMU_L) {
  const uint64_t* b = emu::gather(m, p != 0, emu::VOTE, line);
  unsigned r = 0;
  for (int i = 0; i < 32; i++)
    if (m >> i & 1 && b[i])
      r |= 1u << i;
  return r;
}
EMU_INL int __any_sync(unsigned m, int p, EMU_L) { return __ballot_sync(m, p, line) != 0; }
EMU_INL int __all_sync(unsigned m, int p, EMU_L) { return __ballot_sync(m, p, line) == m; }
EMU_INL void __threadfence() {}
EMU_INL void emu_wait_for_launches() { emu::S.current->waited = true; }
EMU_INL void __threadfence_block() {}
// atomics: fibers only switch inside maybe_yield/collectives, so a plain read-modify-write is atomic
#define EMU_RMW(name, expr)                                                             \
  template <class T>                                                                    \
  __attribute__((no_sanitize("thread"))) inline T name(T* p, std::common_type_t<T> v) { \
    emu::maybe_yield();                                                                 \
    emu::note_atomic(p, sizeof(T));                                                     \
    T o = *p;                                                                           \
    *p = (expr);                                                                        \
    return o;                                                                           \
  }
EMU_RMW(atomicAdd, T(o + v))
EMU_RMW(atomicSub, T(o - v))
EMU_RMW(atomicMax, std::max(o, v)) EMU_RMW(atomicMin, std::min(o, v)) EMU_RMW(atomicExch, v)
    EMU_RMW(atomicOr, T(o | v)) EMU_RMW(atomicAnd, T(o& v)) template <class T>
    __attribute__((no_sanitize("thread"))) inline T
    atomicCAS(T* p, std::common_type_t<T> c, std::common_type_t<T> v) {
  emu::maybe_yield();
  emu::note_atomic(p, sizeof(T));
  T o = *p;
  if (o == c)
    *p = v;
  return o;
}
// half / bfloat16: storage types, every op rounds (no excess precision)
struct __half {
  uint16_t u;
};
struct __align__(4) __half2 {
  __half x, y;
};
using half = __half;
using half2 = __half2;
struct __nv_bfloat16 {
  uint16_t u;
};
struct __align__(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
EMU_INL float __half2float(__half h) {
  _Float16 f;
  memcpy(&f, &h.u, 2);
  return float(f);
}
EMU_INL __half __float2half(float f) {
  volatile _Float16 h = (_Float16)f;
  _Float16 g = h;
  __half r;
  memcpy(&r.u, &g, 2);
  return r;
}
EMU_INL __half __ushort_as_half(unsigned short u) { return {u}; }
EMU_INL unsigned short __half_as_ushort(__half h) { return h.u; }
EMU_INL __half __float2half_rn(float f) { return __float2half(f); }
EMU_INL __half emu_d2h(double d) {
  volatile _Float16 h = (_Float16)d;
  _Float16 g = h;
  __half r;
  memcpy(&r.u, &g, 2);
  return r;
}
EMU_INL __half __hadd(__half a, __half b) { return __float2half(__half2float(a) + __half2float(b)); }
EMU_INL __half __hmul(__half a, __half b) { return __float2half(__half2float(a) * __half2float(b)); }
EMU_INL __half __hfma(__half a, __half b, __half c) {
  return emu_d2h(double(__half2float(a)) * __half2float(b) + __half2float(c));
}
EMU_INL __half2 __halves2half2(__half a, __half b) { return {a, b}; }
EMU_INL __half2 __floats2half2_rn(float a, float b) { return {__float2half(a), __float2half(b)}; }
EMU_INL float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
EMU_INL float __low2float(__half2 v) { return __half2float(v.x); }
EMU_INL float __high2float(__half2 v) { return __half2float(v.y); }
EMU_INL __half2 __hadd2(__half2 a, __half2 b) { return {__hadd(a.x, b.x), __hadd(a.y, b.y)}; }
EMU_INL __half2 __hmul2(__half2 a, __half2 b) { return {__hmul(a.x, b.x), __hmul(a.y, b.y)}; }
EMU_INL __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
}
EMU_INL float __bfloat162float(__nv_bfloat16 b) {
  uint32_t u = uint32_t(b.u) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
EMU_INL __nv_bfloat16 __float2bfloat16(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  if ((u & 0x7fffffff) > 0x7f800000)
    return {0x7fff};
  return {uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
EMU_INL unsigned short __bfloat16_as_ushort(__nv_bfloat16 b) { return b.u; }
EMU_INL float2 __bfloat1622float2(__nv_bfloat162 v) { return {__bfloat162float(v.x), __bfloat162float(v.y)}; }
// maths / bit intrinsics (fast-maths variants are the accurate ones here: compare with tolerances)
EMU_INL float __expf(float x) { return expf(x); }
EMU_INL float __logf(float x) { return logf(x); }
EMU_INL float __fdividef(float a, float b) { return a / b; }
EMU_INL float rsqrtf(float x) { return 1.f / sqrtf(x); }
EMU_INL float __fmul_rn(float a, float b) { return a * b; }
EMU_INL float __fadd_rn(float a, float b) { return a + b; }
EMU_INL float __fdiv_rn(float a, float b) { return a / b; }
EMU_INL float __frcp_rn(float x) { return 1.f / x; }
EMU_INL float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
EMU_INL float __int_as_float(int v) { return emu::unbits<float>(emu::bits(v)); }
EMU_INL int __float_as_int(float v) { return emu::unbits<int>(emu::bits(v)); }
EMU_INL unsigned __float_as_uint(float v) { return emu::unbits<unsigned>(emu::bits(v)); }
EMU_INL float __uint_as_float(unsigned v) { return emu::unbits<float>(emu::bits(v)); }
EMU_INL int __popc(unsigned v) { return __builtin_popcount(v); }
EMU_INL int __ffs(int v) { return __builtin_ffs(v); }
EMU_INL int __clz(int v) { return v ? __builtin_clz(v) : 32; }
template <class T>
EMU_INL T __ldg(const T* p) {
  return *p;
}
EMU_INL int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; i++)
    c += int(int8_t(a >> 8 * i)) * int(int8_t(b >> 8 * i));
  return c;
}
template <class T>
EMU_INL T min(T a, std::common_type_t<T> b) {
  return b < a ? b : a;
}
template <class T>
EMU_INL T max(T a, std::common_type_t<T> b) {
  return a < b ? b : a;
}
// cp.async: the copy happens only at the wait, so that a forgotten wait shows
EMU_INL void __pipeline_memcpy_async(void* d, const void* s, size_t n) { emu::cp_async(d, s, n); }
EMU_INL void __pipeline_commit() { emu::cp_commit(); }
EMU_INL void __pipeline_wait_prior(unsigned n) { emu::cp_wait(n); }
EMU_INL unsigned __byte_perm(unsigned x, unsigned y, unsigned s) {
  uint64_t both = x | uint64_t(y) << 32;
  unsigned r = 0;
  for (int i = 0; i < 4; i++)
    r |= unsigned(both >> 8 * (s >> 4 * i & 7) & 0xff) << 8 * i;
  return r;
}
EMU_INL float emu_widen(unsigned short v, __half) { return __half2float(__half{v}); }
EMU_INL float emu_widen(unsigned short v, __nv_bfloat16) { return __bfloat162float(__nv_bfloat16{v}); }
// tensor core tile of halves T, PTX mma.m16n8k16 row.col with f32 sums: each lane takes the two rows and the two
// columns of its own four results
template <class T>
EMU_INL void emu_mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, EMU_L) {
  float A[2][16], B[2][16];
  unsigned m = EMU_LANE / 4, n = EMU_LANE % 4 * 2;
  auto h = [](uint64_t v, int i) { return emu_widen((unsigned short)(v >> 16 * i), T()); };
  for (int p = 0; p < 2; p++) {
    const uint64_t* g = emu::gather(~0u, a[2 * p] | uint64_t(a[2 * p + 1]) << 32, emu::MMA, line);
    for (int l = 0; l < 4; l++)
      for (int i = 0; i < 4; i++)
        A[i / 2][l * 2 + 8 * p + i % 2] = h(g[4 * m + l], i);
  }
  const uint64_t* g = emu::gather(~0u, b0 | uint64_t(b1) << 32, emu::MMA, line);
  for (int c = 0; c < 2; c++)
    for (int l = 0; l < 4; l++)
      for (int i = 0; i < 4; i++)
        B[c][l * 2 + 8 * (i / 2) + i % 2] = h(g[4 * (n + c) + l], i);
  for (int i = 0; i < 4; i++)
    for (int k = 0; k < 16; k++)
      d[i] += A[i / 2][k] * B[i & 1][k];
}
// ---- host side: registry and launch ----
namespace emu {
typedef void (*Tramp)(void**);
struct Kernel {
  const char* name;
  Tramp run;
  unsigned n_params;
  const unsigned* param_sizes;
  Kernel* next;
  uint64_t launches = 0;
};
extern Kernel* registry;
template <class... A>
struct Sig {
  static constexpr unsigned n = sizeof...(A);
  static constexpr unsigned size[sizeof...(A) + 1] = {sizeof(A)..., 0};
};
template <class... A>
Sig<A...> sig_of(void (*)(A...));
template <auto K, class... A, size_t... I>
__attribute__((no_sanitize("thread"))) void call(void** p, void (*)(A...), std::index_sequence<I...>) {
  K(*static_cast<std::remove_cv_t<A>*>(p[I])...);
}
template <auto K>
__attribute__((no_sanitize("thread"))) void tramp(void** p) {
  call<K>(p, K, std::make_index_sequence<decltype(sig_of(K))::n>());
}
struct Reg {
  Kernel k;
  Reg(const char* n, Tramp t, unsigned np, const unsigned* ps) : k{n, t, np, ps, registry} { registry = &k; }
};
}  // namespace emu
#define EMU_REGISTER(K) \
  static emu::Reg emu_reg_##K(#K, emu::tramp<K>, decltype(emu::sig_of(K))::n, decltype(emu::sig_of(K))::size);
extern "C" {  // C ABI for Rust
// `early`: it may begin while the launch before still runs.
int cuda_emulator_launch(const char* kernel, const unsigned grid[3], const unsigned block[3], unsigned smem,
                         bool early, void** params, uint64_t seed, char* err, size_t errlen);
void cuda_emulator_track(const void* p, size_t n);  // device buffer known to the checker build
void cuda_emulator_untrack(const void* p);
}
