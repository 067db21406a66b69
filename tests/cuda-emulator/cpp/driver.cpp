// A look-alike of libcuda over the emulator: enough of the driver's interface for cudarc.
//
// Work waits in its stream until somebody waits for it, the host or another stream, and then runs in that
// thread: what nobody ordered before a read has not happened yet, so that a missing event shows. Between begin
// and end of a capture it is recorded instead. Where CUDA's rules are stricter than what would work here, as
// for captures, they are applied. A kernel that fails while it runs leaves the context usable, unlike CUDA's, so
// that tests of one process stay apart.
//
// The environment describes the device: CUDA_EMULATOR_DEVICES, _DRIVER (12030 is CUDA 12.3), _CAPABILITY
// (90 is 9.0), _MEMORY (bytes), _SEED (order of threads and blocks), _FAIL (a kernel whose launches fail), _SKIP (one whose launches do nothing, or * for all).
#include <chrono>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cuda_emulator.h"
typedef int CUresult;
typedef unsigned long long CUdeviceptr;
enum {
  OK = 0,
  INVALID = 1,
  OOM = 2,
  NO_DEVICE = 100,
  INVALID_DEVICE = 101,
  NO_BINARY = 209,
  INVALID_PTX = 218,
  NOT_FOUND = 500,
  OUT_OF_RESOURCES = 701,
  LAUNCH_FAILED = 719,
  NOT_PERMITTED = 800,
  NOT_SUPPORTED = 801,
  CAPTURE_UNSUPPORTED = 900,
  CAPTURE_INVALIDATED = 901
};
typedef std::function<CUresult()> Op;
struct Graph {
  bool after_kernel = false;  // what was recorded last is a launch
  std::vector<Op> ops;
  std::vector<const char*> kernels;
};
struct Stream {
  Graph* cap = nullptr;
  bool invalid = false;  // what is captured was invalidated
  bool after_kernel = false;  // what was submitted last is a launch
  std::deque<Op> waiting;
  uint64_t run = 0;  // operations that are not waiting any more
  CUresult failed = OK;
};
struct Event {
  std::shared_ptr<double> t = std::make_shared<double>(0);
  Graph* cap = nullptr;
  Stream* stream = nullptr;  // null until it is recorded
  uint64_t position = 0;     // operations of the stream before it
};
struct Module {
  std::string image;
};
struct Func {
  const emu::Kernel* k;
};
static long setting(const char* name, long otherwise) {
  const char* text = getenv(name);
  return text ? strtol(text, nullptr, 10) : otherwise;
}
static long driver_version() { return setting("CUDA_EMULATOR_DRIVER", 12030); }
static long device_capability() { return setting("CUDA_EMULATOR_CAPABILITY", 90); }
// What a test leaves; 0 is what the environment says.
static size_t limit;
static size_t total_memory() {
  return limit ? limit : size_t(setting("CUDA_EMULATOR_MEMORY", long(4) << 30));
}
static uint64_t seed = uint64_t(setting("CUDA_EMULATOR_SEED", 0));
// A kernel whose launches fail; none when empty.
static std::string failing = getenv("CUDA_EMULATOR_FAIL") ? getenv("CUDA_EMULATOR_FAIL") : "";
static const std::string skipped = getenv("CUDA_EMULATOR_SKIP") ? getenv("CUDA_EMULATOR_SKIP") : "";
static std::recursive_mutex mu;
static Stream null_stream;
static int ctx_obj;
static size_t used, peak;
static std::vector<std::pair<char*, size_t>> mem, pinned;
// Never deleted: others may wait for what was in them.
static std::vector<Stream*> streams = {&null_stream};
// Times that the host waited for something that had not run.
static uint64_t waits;
static Stream* st(void* s) {
  return s == nullptr || s == (void*)1 || s == (void*)2 ? &null_stream : (Stream*)s;
}
static double now() {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}
static bool valid(CUdeviceptr p, size_t n) {
  for (auto& m : mem)
    if ((char*)p >= m.first && (char*)p + n <= m.first + m.second)
      return true;
  return n == 0;
}
// Captures that were invalidated, and how many of the next ones will be.
static uint64_t invalidated, to_invalidate;
static void invalidate(Stream* s) {
  invalidated += s->cap && !s->invalid;
  s->invalid = s->cap != nullptr;
}
// What waits for all work of the context does this to every capture.
static CUresult invalidate_captures() {
  std::lock_guard<std::recursive_mutex> l(mu);
  CUresult r = OK;
  for (Stream* s : streams)
    if (s->cap) {
      invalidate(s);
      r = CAPTURE_UNSUPPORTED;
    }
  return r;
}
static CUresult submit(void* s, Op f, bool kernel = false) {
  std::lock_guard<std::recursive_mutex> l(mu);
  if (st(s)->cap && to_invalidate) {
    to_invalidate--;
    invalidate(st(s));
  }
  if (st(s)->invalid)
    return CAPTURE_INVALIDATED;
  if (st(s)->cap) {
    st(s)->cap->ops.push_back(std::move(f));
    st(s)->cap->after_kernel = kernel;
  } else {
    st(s)->waiting.push_back(std::move(f));
    st(s)->after_kernel = kernel;
  }
  return OK;
}
// Runs a stream up to an operation, and what that waits for elsewhere.
static void run_until(Stream* s, uint64_t position) {
  std::lock_guard<std::recursive_mutex> l(mu);
  while (s->run < position && !s->waiting.empty()) {
    Op f = std::move(s->waiting.front());
    s->waiting.pop_front();
    s->run++;
    CUresult r = f();
    if (r && !s->failed)
      s->failed = r;
  }
}
// What went wrong in a stream since somebody asked.
static CUresult finish(Stream* s, uint64_t position) {
  std::lock_guard<std::recursive_mutex> l(mu);
  run_until(s, position);
  return std::exchange(s->failed, OK);
}
static CUresult finish(Stream* s) {
  std::lock_guard<std::recursive_mutex> l(mu);
  return finish(s, s->run + s->waiting.size());
}
static void run_everything() {
  std::lock_guard<std::recursive_mutex> l(mu);
  for (size_t i = 0; i < streams.size(); i++)
    run_until(streams[i], streams[i]->run + streams[i]->waiting.size());
}
static CUresult alloc(CUdeviceptr* p, size_t n) {
  std::lock_guard<std::recursive_mutex> l(mu);
  // What waits may free some.
  if (used + n > total_memory())
    run_everything();
  if (used + n > total_memory())
    return OOM;
  char* q = (char*)aligned_alloc(256, (n + 511) / 256 * 256);
  if (!q)
    return OOM;
  memset(q, 0xCD, n);
  used += n;
  peak = std::max(peak, used);
  mem.push_back({q, n});
  cuda_emulator_track(q, n);
  *p = (CUdeviceptr)q;
  return OK;
}
static CUresult release(CUdeviceptr p) {
  std::lock_guard<std::recursive_mutex> l(mu);
  for (size_t i = 0; i < mem.size(); i++)
    if ((CUdeviceptr)mem[i].first == p) {
      used -= mem[i].second;
      cuda_emulator_untrack(mem[i].first);
      free(mem[i].first);
      mem.erase(mem.begin() + i);
      return OK;
    }
  return INVALID;
}
#define API extern "C" __attribute__((visibility("default"))) CUresult
API cuInit(unsigned) { return setting("CUDA_EMULATOR_DEVICES", 1) > 0 ? OK : NO_DEVICE; }
API cuDriverGetVersion(int* v) {
  *v = int(driver_version());
  return OK;
}
API cuDeviceGetCount(int* n) {
  *n = int(setting("CUDA_EMULATOR_DEVICES", 1));
  return OK;
}
API cuDeviceGet(int* d, int i) {
  *d = i;
  return i < setting("CUDA_EMULATOR_DEVICES", 1) ? OK : INVALID_DEVICE;
}
API cuDeviceGetName(char* b, int n, int) {
  snprintf(b, n, "CUDA emulator on the CPU");
  return OK;
}
API cuDeviceTotalMem_v2(size_t* n, int) {
  *n = total_memory();
  return OK;
}
API cuDeviceGetAttribute(int* v, int a, int) {
  // By the numbers of CUdevice_attribute.
  long capability = device_capability();
  switch (a) {
    case 1:  // MAX_THREADS_PER_BLOCK
      *v = 1024;
      break;
    case 8:  // MAX_SHARED_MEMORY_PER_BLOCK
      *v = 48 * 1024;
      break;
    case 10:  // WARP_SIZE
      *v = 32;
      break;
    case 16:  // MULTIPROCESSOR_COUNT
      *v = 4;
      break;
    case 75:  // COMPUTE_CAPABILITY_MAJOR
      *v = int(capability / 10);
      break;
    case 76:  // COMPUTE_CAPABILITY_MINOR
      *v = int(capability % 10);
      break;
    case 97:  // MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
      *v = 227 * 1024;
      break;
    case 115:  // MEMORY_POOLS_SUPPORTED
      *v = 1;
      break;
    default:
      *v = 0;
  }
  return OK;
}
API cuDevicePrimaryCtxRetain(void** c, int) {
  *c = &ctx_obj;
  return OK;
}
API cuDevicePrimaryCtxRelease_v2(int) { return OK; }
API cuCtxSetCurrent(void*) { return OK; }
API cuCtxGetCurrent(void** c) {
  *c = &ctx_obj;
  return OK;
}
API cuCtxSynchronize() {
  if (CUresult r = invalidate_captures())
    return r;
  run_everything();
  return OK;
}
API cuMemGetInfo_v2(size_t* f, size_t* t) {
  run_everything();
  *t = total_memory();
  *f = *t - used;
  return OK;
}
API cuStreamCreate(void** s, unsigned) {
  std::lock_guard<std::recursive_mutex> l(mu);
  streams.push_back(new Stream);
  *s = streams.back();
  return OK;
}
API cuStreamCreateWithPriority(void** s, unsigned flags, int) { return cuStreamCreate(s, flags); }
API cuStreamDestroy_v2(void* s) { return finish(st(s)); }
API cuStreamSynchronize(void* s) {
  std::lock_guard<std::recursive_mutex> l(mu);
  waits += !st(s)->waiting.empty();
  return st(s)->cap ? CAPTURE_UNSUPPORTED : finish(st(s));
}
// CUDA's rules of a capture: its stream may not wait for work outside of it (905), and nobody may wait for an
// event that was recorded inside of it (907).
API cuStreamWaitEvent(void* s, void* e, unsigned) {
  Event* v = (Event*)e;
  Graph* c = st(s)->cap;
  if (!v->stream)
    return OK;
  if (v->cap != c)
    return c ? 905 : 907;
  if (c || v->stream == st(s))
    return OK;
  return submit(s, [other = v->stream, position = v->position] {
    run_until(other, position);
    return OK;
  });
}
API cuStreamQuery(void* s) { return finish(st(s)); }
API cuEventCreate(void** e, unsigned) {
  *e = new Event;
  return OK;
}
API cuEventDestroy_v2(void* e) {
  delete (Event*)e;
  return OK;
}
API cuEventRecord(void* e, void* s) {
  std::lock_guard<std::recursive_mutex> l(mu);
  Event* v = (Event*)e;
  v->cap = st(s)->cap;
  v->stream = st(s);
  if (v->cap)
    return OK;
  v->t = std::make_shared<double>(0);
  st(s)->waiting.push_back([t = v->t] {
    *t = now();
    return OK;
  });
  v->position = v->stream->run + v->stream->waiting.size();
  return OK;
}
API cuEventSynchronize(void* e) {
  Event* v = (Event*)e;
  if (v->cap)
    return 907;
  std::lock_guard<std::recursive_mutex> l(mu);
  waits += v->stream && v->stream->run < v->position;
  return v->stream ? finish(v->stream, v->position) : OK;
}
API cuEventQuery(void* e) {
  Event* v = (Event*)e;
  return v->stream ? finish(v->stream, v->position) : OK;
}
API cuEventElapsedTime(float* ms, void* a, void* b) {
  *ms = float(*((Event*)b)->t - *((Event*)a)->t);
  return OK;
}
API cuMemAlloc_v2(CUdeviceptr* p, size_t n) { return alloc(p, n); }
// Stricter than CUDA: a graph owns no memory.
API cuMemAllocAsync(CUdeviceptr* p, size_t n, void* s) {
  if (st(s)->cap)
    return CAPTURE_UNSUPPORTED;
  // What was freed before, in this stream, is there again.
  std::lock_guard<std::recursive_mutex> l(mu);
  run_until(st(s), st(s)->run + st(s)->waiting.size());
  return alloc(p, n);
}
API cuMemFree_v2(CUdeviceptr p) {
  run_everything();
  return release(p);
}
API cuMemFreeAsync(CUdeviceptr p, void* s) {
  if (!valid(p, 1))
    return INVALID;
  return st(s)->cap ? release(p) : submit(s, [=] { return release(p); });
}
API cuMemHostAlloc(void** p, size_t n, unsigned) {
  std::lock_guard<std::recursive_mutex> l(mu);
  *p = aligned_alloc(4096, (n + 4095) / 4096 * 4096);
  if (!*p)
    return OOM;
  pinned.push_back({(char*)*p, n});
  return OK;
}
API cuMemFreeHost(void* p) {
  std::lock_guard<std::recursive_mutex> l(mu);
  run_everything();
  for (size_t i = 0; i < pinned.size(); i++)
    if (pinned[i].first == p) {
      pinned.erase(pinned.begin() + i);
      free(p);
      return OK;
    }
  return INVALID;
}
static bool is_pinned(const void* p, size_t n) {
  std::lock_guard<std::recursive_mutex> l(mu);
  for (auto& m : pinned)
    if ((char*)p >= m.first && (char*)p + n <= m.first + m.second)
      return true;
  return false;
}
static CUresult copy(void* s, void* d, const void* src, size_t n, bool okd, bool oks) {
  if (!okd || !oks)
    return INVALID;
  return submit(s, [=] {
    memmove(d, src, n);
    return OK;
  });
}
// Memory that is not pinned is read before the call returns, and written when it returns.
API cuMemcpyHtoDAsync_v2(CUdeviceptr d, const void* s, size_t n, void* q) {
  if (st(q)->cap || is_pinned(s, n))
    return copy(q, (void*)d, s, n, valid(d, n), true);
  if (!valid(d, n))
    return INVALID;
  return submit(q, [=, bytes = std::string((const char*)s, n)] {
    memcpy((void*)d, bytes.data(), n);
    return OK;
  });
}
API cuMemcpyDtoHAsync_v2(void* d, CUdeviceptr s, size_t n, void* q) {
  CUresult r = copy(q, d, (void*)s, n, true, valid(s, n));
  if (r || st(q)->cap || is_pinned(d, n))
    return r;
  waits++;
  return finish(st(q));
}
API cuMemcpyDtoDAsync_v2(CUdeviceptr d, CUdeviceptr s, size_t n, void* q) {
  return copy(q, (void*)d, (void*)s, n, valid(d, n), valid(s, n));
}
API cuMemcpyHtoD_v2(CUdeviceptr d, const void* s, size_t n) { return cuMemcpyHtoDAsync_v2(d, s, n, nullptr); }
API cuMemcpyDtoH_v2(void* d, CUdeviceptr s, size_t n) {
  CUresult r = cuMemcpyDtoHAsync_v2(d, s, n, nullptr);
  return r ? r : finish(&null_stream);
}
API cuMemsetD8Async(CUdeviceptr d, unsigned char v, size_t n, void* q) {
  if (!valid(d, n))
    return INVALID;
  return submit(q, [=] {
    memset((void*)d, v, n);
    return OK;
  });
}
API cuModuleLoadData(void** m, const void* image) {
  const char* t = (const char*)image;
  if (!strstr(t, ".version"))
    return 200;
  const char* target = strstr(t, ".target sm_");
  long built_for = target ? strtol(target + strlen(".target sm_"), nullptr, 10) : 0;
  if (!built_for || (built_for < 90 && strstr(t, "griddepcontrol")))
    return INVALID_PTX;
  if (built_for > device_capability())
    return NO_BINARY;
  invalidate_captures();
  *m = new Module{t};
  return OK;
}
API cuModuleUnload(void* m) {
  invalidate_captures();
  delete (Module*)m;
  return OK;
}
API cuModuleGetFunction(void** f, void* m, const char* name) {
  std::string e = std::string(".entry ") + name + "(";
  if (((Module*)m)->image.find(e) == std::string::npos)
    return NOT_FOUND;
  for (emu::Kernel* k = emu::registry; k; k = k->next)
    if (!strcmp(k->name, name)) {
      *f = new Func{k};
      return OK;
    }
  fprintf(stderr, "CUDA emulator: %s is in the PTX, not in the emulator's registry\n", name);
  return NOT_FOUND;
}
API cuFuncGetAttribute(int* v, int a, void*) {
  *v = a == 0 ? 1024 : a == 5 ? 80 : a == 6 ? 90 : 0;
  return OK;
}
API cuFuncSetAttribute(void*, int, int) { return OK; }
struct Attribute {
  int id;
  char pad[4];
  union {
    int allowed;
    char size[64];
  };
};
struct LaunchConfig {
  unsigned grid[3], block[3], shared;
  void* stream;
  Attribute* attributes;
  unsigned n_attributes;
};
API cuLaunchKernelEx(const LaunchConfig* config, void* f, void** params, void**) {
  constexpr int PROGRAMMATIC_STREAM_SERIALIZATION = 6;
  const emu::Kernel* k = ((Func*)f)->k;
  void* s = config->stream;
  unsigned gx = config->grid[0], gy = config->grid[1], gz = config->grid[2], smem = config->shared;
  unsigned bx = config->block[0], by = config->block[1], bz = config->block[2];
  bool early = false;
  for (unsigned i = 0; i < config->n_attributes; i++) {
    if (config->attributes[i].id != PROGRAMMATIC_STREAM_SERIALIZATION)
      return INVALID;
    if (driver_version() < 12030 && st(s)->cap)
      return NOT_SUPPORTED;
    // Only a launch right before it need not have ended.
    early = config->attributes[i].allowed && (st(s)->cap ? st(s)->cap->after_kernel : st(s)->after_kernel);
  }
  // Copied at the launch, as the driver does it.
  std::vector<std::vector<char>> vals;
  for (unsigned i = 0; i < k->n_params; i++)
    vals.emplace_back((char*)params[i], (char*)params[i] + k->param_sizes[i]);
  if (!gx || !gy || !gz || !bx || !by || !bz)
    return INVALID;
  // As a launch that takes too much: CUDA runs what comes after it.
  if (failing == k->name)
    return OUT_OF_RESOURCES;
  if (st(s)->cap)
    st(s)->cap->kernels.push_back(k->name);
  return submit(s, [=]() mutable -> CUresult {
    if (skipped == k->name || skipped == "*")
      return OK;
    std::vector<void*> p;
    for (auto& v : vals)
      p.push_back(v.data());
    unsigned g[3] = {gx, gy, gz}, b[3] = {bx, by, bz};
    char err[900];
    if (!cuda_emulator_launch(k->name, g, b, smem, early, p.data(), seed, err, sizeof err))
      return OK;
    fprintf(stderr, "CUDA emulator: %s\n", err);
    return LAUNCH_FAILED;
  }, true);
}
API cuStreamBeginCapture_v2(void* s, int) {
  std::lock_guard<std::recursive_mutex> l(mu);
  if (st(s)->cap)
    return INVALID;
  st(s)->cap = new Graph;
  return OK;
}
API cuStreamEndCapture(void* s, void** g) {
  std::lock_guard<std::recursive_mutex> l(mu);
  if (!st(s)->cap)
    return INVALID;
  if (std::exchange(st(s)->invalid, false)) {
    delete std::exchange(st(s)->cap, nullptr);
    *g = nullptr;
    return CAPTURE_INVALIDATED;
  }
  *g = st(s)->cap;
  st(s)->cap = nullptr;
  return OK;
}
API cuStreamIsCapturing(void* s, int* v) {
  *v = st(s)->cap != nullptr;
  return OK;
}
API cuGraphInstantiateWithFlags(void** e, void* g, unsigned long long) {
  *e = new Graph(*(Graph*)g);
  return OK;
}
API cuGraphUpload(void*, void*) { return OK; }
API cuGraphLaunch(void* e, void* s) {
  for (const char* kernel : ((Graph*)e)->kernels)
    if (failing == kernel)
      return OUT_OF_RESOURCES;
  for (auto& f : ((Graph*)e)->ops)
    if (CUresult r = submit(s, f))
      return r;
  return OK;
}
API cuGraphExecDestroy(void* e) {
  delete (Graph*)e;
  return OK;
}
API cuGraphDestroy(void* g) {
  delete (Graph*)g;
  return OK;
}
// What the launches from now on are ordered by.
extern "C" __attribute__((visibility("default"))) void cuda_emulator_seed(uint64_t value) { seed = value; }
// Times that the host waited for a stream or an event with work before it.
extern "C" __attribute__((visibility("default"))) uint64_t cuda_emulator_waits() { return waits; }
// Kernels that were not launched so far, with spaces between them.
extern "C" __attribute__((visibility("default"))) const char* cuda_emulator_idle() {
  static std::string names;
  names.clear();
  for (emu::Kernel* k = emu::registry; k; k = k->next)
    if (!k->launches)
      names += std::string(names.empty() ? "" : " ") + k->name;
  return names.c_str();
}
// Bytes that were allocated at most since the last call.
extern "C" __attribute__((visibility("default"))) uint64_t cuda_emulator_peak() {
  run_everything();
  return std::exchange(peak, used);
}
// Leaves so many bytes free; all of them again when it is none.
extern "C" __attribute__((visibility("default"))) void cuda_emulator_leave(uint64_t bytes) {
  run_everything();
  limit = bytes ? used + bytes : 0;
}
// Invalidates the next captures; how many were invalidated so far.
extern "C" __attribute__((visibility("default"))) uint64_t cuda_emulator_invalidate(uint64_t captures) {
  std::lock_guard<std::recursive_mutex> l(mu);
  to_invalidate = captures;
  return invalidated;
}
// Has launches of a kernel fail from now on; of none when the name is empty.
extern "C" __attribute__((visibility("default"))) void cuda_emulator_fail(const char* name) { failing = name; }
API cuGetErrorName(int e, const char** s) {
  *s = e == LAUNCH_FAILED      ? "CUDA_ERROR_LAUNCH_FAILED"
       : e == OUT_OF_RESOURCES ? "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"
       : e == INVALID          ? "CUDA_ERROR_INVALID_VALUE"
       : e == OOM              ? "CUDA_ERROR_OUT_OF_MEMORY"
       : e == NO_DEVICE        ? "CUDA_ERROR_NO_DEVICE"
       : e == NOT_FOUND        ? "CUDA_ERROR_NOT_FOUND"
       : e == CAPTURE_INVALIDATED ? "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"
                                  : "CUDA_ERROR";
  return OK;
}
API cuGetErrorString(int e, const char** s) { return cuGetErrorName(e, s); }
API cuLinkCreate_v2(unsigned, void*, void*, void** s) {
  *s = new std::string;
  return OK;
}
API cuLinkAddData_v2(void* s, int, void* d, size_t n, const char*, unsigned, void*, void*) {
  ((std::string*)s)->append((char*)d, n);
  return OK;
}
API cuLinkComplete(void* s, void** p, size_t* n) {
  *p = (void*)((std::string*)s)->c_str();
  *n = ((std::string*)s)->size();
  return OK;
}
API cuLinkDestroy(void* s) {
  delete (std::string*)s;
  return OK;
}
