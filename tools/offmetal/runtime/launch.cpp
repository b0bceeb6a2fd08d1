// A dispatch: buffers are copied into memory with inaccessible memory around each, threadgroups run one after the
// other, outputs are copied back.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <link.h>
#include <sys/mman.h>

#include "machine.h"

namespace offmetal {

Machine* M = nullptr;

static void* map(size_t bytes, int protection) {
  void* p = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p != MAP_FAILED) return p;
  perror("offmetal: mmap");
  abort();
}
static void* memory(size_t bytes) { return map(bytes, PROT_READ | PROT_WRITE); }

static void make_machine() {
  if (M) return;
  M = (Machine*)calloc(1, sizeof(Machine));
  M->stacks = (char*)memory((size_t)kMaxThreads * kStack);
  for (uint32_t i = 0; i < kMaxThreads; i++) mprotect(M->stacks + (size_t)i * kStack, kPage, PROT_NONE);
  M->threadgroup_memory = (char*)map(kThreadgroupSpace + 2 * kGuard, PROT_NONE) + kGuard;
  mprotect(M->threadgroup_memory, kThreadgroupSpace, PROT_READ | PROT_WRITE);
  M->threadgroup_cells = (Cell*)memory(kThreadgroupSpace * sizeof(Cell));
}

// ---- buffers ------------------------------------------------------------------------------------------------------

// Each buffer lies in the middle of a slot of its own, with a guard before and behind it. Address space costs nothing.

static size_t whole_pages(uint64_t bytes) { return (bytes + kPage - !!bytes) / kPage * kPage; }
static size_t count_of_cells(const Buffer& b, const Region& r) { return (b.bytes >> r.shift) + 1; }
static size_t count_of_lines(const Buffer& b) { return (b.bytes >> 7) + 1; }

static void make_region(const Buffer& b, Region& r, uintptr_t at, bool checked) {
  size_t pages = whole_pages(b.bytes);
  r = {};
  // its end lies at the end of a page, but for the alignment of vectors
  r.base = (at + pages - b.bytes) & ~(uintptr_t)15;
  r.end = r.base + b.bytes;
  r.flags = b.flags;
  r.name = b.name;
  r.shift = b.element < 4 ? (b.element < 2 ? 0 : 1) : 2;
  mprotect((void*)at, pages, PROT_READ | PROT_WRITE);
  memcpy((void*)r.base, b.host, b.bytes);
  if (!(b.flags & kOutput)) mprotect((void*)at, pages, PROT_READ);
  if (!checked) return;
  r.lines = (uint8_t*)memory(count_of_lines(b));
  if (b.flags & kOutput) r.cells = (Cell*)memory(count_of_cells(b, r) * sizeof(Cell));
}

static void make_arena(const Launch& l) {
  size_t half = kGuard;
  for (uint32_t i = 0; i < l.n_buffers; i++)
    while (l.buffers[i].bytes > half) half *= 2;
  M->slot_shift = __builtin_ctzll(2 * half);
  M->arena = (uintptr_t)map(2 * half * l.n_buffers, PROT_NONE);
  M->arena_end = M->arena + 2 * half * l.n_buffers;
  M->n_regions = l.n_buffers;
  for (uint32_t i = 0; i < l.n_buffers; i++) {
    make_region(l.buffers[i], M->regions[i], M->arena + 2 * half * i + half, l.checks);
    M->arguments[i] = M->regions[i].base + l.buffers[i].origin;
  }
}

static void count_unwritten(Launch& l, const Buffer& b, const Region& r) {
  uint64_t per_element = b.element >> r.shift;
  for (uint64_t k = 0; k < b.bytes / b.element; k++) {
    bool written = true;
    for (uint64_t j = 0; j < per_element; j++) written = written && r.cells[k * per_element + j].w_tg;
    if (written || l.unwritten++) continue;
    snprintf(l.unwritten_name, sizeof l.unwritten_name, "%s", b.name);
    l.unwritten_index = k;
  }
}

static void free_arena(Launch& l) {
  for (uint32_t i = 0; i < M->n_regions; i++) {
    Region& r = M->regions[i];
    Buffer& b = l.buffers[i];
    if (b.flags & kOutput) memcpy(b.host, (void*)r.base, b.bytes);
    if (r.lines) {
      b.read_bytes = r.read_bytes;
      b.written_bytes = r.written_bytes;
      for (uint64_t k = 0; k < count_of_lines(b); k++) b.lines += r.lines[k];
      munmap(r.lines, count_of_lines(b));
    }
    if (r.cells) {
      if (!(b.flags & kInitialised)) count_unwritten(l, b, r);
      munmap(r.cells, count_of_cells(b, r) * sizeof(Cell));
    }
  }
  munmap((void*)M->arena, M->arena_end - M->arena);
  M->arena = M->arena_end = 0;
  M->n_regions = 0;
}

// ---- threadgroups -------------------------------------------------------------------------------------------------

// Where the library with the kernel lies, for return addresses and for its constants.
static int find_library(struct dl_phdr_info* info, size_t, void*) {
  uintptr_t end = 0, entry = (uintptr_t)M->launch->entry;
  for (int i = 0; i < info->dlpi_phnum; i++) {
    const auto& part = info->dlpi_phdr[i];
    uintptr_t part_end = info->dlpi_addr + part.p_vaddr + part.p_memsz;
    if (part.p_type == PT_LOAD && part_end > end) end = part_end;
  }
  if (entry < info->dlpi_addr || entry >= end) return 0;
  M->library = info->dlpi_addr;
  M->library_end = end;
  return 1;
}

static void set_attributes(Attributes& a, const U3& position, const U3& group, const U3& groups, const U3& actual,
                           uint32_t index) {
  const uint32_t *grid = M->launch->grid, *nominal = M->launch->threadgroup;
  uint32_t dispatched = nominal[0] * nominal[1] * nominal[2];
  a.dispatch_threads_per_threadgroup = {nominal[0], nominal[1], nominal[2], 0};
  a.grid_origin = {0, 0, 0, 0};
  a.grid_size = a.threads_per_grid = {grid[0], grid[1], grid[2], 0};
  a.thread_position_in_grid = {group.x * nominal[0] + position.x, group.y * nominal[1] + position.y,
                               group.z * nominal[2] + position.z, 0};
  a.thread_position_in_threadgroup = position;
  a.threadgroup_position_in_grid = group;
  a.threadgroups_per_grid = groups;
  a.threads_per_threadgroup = actual;
  a.dispatch_quadgroups_per_threadgroup = (dispatched + 3) / 4;
  a.dispatch_simdgroups_per_threadgroup = (dispatched + kSimd - 1) / kSimd;
  a.quadgroup_index_in_threadgroup = index / 4;
  a.quadgroups_per_threadgroup = (M->n_threads + 3) / 4;
  a.simdgroup_index_in_threadgroup = index / kSimd;
  a.simdgroups_per_threadgroup = M->n_groups;
  a.thread_execution_width = a.threads_per_simdgroup = kSimd;
  a.thread_index_in_quadgroup = index % 4;
  a.thread_index_in_simdgroup = index % kSimd;
  a.thread_index_in_threadgroup = index;
}

static uint32_t groups_along(uint32_t grid, uint32_t threadgroup) { return (grid + threadgroup - 1) / threadgroup; }

// The threadgroup with this number in the grid; those at its edges are smaller.
static void run_numbered(uint64_t number, const U3& groups) {
  const uint32_t *grid = M->launch->grid, *nominal = M->launch->threadgroup;
  U3 group = {(uint32_t)(number % groups.x), (uint32_t)(number / groups.x % groups.y),
              (uint32_t)(number / groups.x / groups.y), 0};
  auto extent = [&](uint32_t at, int axis) {
    uint32_t left = grid[axis] - at * nominal[axis];
    return left < nominal[axis] ? left : nominal[axis];
  };
  U3 actual = {extent(group.x, 0), extent(group.y, 1), extent(group.z, 2), 0};
  M->n_threads = actual.x * actual.y * actual.z;
  M->n_groups = (M->n_threads + kSimd - 1) / kSimd;
  M->serial = (uint32_t)number + 1;
  M->threadgroup_epoch = M->device_epoch = 1;
  M->n_variables = M->threadgroup_used = M->threadgroup_bytes = 0;
  for (uint32_t i = 0; i < M->n_threads; i++) {
    Lane& lane = M->lanes[i];
    lane.index = i, lane.lane = i % kSimd, lane.group = i / kSimd;
    prepare_fiber(&lane);
    U3 position = {i % actual.x, i / actual.x % actual.y, i / actual.x / actual.y, 0};
    set_attributes(lane.attributes, position, group, groups, actual, i);
  }
  M->launch->threads += M->n_threads;
  run_threadgroup();
  if (M->threadgroup_bytes > M->launch->threadgroup_bytes) M->launch->threadgroup_bytes = M->threadgroup_bytes;
}

static void run_all(const Launch& l) {
  U3 groups = {groups_along(l.grid[0], l.threadgroup[0]), groups_along(l.grid[1], l.threadgroup[1]),
               groups_along(l.grid[2], l.threadgroup[2]), 0};
  uint64_t count = (uint64_t)groups.x * groups.y * groups.z;
  for (uint64_t k = 0; k < count && !M->stop; k++) run_numbered(l.order == kDescending ? count - 1 - k : k, groups);
}

}  // namespace offmetal

using namespace offmetal;

API uint64_t msl_launch_size() { return sizeof(Launch); }

// Not for two threads at once.
API void msl_launch(Launch* l) {
  make_machine();
  M->launch = l;
  M->stop = false;
  M->current = nullptr;
  M->pending.on = false;
  M->random = l->seed * 2654435761u + 88172645463325252ull;
  dl_iterate_phdr(find_library, nullptr);
  l->base = M->library;
  // the serial numbers of the threadgroups of an earlier launch mean nothing now
  if (l->checks) madvise(M->threadgroup_cells, kThreadgroupSpace * sizeof(Cell), MADV_DONTNEED);
  make_arena(*l);
  catch_signals(l->timeout_ms);
  if (!sigsetjmp(M->crash, 1)) run_all(*l);
  restore_signals();
  free_arena(*l);
  M->current = nullptr;
  M->launch = nullptr;
}
