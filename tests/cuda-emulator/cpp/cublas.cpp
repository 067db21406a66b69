// A look-alike of libcublas beside the emulator: the part of its interface that the backend uses.
//
// Products are computed at once, one number after the other, from the memory of the emulated device.
#include <dlfcn.h>

#include <cstdint>
#include <cstring>
#define API extern "C" __attribute__((visibility("default")))
enum { SUCCESS = 0, INVALID = 7, EXECUTION_FAILED = 13, NOT_SUPPORTED = 15, R_32F = 0, R_16F = 2, R_16BF = 14, COMPUTE_32F = 68, OP_T = 1 };
static float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
static float half(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
  if (exponent == 0)
    return (sign ? -1.f : 1.f) * float(fraction) / float(1 << 24);
  if (exponent == 31)
    return from_bits(sign | 0x7f800000 | fraction << 13);
  return from_bits(sign | (exponent + 112) << 23 | fraction << 13);
}
static float load(const void* p, int type, size_t i) {
  if (type == R_32F)
    return ((const float*)p)[i];
  uint16_t bits = ((const uint16_t*)p)[i];
  return type == R_16F ? half(bits) : from_bits(uint32_t(bits) << 16);
}
static uint64_t products;
API uint64_t cublas_emulator_products() { return products; }
API int cublasCreate_v2(void** handle) {
  *handle = new int;
  return SUCCESS;
}
API int cublasDestroy_v2(void* handle) {
  delete (int*)handle;
  return SUCCESS;
}
static void* stream;
API int cublasSetStream_v2(void*, void* s) {
  stream = s;
  return SUCCESS;
}
// Has the emulator run what the product comes after.
static bool finish_stream() {
  void* driver = dlopen("libcuda.so", RTLD_LAZY | RTLD_NOLOAD);
  auto synchronize = driver ? (int (*)(void*))dlsym(driver, "cuStreamSynchronize") : nullptr;
  return synchronize && synchronize(stream) == 0;
}
API int cublasGetProperty(int part, int* value) {
  *value = part == 0 ? 12 : 0;
  return SUCCESS;
}
// C [m by n] = alpha·Aᵀ·B + beta·C, columns first; A is k by m, B is k by n.
API int cublasGemmEx(void* handle, int op_a, int op_b, int m, int n, int k, const void* alpha, const void* a,
                     int type_a, int lda, const void* b, int type_b, int ldb, const void* beta, void* c,
                     int type_c, int ldc, int compute, int) {
  if (!handle || m < 0 || n < 0 || k < 0 || lda < k || ldb < k || ldc < m)
    return INVALID;
  if (op_a != OP_T || op_b == OP_T || type_a != type_b || type_c != R_32F || compute != COMPUTE_32F)
    return NOT_SUPPORTED;
  if (!finish_stream())
    return EXECUTION_FAILED;
  float scale = *(const float*)alpha, keep = *(const float*)beta;
  for (int column = 0; column < n; column++)
    for (int row = 0; row < m; row++) {
      float sum = 0;
      for (int i = 0; i < k; i++)
        sum += load(a, type_a, size_t(row) * lda + i) * load(b, type_b, size_t(column) * ldb + i);
      float* to = (float*)c + size_t(column) * ldc + row;
      // What is not kept may be anything.
      *to = keep == 0 ? scale * sum : scale * sum + keep * *to;
    }
  products++;
  return SUCCESS;
}
