// Every load and store of a checked kernel: is it within a buffer, was the place written, and does another thread use
// it without an order between the two? A barrier orders the threads of a threadgroup for the memory that its flags
// name, a simdgroup barrier those of a SIMD-group; SIMD operations order nothing; nothing orders threadgroups, whose
// only means are atomics.
#include <cstring>

#include "machine.h"

namespace offmetal {

namespace {

struct Access {
  uintptr_t address;
  uint32_t size;
  bool write, atomic;
  uint64_t pc;
  // the memory it is to
  const char* name;
  uint64_t offset;
  uint32_t epoch;
  bool device, initialised;
};

int64_t distance(const Region& r, uintptr_t a) { return a < r.base ? r.base - a : a >= r.end ? a - r.end + 1 : 0; }

[[noreturn]] NOINLINE void out_of_bounds(uintptr_t address, uint32_t size, bool write, uint64_t pc) {
  Nearest n = nearest(address);
  const char* kind = write ? "write" : "read";
  Report* r = n.name ? report(kOutOfBounds, pc, "%u-byte %s at byte %lld of %llu bytes", size, kind,
                              (long long)n.offset, (unsigned long long)n.bytes)
                     : report(kOutOfBounds, pc, "%u-byte %s of memory that is no buffer of the kernel", size, kind);
  if (r && n.name) set_name(r, n.name);
  M->stop = true;  // going on would touch foreign memory
  leave_fiber();
}

NOINLINE void race(const Access& a, const Cell& c, bool other_wrote, bool between_groups) {
  const char* who = between_groups ? "two threadgroups" : "two threads of a threadgroup, without a barrier in between";
  Report* r = report(kRace, a.pc, "%s", who);
  if (!r) return;
  r->write = a.write | other_wrote << 1;
  r->offset = a.offset;
  r->other_pc = M->library + (other_wrote ? c.w_pc : c.r_pc);
  set_name(r, a.name);
  position_of(other_wrote ? c.w_thread : c.r_thread, r->other_thread);
  r->other_group = (other_wrote ? c.w_tg : c.r_tg) - 1;
}

// Threads that store the same value to the same place do no harm, and kernels do it: wait for the value.
void written_twice(const Access& a, const Cell& c, bool between_groups) {
  PendingWrite& p = M->pending;
  if (p.on && p.address == a.address && p.lane == M->current) return;  // another element of the same access
  if (p.on || a.size > sizeof p.before) return race(a, c, true, between_groups);
  p = {true, between_groups, a.size, a.address, {}, c, a.name, a.offset, a.pc, M->current};
  memcpy(p.before, (void*)a.address, a.size);
}

void look_for_races(const Access& a, const Cell& c) {
  const Lane& lane = *M->current;
  uint32_t group = lane.group;
  uint16_t simd_epoch = (uint16_t)M->simd_epoch[group];
  if (c.w_tg && !(a.atomic && c.w_atomic)) {
    bool same_group = c.w_tg == M->serial;
    bool ordered_in_simd = c.w_thread / kSimd == group && c.w_simd_epoch != simd_epoch;
    bool unordered = same_group ? c.w_thread != lane.index && c.w_epoch == a.epoch && !ordered_in_simd : a.device;
    if (unordered && a.write && !a.atomic) written_twice(a, c, !same_group);
    else if (unordered) race(a, c, true, !same_group);
  }
  if (a.write && c.r_tg && !(a.atomic && c.r_atomic)) {
    bool same_group = c.r_tg == M->serial;
    bool by_other_simd = c.r_groups & ~(1u << group);
    bool by_own_simd = (c.r_groups >> group & 1) && c.r_simd_epoch == simd_epoch &&
                       (c.r_several || c.r_thread != lane.index);
    bool unordered = same_group ? c.r_epoch == a.epoch && (by_other_simd || by_own_simd) : a.device;
    if (unordered) race(a, c, false, !same_group);
  }
}

void remember(const Access& a, Cell& c) {
  const Lane& lane = *M->current;
  uint32_t group = lane.group, pc = (uint32_t)(a.pc - M->library);
  uint16_t thread = (uint16_t)lane.index, simd_epoch = (uint16_t)M->simd_epoch[group];
  if (a.write) {
    c.w_tg = M->serial, c.w_epoch = a.epoch, c.w_pc = pc;
    c.w_thread = thread, c.w_simd_epoch = simd_epoch, c.w_atomic = a.atomic;
    return;
  }
  if (c.r_tg == M->serial && c.r_epoch == a.epoch) {  // another read since the barrier
    bool simd_barrier_since = group == c.r_thread / kSimd && c.r_simd_epoch != simd_epoch;
    c.r_several = !simd_barrier_since && (c.r_several || c.r_thread != thread);
    c.r_groups |= 1u << group;
    c.r_atomic &= a.atomic;
  } else {
    c.r_tg = M->serial, c.r_epoch = a.epoch;
    c.r_groups = 1u << group, c.r_several = 0, c.r_atomic = a.atomic;
  }
  c.r_thread = thread, c.r_simd_epoch = simd_epoch, c.r_pc = pc;
}

inline void check(const Access& a, Cell& c) {
  if (M->launch->checks & kCheckRaces) look_for_races(a, c);
  bool written = a.initialised || c.w_tg == M->serial || (a.device && c.w_tg);
  if (!a.write && !written && (M->launch->checks & kCheckUninitialised)) {
    Report* r = report(kUninitialised, a.pc, "%s is read before anything is written to it",
                       a.device ? "an output" : "threadgroup memory");
    if (r) {
      r->offset = a.offset;
      set_name(r, a.name);
    }
  }
  remember(a, c);
}

void access_threadgroup(Access& a) {
  int64_t at = (int64_t)(a.address - (uintptr_t)M->threadgroup_memory);
  const Variable* v = M->variables;
  const Variable* end = v + M->n_variables;
  while (v != end && (at < v->offset || at + a.size > (int64_t)v->offset + v->bytes)) v++;
  if (v == end) out_of_bounds(a.address, a.size, a.write, a.pc);
  a.name = v->name, a.offset = at - v->offset, a.epoch = M->threadgroup_epoch;
  for (uint32_t k = 0; k < a.size; k++) check(a, M->threadgroup_cells[at + k]);
}

void access_device(Access& a) {
  uint64_t slot = (a.address - M->arena) >> M->slot_shift;
  Region& r = M->regions[slot < M->n_regions ? slot : 0];
  if (a.address < r.base || a.address + a.size > r.end) out_of_bounds(a.address, a.size, a.write, a.pc);
  uint64_t at = a.address - r.base, last = at + a.size - 1;
  (a.write ? r.written_bytes : r.read_bytes) += a.size;
  r.lines[at >> 7] = r.lines[last >> 7] = 1;
  if (!r.cells) return;  // nobody writes to inputs
  a.name = r.name, a.offset = at, a.epoch = M->device_epoch;
  a.device = true, a.initialised = r.flags & kInitialised;
  for (uint64_t k = at >> r.shift; k <= last >> r.shift; k++) check(a, r.cells[k]);
}

}  // namespace

// The buffer or variable that was most likely meant.
Nearest nearest(uintptr_t address) {
  if (M->near_threadgroup(address) && M->n_variables) {
    int64_t at = (int64_t)(address - (uintptr_t)M->threadgroup_memory);
    const Variable* v = M->variables;
    for (uint32_t i = 1; i < M->n_variables; i++)
      if (M->variables[i].offset <= at) v = &M->variables[i];
    return {v->name, at - v->offset, v->bytes};
  }
  if (M->in_arena(address)) {
    const Region* r = M->regions;
    for (uint32_t i = 1; i < M->n_regions; i++)
      if (distance(M->regions[i], address) < distance(*r, address)) r = &M->regions[i];
    return {r->name, (int64_t)(address - r->base), r->end - r->base};
  }
  return {};
}

void flush_pending() {
  PendingWrite& p = M->pending;
  p.on = false;
  if (!memcmp((void*)p.address, p.before, p.size)) {
    M->launch->benign_writes++;
    return;
  }
  Access a = {};
  a.write = true, a.pc = p.pc, a.name = p.name, a.offset = p.offset;
  Lane* before = M->current;
  M->current = p.lane;
  race(a, p.cell, true, p.between_groups);
  M->current = before;
}

void access(uintptr_t address, uint32_t size, bool write, bool atomic, uint64_t pc) {
  if (M->on_stack(address)) return;  // the thread's own variables
  if (M->pending.on) flush_pending();
  Access a = {};
  a.address = address, a.size = size, a.write = write, a.atomic = atomic, a.pc = pc;
  if (M->near_threadgroup(address)) access_threadgroup(a);
  else if (M->in_arena(address)) access_device(a);
  else if (address - M->library < M->library_end - M->library) return;   // tables in constant memory
  else if (address - (uintptr_t)M < sizeof(Machine)) return;             // arguments of the entry function
  else out_of_bounds(address, size, write, pc);
  leave_if_stopped();
}

}  // namespace offmetal
