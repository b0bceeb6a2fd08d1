// One fiber per thread of a threadgroup, switching at SIMD operations and at barriers.
//
// A lane that reaches a SIMD operation waits until every lane of its SIMD-group has reached a SIMD operation or a
// threadgroup barrier, or has returned. The lanes at the same call site (the same chain of return addresses) then
// execute together: they are the active ones. When lanes are at different sites, the site that comes first in the
// code runs first, so that diverged lanes catch up and reconverge.
#include <cstring>

#include "machine.h"

namespace offmetal {

// ---- switching stacks: saves what the calling convention wants kept -----------------------------------------------

extern "C" void msl_switch(void** save_sp, void* to_sp);

#if defined(__x86_64__)
asm(R"(
.text
.p2align 4
.globl msl_switch
.hidden msl_switch
.type msl_switch,@function
msl_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size msl_switch,.-msl_switch
)");
static void* first_frame(char* top, void (*function)()) {
  void** sp = (void**)top;
  *--sp = nullptr;  // where `function` would return to; the stack above it is aligned to 16 bytes
  *--sp = (void*)function;
  for (int i = 0; i < 6; i++) *--sp = nullptr;
  return sp;
}
#elif defined(__aarch64__)
asm(R"(
.text
.p2align 4
.globl msl_switch
.hidden msl_switch
.type msl_switch,%function
msl_switch:
  sub sp, sp, #176
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #176
  ret
.size msl_switch,.-msl_switch
)");
static void* first_frame(char* top, void (*function)()) {
  char* sp = top - 176;
  memset(sp, 0, 176);
  ((void**)sp)[11] = (void*)function;  // x30
  return sp;
}
#else
#error "no msl_switch for this architecture"
#endif

// ---- who runs next ------------------------------------------------------------------------------------------------

static uint32_t random_below(uint32_t n) {
  uint64_t x = M->random;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  return (uint32_t)((M->random = x) % n);
}

// A lane of the SIMD-group that can go on, or null.
static Lane* take_ready(uint32_t group) {
  uint32_t ready = M->ready[group], lane;
  if (!ready) return nullptr;
  switch (M->launch->order) {
    case kAscending: lane = __builtin_ctz(ready); break;
    case kDescending: lane = 31 - __builtin_clz(ready); break;
    default:
      for (uint32_t skip = random_below(__builtin_popcount(ready)); skip; skip--) ready &= ready - 1;
      lane = __builtin_ctz(ready);
  }
  M->ready[group] &= ~(1u << lane);
  return &M->lanes[group * kSimd + lane];
}

constexpr int kDepth = 16;  // frames of a chain that are looked at
constexpr size_t kAboveFrames = 64;  // bytes at the top of a stack that belong to no frame

static bool on_own_stack(const Lane& lane, void** frame) {
  return (char*)frame >= lane.stack_top - kStack && (char*)frame < lane.stack_top - kAboveFrames;
}

// Return addresses of the frames that a waiting lane is in, innermost first.
static int chain(const Lane& lane, uint64_t pcs[kDepth]) {
  int n = 0;
  for (void** frame = lane.frame; n < kDepth && on_own_stack(lane, frame) && frame[1]; frame = (void**)frame[0])
    pcs[n++] = (uint64_t)frame[1];
  return n;
}

// Whether x waits earlier in the code than y: at the outermost call that differs.
static bool comes_before(const Lane& x, const Lane& y) {
  uint64_t a[kDepth], b[kDepth];
  int n = chain(x, a), m = chain(y, b);
  while (n && m)
    if (a[--n] != b[--m]) return a[n] < b[m];
  return false;
}

// Of the waiting lanes, those at the site that comes first; `first` becomes one of them.
static uint32_t active_lanes(Lane* lanes, uint32_t waiting, uint32_t& first) {
  first = __builtin_ctz(waiting);
  for (uint32_t rest = waiting; rest; rest &= rest - 1) {
    uint32_t i = __builtin_ctz(rest);
    if (lanes[i].site != lanes[first].site && comes_before(lanes[i], lanes[first])) first = i;
  }
  uint32_t active = 0;
  for (uint32_t rest = waiting; rest; rest &= rest - 1) {
    uint32_t i = __builtin_ctz(rest);
    if (lanes[i].site == lanes[first].site) active |= 1u << i;
  }
  return active;
}

// No lane of the SIMD-group can go on: execute the operation that some of them wait at. Whether there was one.
static bool execute_waiting(uint32_t group) {
  Lane* lanes = &M->lanes[group * kSimd];
  uint32_t waiting = 0, first;
  for (uint32_t rest = M->alive[group]; rest; rest &= rest - 1) {
    uint32_t i = __builtin_ctz(rest);
    if (lanes[i].state == kAtSimd) waiting |= 1u << i;
  }
  if (!waiting) return false;
  uint32_t active = active_lanes(lanes, waiting, first);
  M->launch->simd_ops++;
  M->launch->divergent_ops += active != M->all[group];
  Lane* before = M->current;
  M->current = &lanes[first];  // reports are about it
  if (lanes[first].operation == kSimdBarrier) {
    if (active != M->all[group])
      report(kBarrierDivergence, lanes[first].caller(), "simdgroup_barrier is not reached by all lanes");
    if (lanes[first].a) M->simd_epoch[group]++;  // mem_none orders nothing
  } else {
    execute(lanes, active, lanes[first]);
  }
  M->current = before;
  for (uint32_t rest = active; rest; rest &= rest - 1) lanes[__builtin_ctz(rest)].state = kReady;
  M->ready[group] |= active;
  return true;
}

static Lane* next_of(uint32_t group) {
  Lane* next = take_ready(group);
  return next || !execute_waiting(group) ? next : take_ready(group);
}

// ---- a lane's way -------------------------------------------------------------------------------------------------

[[noreturn]] void leave_fiber() {
  void* dead;
  msl_switch(&dead, M->scheduler_sp);
  __builtin_unreachable();
}

void arrive(Lane* lane, Operation operation, void* frame) {
  if (__builtin_expect(M->pending.on, 0)) flush_pending();
  lane->operation = operation;
  lane->frame = (void**)frame;
  uint64_t hash = 0;
  void** at = lane->frame;
  for (int n = 0; n < kDepth && on_own_stack(*lane, at); n++, at = (void**)at[0])
    hash = hash * 0x9e3779b97f4a7c15ull + (uint64_t)at[1];
  lane->site = hash;
}

// Others run until the lane may go on.
void wait(Lane* lane, State state) {
  lane->state = state;
  Lane* next = next_of(lane->group);
  leave_if_stopped();
  M->current = next;
  if (!next) msl_switch(&lane->sp, M->scheduler_sp);
  else if (next != lane) msl_switch(&lane->sp, next->sp);
  leave_if_stopped();
}

static void fiber_main() {
  M->launch->entry(M->arguments, &M->current->attributes);
  Lane* lane = M->current;
  if (M->pending.on) flush_pending();
  lane->state = kDone;
  M->alive[lane->group] &= ~(1u << lane->lane);
  M->n_alive--;
  Lane* next = next_of(lane->group);
  if (M->stop || !next) leave_fiber();
  M->current = next;
  void* dead;
  msl_switch(&dead, next->sp);
  __builtin_unreachable();
}

void prepare_fiber(Lane* lane) {
  // stacks that begin at the same offset of a page would share few lines of the host's cache
  uint32_t colour = lane->index * 7 % 61 * 64;
  lane->stack_top = M->stacks + (size_t)(lane->index + 1) * kStack - colour;
  lane->sp = first_frame(lane->stack_top, fiber_main);
  lane->state = kReady;
}

// ---- a threadgroup ------------------------------------------------------------------------------------------------

// Every thread that has not returned waits at a threadgroup barrier.
static void pass_barrier() {
  Lane* first = nullptr;
  for (uint32_t i = 0; i < M->n_threads; i++) {
    Lane& lane = M->lanes[i];
    if (lane.state == kDone) continue;
    if (!first) first = &lane;
    if (lane.site == first->site) continue;
    M->current = &lane;
    Report* r = report(kBarrierDivergence, lane.caller(),
                       "threads of a threadgroup wait at different threadgroup_barrier calls");
    if (!r) continue;
    r->other_pc = first->caller();
    position_of(first->index, r->other_thread);
  }
  if (M->n_alive != M->n_threads) {
    M->current = first;
    report(kBarrierDivergence, first->caller(),
           "threadgroup_barrier is reached by %u of %u threads; the others have returned", M->n_alive, M->n_threads);
  }
  M->current = nullptr;
  M->launch->barriers++;
  uint32_t flags = first->a;  // mem_flags
  M->device_epoch += flags & 1;
  M->threadgroup_epoch += flags >> 1 & 1;
  for (uint32_t i = 0; i < M->n_threads; i++) {
    if (M->lanes[i].state != kAtBarrier) continue;
    M->lanes[i].state = kReady;
    M->ready[i / kSimd] |= 1u << (i % kSimd);
  }
}

// Run the SIMD-group until its lanes are done or wait for another SIMD-group.
static void run_group(uint32_t group) {
  while (Lane* next = next_of(group)) {
    if (M->stop) return;
    M->current = next;
    msl_switch(&M->scheduler_sp, next->sp);
    M->current = nullptr;
    if (M->stop) return;
  }
}

void run_threadgroup() {
  for (uint32_t g = 0; g < M->n_groups; g++) {
    uint32_t lanes = M->n_threads - g * kSimd;
    M->all[g] = M->alive[g] = M->ready[g] = lanes >= kSimd ? ~0u : (1u << lanes) - 1;
    M->simd_epoch[g] = 1;
  }
  M->n_alive = M->n_threads;
  for (;;) {
    uint32_t start = M->launch->order == kRandom ? random_below(M->n_groups) : 0;
    for (uint32_t k = 0; k < M->n_groups && !M->stop; k++)
      run_group(M->launch->order == kDescending ? M->n_groups - 1 - k : (k + start) % M->n_groups);
    if (M->stop || !M->n_alive) return;
    pass_barrier();
    if (M->stop) return;
  }
}

}  // namespace offmetal
