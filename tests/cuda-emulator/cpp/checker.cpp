// The checker: kernels are compiled with -fsanitize=thread, whose calls land here instead of in its library.
//
// It finds data races in shared and global memory, accesses out of bounds, misaligned ones, and reads of
// shared memory that nobody wrote, and names the source lines of both sides. Of launches that begin before the
// last one has ended, it finds what they read of it, or write, before they wait for it.
#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <map>
#include <memory>
#include <unordered_map>

#include "cuda_emulator.h"
namespace emu {
[[noreturn]] void fail(const char* fmt, ...);
extern char *stacks_begin, *stacks_end, *arena_begin;
struct Access {
  uint32_t block = 0;
  uint16_t tid = 0, barriers = 0, warp_syncs = 0;
  bool atomic = false;
  uint32_t pc = 0;
};
struct Cell {
  Access w, r1, r2;
};
// What is known of 4 KB: a cell for each word, and cells of its four bytes where they differ. They come after all
// words, and only where a word was not accessed as a whole: fewer cells are fewer misses of the cache.
struct Page {
  Cell words[1024];
  bool split[1024];
  std::unique_ptr<Cell[]> bytes;
};
static std::map<uintptr_t, size_t> allocations;
static uintptr_t last_begin, last_end;  // the allocation that was accessed last
static std::unordered_map<uintptr_t, std::unique_ptr<Page>> shadow;
// The first blocks of this launch, and of the first one that may still run.
static uint32_t block_id = 1, launch_first = 1, running_first = 1;
static uintptr_t module_begin, module_end;
// The pages that were accessed last, by the end of their numbers.
static struct {
  uintptr_t number;
  Page* page;
} recent[64];
static int phdr(dl_phdr_info* i, size_t, void* self) {
  uintptr_t lo = ~0ull, hi = 0;
  for (int k = 0; k < i->dlpi_phnum; k++)
    if (i->dlpi_phdr[k].p_type == PT_LOAD) {
      lo = std::min(lo, uintptr_t(i->dlpi_addr + i->dlpi_phdr[k].p_vaddr));
      hi = std::max(hi, uintptr_t(i->dlpi_addr + i->dlpi_phdr[k].p_vaddr + i->dlpi_phdr[k].p_memsz));
    }
  if (uintptr_t(self) >= lo && uintptr_t(self) < hi) {
    module_begin = lo;
    module_end = hi;
    return 1;
  }
  return 0;
}
void on_launch(const Kernel*) {
  if (!module_begin)
    dl_iterate_phdr(phdr, (void*)&on_launch);
  launch_first = ++block_id;
  if (!S.early)
    running_first = launch_first;
}
void on_block_start() { block_id++; }
static Page& page_of(uintptr_t a) {
  uintptr_t number = a >> 12;
  auto& known = recent[number % 64];
  if (known.number != number || !known.page) {
    auto& page = shadow[number];
    if (!page)
      page = std::make_unique<Page>();
    known = {number, page.get()};
  }
  return *known.page;
}
// The cell of the byte at x, or of its whole word, and the byte after those it stands for.
static Cell& cell_of(uintptr_t& x, uintptr_t end) {
  Page& page = page_of(x);
  size_t byte = x & 4095, word = byte / 4;
  bool whole = byte % 4 == 0 && end - x >= 4;
  if (!page.split[word] && whole) {
    x += 4;
    return page.words[word];
  }
  if (!page.split[word]) {
    if (!page.bytes)
      page.bytes = std::make_unique<Cell[]>(4096);
    std::fill_n(&page.bytes[word * 4], 4, page.words[word]);
    page.split[word] = true;
  }
  x++;
  return page.bytes[byte];
}
static const char* where(uint32_t off, char* b, size_t n) {
  char self[300], cmd[400];
  ssize_t k = -1;
  Dl_info di;
  if (dladdr((void*)(module_begin + off), &di) && di.dli_fname) {
    snprintf(self, sizeof self, "%s", di.dli_fname);
    k = 0;
  }
  if (k < 0) {
    snprintf(b, n, "+0x%x", off);
    return b;
  }
  snprintf(cmd, sizeof cmd, "addr2line -s -e %s 0x%lx 2>/dev/null", self,
           (unsigned long)(off - 1 + (module_begin < 0x500000 && module_begin ? module_begin : 0)));
  FILE* f = popen(cmd, "r");
  if (!f || !fgets(b, int(n), f))
    snprintf(b, n, "+0x%x", off);
  if (f)
    pclose(f);
  b[strcspn(b, "\n ")] = 0;
  return b;
}
[[noreturn]] static void report(const char* what, uintptr_t a, size_t n, bool is_write, uint32_t pc,
                                const Access* o, const char* space) {
  static char b1[300], b2[300], msg[500];
  size_t m = snprintf(msg, sizeof msg, "%s: %zu-byte %s of %s address %p at %s", what, n,
                      is_write ? "write" : "read", space, (void*)a, where(pc, b1, sizeof b1));
  if (o)
    snprintf(msg + m, sizeof msg - m, "; other access by thread %u of %s block at %s", o->tid,
             o->block == block_id ? "the same" : "another", where(o->pc, b2, sizeof b2));
  fail("%s", msg);
}
static bool ordered(const Access& o, const Fiber* f) {
  if (o.tid == f->number)
    return true;
  if (o.barriers < f->barriers)
    return true;
  return o.tid / 32u == f->warp && o.warp_syncs < f->warp_syncs;
}
static void access(uintptr_t a, size_t n, bool is_write, bool atomic, void* ret) {
  uint32_t pc = uint32_t(uintptr_t(ret) - module_begin);
  const Fiber* f = S.current;
  if (!f || a - uintptr_t(stacks_begin) < uintptr_t(stacks_end - stacks_begin))
    return;
  bool dyn = a - uintptr_t(S.dynamic) < 227 * 1024, shared = a - uintptr_t(arena_begin) < (48 << 10);
  if (dyn) {
    if (a + n > uintptr_t(S.dynamic) + S.dynamic_bytes)
      report("out of bounds", a, n, is_write, pc, nullptr, "dynamic shared");
    shared = true;
  } else if (!shared) {
    if (a >= module_begin && a < module_end)
      return;
    if (a < last_begin || a + n > last_end) {
      auto it = allocations.upper_bound(a);
      if (it == allocations.begin() || (--it, a + n > it->first + it->second))
        report("out of bounds", a, n, is_write, pc, nullptr, "global");
      last_begin = it->first;
      last_end = it->first + it->second;
    }
  }
  // A structure is read in pieces that its size is a multiple of, of 16 bytes at most.
  if (a % std::min<size_t>(n & -n, 16))
    report("misaligned", a, n, is_write, pc, nullptr, shared ? "shared" : "global");
  const char* sp = shared ? "shared" : "global";
  auto live = [&](const Access& o) { return shared ? o.block == block_id : o.block >= launch_first; };
  auto clash = [&](const Access& o) {
    return live(o) && !(atomic && o.atomic) && (o.block != block_id || !ordered(o, f));
  };
  Access me;
  me.block = block_id;
  me.tid = f->number;
  me.barriers = f->barriers;
  me.warp_syncs = f->warp_syncs;
  me.atomic = atomic;
  me.pc = pc;
  bool ahead = !shared && !f->waited;
  if (ahead && is_write)
    report("before waiting for the launches before", a, n, is_write, pc, nullptr, sp);
  for (uintptr_t x = a, end = a + n; x < end;) {
    Cell& c = cell_of(x, end);
    if (ahead && c.w.block >= running_first && c.w.block < launch_first)
      report("before waiting for the launch that wrote it", a, n, is_write, pc, &c.w, sp);
    if (shared && !is_write && !live(c.w))
      report("read of unset", a, n, is_write, pc, nullptr, sp);
    if (clash(c.w))
      report("race", a, n, is_write, pc, &c.w, sp);
    if (is_write) {
      if (clash(c.r1))
        report("race", a, n, is_write, pc, &c.r1, sp);
      if (clash(c.r2))
        report("race", a, n, is_write, pc, &c.r2, sp);
    }
    if (is_write) {
      c.w = me;
      c.r1 = c.r2 = Access{};
    } else if (!live(c.r1) || c.r1.tid == me.tid)
      c.r1 = me;
    else
      c.r2 = me;
  }
}
void note_copy(void* d, const void* s, size_t n) {
  access(uintptr_t(s), n, false, false, __builtin_return_address(0));
  access(uintptr_t(d), n, true, false, __builtin_return_address(0));
}
void note_atomic(void* p, size_t n) { access(uintptr_t(p), n, true, true, __builtin_return_address(0)); }
}  // namespace emu
#define RA __builtin_return_address(0)
#define HOOK(n)                                                                                         \
  extern "C" void __tsan_read##n(void* p) { emu::access(uintptr_t(p), n, false, false, RA); }           \
  extern "C" void __tsan_write##n(void* p) { emu::access(uintptr_t(p), n, true, false, RA); }           \
  extern "C" void __tsan_unaligned_read##n(void* p) { emu::access(uintptr_t(p), n, false, false, RA); } \
  extern "C" void __tsan_unaligned_write##n(void* p) { emu::access(uintptr_t(p), n, true, false, RA); } \
  extern "C" void __tsan_volatile_read##n(void* p) { emu::access(uintptr_t(p), n, false, false, RA); }  \
  extern "C" void __tsan_volatile_write##n(void* p) { emu::access(uintptr_t(p), n, true, false, RA); }
HOOK(1) HOOK(2) HOOK(4) HOOK(8) HOOK(16) extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_read_range(void* p, size_t n) { emu::access(uintptr_t(p), n, false, false, RA); }
extern "C" void __tsan_write_range(void* p, size_t n) { emu::access(uintptr_t(p), n, true, false, RA); }
extern "C" void cuda_emulator_track(const void* p, size_t n) { emu::allocations[uintptr_t(p)] = n; }
extern "C" void cuda_emulator_untrack(const void* p) {
  using namespace emu;
  auto it = allocations.find(uintptr_t(p));
  if (it == allocations.end())
    return;
  // What is known of it is known no longer, but for pages that others have a part of.
  for (uintptr_t page = (it->first + 4095) >> 12; page < (it->first + it->second) >> 12; page++) {
    shadow.erase(page);
    recent[page % 64].page = nullptr;
  }
  allocations.erase(it);
  last_begin = last_end = 0;
}
