// The scheduler behind cuda_emulator.h: one block at a time, one fiber per CUDA thread.
//
// A fiber runs until it meets a barrier or a warp collective. With seed 0 threads and blocks run in a fixed
// order, with another one in a random order that the seed decides, and atomics may switch threads, too.
#include <sys/mman.h>

#include <cstdarg>
#include <string>
#include <vector>

#include "cuda_emulator.h"
#ifdef EMU_UCONTEXT
#include <ucontext.h>
#endif
namespace emu {
State S;
Kernel* registry;
enum { READY, AT_BARRIER, IN_COLLECTIVE, DONE };
// Not a power of two: the tops of all stacks would share a few sets of the caches.
constexpr size_t STACK_BYTES = (64 << 10) + 5 * 64;
constexpr unsigned MOST_THREADS = 1024;
struct Slot {
  uint32_t mask, arrived, gen, op, line;
  uint64_t buf[2][32];
};
struct Warp {
  Slot slot[8];
  unsigned n_slots;
  uint32_t exited;
};
struct Copy {
  void* d;
  const void* s;
  size_t n;
  unsigned group;
};
static Fiber fibers[MOST_THREADS];
static Warp warps[MOST_THREADS / 32];
static unsigned ready[MOST_THREADS], n_ready, n_fibers, n_done, n_waiting, barrier_line;
static char arena[48 << 10] __attribute__((aligned(1024)));
static size_t arena_used;
static struct {
  const void* key;
  size_t off;
} shared_keys[64];
static unsigned n_shared_keys;
char* arena_begin = arena;
static std::vector<Copy> copies[MOST_THREADS];
static unsigned copy_group[MOST_THREADS];
static char* stacks;
static Fiber scheduler;
static std::string error;
static uint64_t random_state;
static bool random_order;
static const Kernel* kernel;
static void** params_of_launch;
char *stacks_begin, *stacks_end;
static inline uint32_t random_number() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return uint32_t(random_state >> 32);
}
void on_block_start();
void on_launch(const Kernel*);  // checker hooks (checker.cpp, or the empty ones below)
#ifndef CUDA_EMULATOR_CHECK
void on_block_start() {}
void on_launch(const Kernel*) {}
void note_atomic(void*, size_t) {}
void note_copy(void*, const void*, size_t) {}
#endif
#ifdef EMU_UCONTEXT
static ucontext_t contexts[MOST_THREADS], scheduler_context;
static ucontext_t* ctx_of(Fiber* f) { return f == &scheduler ? &scheduler_context : &contexts[f - fibers]; }
static void jump(Fiber* from, Fiber* to) { swapcontext(ctx_of(from), ctx_of(to)); }
#else
extern "C" void emu_switch_(void** save, void* to);
#if defined(__x86_64__)
asm(".text\n.globl emu_switch_\n.hidden emu_switch_\n.type emu_switch_,@function\nemu_switch_:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\nmovq %rsp,(%rdi)\nmovq "
    "%rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n.size "
    "emu_switch_,.-emu_switch_\n");
#else
#error "add a switch for this CPU or build with -DEMU_UCONTEXT"
#endif
static void jump(Fiber* from, Fiber* to) { emu_switch_(&from->sp, to->sp); }
#endif
static void switch_to(Fiber* to) {
  Fiber* from = S.current;
  if (to == from)
    return;
  S.current = to;
  jump(from, to);
}
[[noreturn]] void fail(const char* fmt, ...) {
  char b[600];
  va_list a;
  va_start(a, fmt);
  vsnprintf(b, sizeof b, fmt, a);
  va_end(a);
  Fiber* c = S.current;
  char h[200];
  snprintf(h, sizeof h, "kernel %s block (%u,%u,%u) thread (%u,%u,%u): ", kernel->name, S.block.x, S.block.y,
           S.block.z, c->tid.x, c->tid.y, c->tid.z);
  error = std::string(h) + b;
  switch_to(&scheduler);
  __builtin_unreachable();
}
static void deadlock() {
  std::string s = "deadlock:";
  unsigned shown = 0;
  for (unsigned i = 0; i < n_fibers && shown < 6; i++)
    if (i == 0 || fibers[i].state != fibers[i - 1].state || fibers[i].line != fibers[i - 1].line) {
      char b[120];
      Fiber& f = fibers[i];
      shown++;
      snprintf(b, sizeof b, " t%u..: %s line %u mask %08x;", i,
               f.state == AT_BARRIER      ? "__syncthreads"
               : f.state == IN_COLLECTIVE ? "warp collective"
                                          : "exited",
               f.line, f.state == IN_COLLECTIVE ? f.mask : 0);
      s += b;
    }
  fail("%s", s.c_str());
}
static void run_another() {
  if (!n_ready) {
    if (n_done == n_fibers)
      switch_to(&scheduler);
    deadlock();
  }
  unsigned i = random_order ? random_number() % n_ready : n_ready - 1, t = ready[i];
  ready[i] = ready[--n_ready];
  switch_to(&fibers[t]);
}
static void wake(unsigned t) {
  fibers[t].state = READY;
  ready[n_ready++] = t;
}
void maybe_yield() {
  if (random_order && n_ready && (random_number() & 3) == 0) {
    Fiber* f = S.current;
    ready[n_ready++] = f->number;
    run_another();
  }
}
static void open_barrier() {
  n_waiting = 0;
  for (unsigned i = n_fibers; i-- > 0;)
    if (fibers[i].state == AT_BARRIER) {
      fibers[i].barriers++;
      wake(i);
    }
}
void barrier(unsigned line) {
  Fiber* f = S.current;
  if (n_done)
    fail("__syncthreads (line %u) after %u threads of the block have returned", line, n_done);
  if (n_waiting && barrier_line != line)
    fail("threads of one block meet different __syncthreads: lines %u and %u", barrier_line, line);
  barrier_line = line;
  f->state = AT_BARRIER;
  f->line = line;
  n_waiting++;
  if (n_waiting == n_fibers)
    open_barrier();
  run_another();
}
const uint64_t* gather(uint32_t mask, uint64_t v, unsigned op, unsigned line) {
  Fiber* f = S.current;
  Warp& w = warps[f->warp];
  unsigned in_warp = std::min(32u, n_fibers - f->warp * 32);
  if (in_warp < 32 && mask == ~0u)
    mask = (1u << in_warp) - 1;
  if (!(mask >> f->lane & 1))
    fail("line %u: lane %u calls a warp collective with mask %08x that leaves it out", line, f->lane, mask);
  if (mask & w.exited)
    fail("line %u: mask %08x names lanes that have returned (%08x)", line, mask, w.exited);
  Slot* s = nullptr;
  for (unsigned i = 0; i < w.n_slots; i++)
    if (w.slot[i].mask == mask)
      s = &w.slot[i];
  if (!s) {
    for (unsigned i = 0; i < w.n_slots; i++)
      if (!w.slot[i].arrived)
        s = &w.slot[i];
    if (w.n_slots < 8)
      s = &w.slot[w.n_slots++];
    else if (!s)
      fail("too many masks in flight");
    s->mask = mask;
    s->arrived = 0;
    s->gen = 0;
  }
  if (s->arrived && (s->op != op || s->line != line))
    fail("lanes of one warp meet different collectives: lines %u and %u", s->line, line);
  s->op = op;
  s->line = line;
  unsigned g = s->gen & 1;
  s->buf[g][f->lane] = v;
  s->arrived |= 1u << f->lane;
  if (s->arrived == mask) {
    s->arrived = 0;
    s->gen++;
    unsigned e = 0;
    uint32_t base = f->warp * 32;
    if (op == SYNC_WARP) {
      for (uint32_t m = mask; m; m &= m - 1)
        e = std::max(e, fibers[base + __builtin_ctz(m)].warp_syncs);
      for (uint32_t m = mask; m; m &= m - 1)
        fibers[base + __builtin_ctz(m)].warp_syncs = e + 1;
    }
    for (uint32_t m = mask & ~(1u << f->lane); m; m &= m - 1)
      wake(base + __builtin_ctz(m));
    return s->buf[g];
  }
  f->state = IN_COLLECTIVE;
  f->line = line;
  f->mask = mask;
  run_another();
  return s->buf[g];
}
void cp_async(void* d, const void* s, size_t n) {
  if ((n != 4 && n != 8 && n != 16) || uintptr_t(d) % n || uintptr_t(s) % n)
    fail("cp.async of %zu bytes, or a misaligned address", n);
  copies[S.current->number].push_back({d, s, n, copy_group[S.current->number]});
}
void cp_commit() { copy_group[S.current->number]++; }
void cp_wait(unsigned prior) {
  auto& v = copies[S.current->number];
  unsigned g = copy_group[S.current->number];
  size_t k = 0;
  for (auto& c : v)
    if (c.group + prior < g) {
      note_copy(c.d, c.s, c.n);
      memcpy(c.d, c.s, c.n);
    } else
      v[k++] = c;
  v.resize(k);
}
void* shared_at(const void* key, size_t n) {
  for (unsigned i = 0; i < n_shared_keys; i++)
    if (shared_keys[i].key == key)
      return arena + shared_keys[i].off;
  if (n_shared_keys == 64 || arena_used + n > sizeof arena || arena_used + n + S.dynamic_bytes > 48 * 1024)
    fail("shared memory: %zu static and %zu dynamic bytes in use, %zu more asked for, expected 48 KB at most",
         arena_used, S.dynamic_bytes, n);
  shared_keys[n_shared_keys++] = {key, arena_used};
  void* p = arena + arena_used;
  arena_used += (n + 15) / 16 * 16;
  return p;
}
static void run_fiber() {
  kernel->run(params_of_launch);
  Fiber* f = S.current;
  f->state = DONE;
  n_done++;
  warps[f->warp].exited |= 1u << f->lane;
  if (!f->waited)
    fail("thread returns and has not waited for the launches before");
  if (n_waiting)
    fail("thread returns while others wait at __syncthreads line %u", barrier_line);
  run_another();
  __builtin_unreachable();
}
static void run_block() {
  // Not a number, or -1: what is read before it is written shows.
  memset(S.dynamic, 0xFF, S.dynamic_bytes);
  memset(arena, 0xFF, sizeof arena);
  n_shared_keys = 0;
  arena_used = 0;
  on_block_start();
  n_fibers = S.block_dim.x * S.block_dim.y * S.block_dim.z;
  n_done = n_waiting = n_ready = 0;
  for (unsigned w = 0; w * 32 < n_fibers; w++) {
    warps[w].n_slots = 0;
    warps[w].exited = 0;
  }
  for (unsigned i = 0; i < n_fibers; i++) {
    Fiber& f = fibers[i];
    f = Fiber{};
    f.number = i;
    f.lane = i & 31;
    f.warp = i >> 5;
    f.waited = !S.early;
    f.tid = {i % S.block_dim.x, i / S.block_dim.x % S.block_dim.y, i / S.block_dim.x / S.block_dim.y};
    copies[i].clear();
    copy_group[i] = 0;
    char* top = stacks + STACK_BYTES * (i + 1);
#ifdef EMU_UCONTEXT
    getcontext(&contexts[i]);
    contexts[i].uc_stack.ss_sp = top - STACK_BYTES;
    contexts[i].uc_stack.ss_size = STACK_BYTES;
    contexts[i].uc_link = nullptr;
    makecontext(&contexts[i], run_fiber, 0);
#else
    void** sp = reinterpret_cast<void**>(top);
    *--sp = nullptr;
    *--sp = reinterpret_cast<void*>(run_fiber);
    for (int r = 0; r < 6; r++)
      *--sp = nullptr;
    f.sp = sp;
#endif
  }
  for (unsigned i = n_fibers; i-- > 0;)
    wake(i);
  S.current = &scheduler;
  Fiber* first;
  {
    unsigned i = random_order ? random_number() % n_ready : n_ready - 1;
    first = &fibers[ready[i]];
    ready[i] = ready[--n_ready];
  }
  switch_to(first);
}
}  // namespace emu
using namespace emu;
extern "C" int cuda_emulator_launch(const char* name, const unsigned g[3], const unsigned b[3], unsigned smem,
                                    bool early, void** params, uint64_t seed, char* err, size_t errlen) {
  error.clear();
  kernel = nullptr;
  for (Kernel* k = registry; k; k = k->next)
    if (!strcmp(k->name, name)) {
      kernel = k;
      k->launches++;
    }
  auto out = [&](const char* m) {
    if (err && errlen)
      snprintf(err, errlen, "%s", m);
    return 1;
  };
  if (!kernel)
    return out("no such kernel");
  if (b[0] * b[1] * b[2] > MOST_THREADS || !b[0] || !b[1] || !b[2])
    return out("bad block size");
  if (smem > 227 * 1024)
    return out("too much dynamic shared memory");
  if (!stacks) {
    stacks = (char*)mmap(nullptr, STACK_BYTES * MOST_THREADS, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    stacks_begin = stacks;
    stacks_end = stacks + STACK_BYTES * MOST_THREADS;
  }
  static char dynbuf[227 * 1024] __attribute__((aligned(1024)));
  S.dynamic = dynbuf;
  S.dynamic_bytes = smem;
  S.early = early;
  params_of_launch = params;
  random_order = seed != 0;
  random_state = seed * 0x9E3779B97F4A7C15ull + 1;
  S.grid_dim = dim3(g[0], g[1], g[2]);
  S.block_dim = dim3(b[0], b[1], b[2]);
  on_launch(kernel);
  uint64_t total = uint64_t(g[0]) * g[1] * g[2];
  std::vector<uint64_t> order(total);
  for (uint64_t i = 0; i < total; i++)
    order[i] = i;
  if (random_order)
    for (uint64_t i = total; i > 1; i--)
      std::swap(order[i - 1], order[random_number() % i]);
  for (uint64_t n : order) {
    S.block_number = n;
    S.block = {unsigned(n % g[0]), unsigned(n / g[0] % g[1]), unsigned(n / g[0] / g[1])};
    run_block();
    if (!error.empty())
      return out(error.c_str());
  }
  return 0;
}
#ifndef CUDA_EMULATOR_CHECK
extern "C" void cuda_emulator_track(const void*, size_t) {}
extern "C" void cuda_emulator_untrack(const void*) {}
#endif
