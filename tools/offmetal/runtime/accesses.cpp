// Where kernels enter for memory: the callbacks that the compiler puts into checked kernels, atomics, and the variables
// of a threadgroup.
#include <cstring>

#include "machine.h"

using namespace offmetal;

// ---- -fsanitize=thread: each load and store -----------------------------------------------------------------------

#define CALLBACKS(NAME, BYTES) \
  API void __tsan_##NAME##read##BYTES(void* p) { access((uintptr_t)p, BYTES, false, false, CALLER); } \
  API void __tsan_##NAME##write##BYTES(void* p) { access((uintptr_t)p, BYTES, true, false, CALLER); } \
  API void __tsan_##NAME##read_write##BYTES(void* p) { \
    access((uintptr_t)p, BYTES, false, false, CALLER); \
    access((uintptr_t)p, BYTES, true, false, CALLER); \
  }
CALLBACKS(, 1)
CALLBACKS(, 2)
CALLBACKS(, 4)
CALLBACKS(, 8)
CALLBACKS(, 16)
CALLBACKS(unaligned_, 2)
CALLBACKS(unaligned_, 4)
CALLBACKS(unaligned_, 8)
CALLBACKS(unaligned_, 16)

API void __tsan_init() {}
API void __tsan_func_entry(void*) {}
API void __tsan_func_exit() {}

static void copied(void* to, const void* from, size_t n, uint64_t pc) {
  if (!n) return;
  access((uintptr_t)from, (uint32_t)n, false, false, pc);
  access((uintptr_t)to, (uint32_t)n, true, false, pc);
}
API void* __tsan_memcpy(void* to, const void* from, size_t n) {
  copied(to, from, n, CALLER);
  return memcpy(to, from, n);
}
API void* __tsan_memmove(void* to, const void* from, size_t n) {
  copied(to, from, n, CALLER);
  return memmove(to, from, n);
}
API void* __tsan_memset(void* to, int byte, size_t n) {
  if (n) access((uintptr_t)to, (uint32_t)n, true, false, CALLER);
  return memset(to, byte, n);
}

// ---- -fsanitize=alignment,array-bounds,local-bounds,integer-divide-by-zero --------------------------------------------------

static void undefined(uint64_t pc, const char* what) {
  if (!M || !M->launch) return;
  report(kUndefined, pc, "%s", what);
  leave_if_stopped();
}
API void __ubsan_handle_out_of_bounds_minimal() {
  undefined(CALLER, "index outside of a private or threadgroup array");
}
API void __ubsan_handle_type_mismatch_minimal() {
  undefined(CALLER, "access to an address that is not a multiple of what the type asks for");
}
API void __ubsan_handle_local_out_of_bounds_minimal() { undefined(CALLER, "access outside of a local array"); }
API void __ubsan_handle_divrem_overflow_minimal() { undefined(CALLER, "integer division by zero or overflow"); }

// ---- atomics: one thread runs at a time, so plain arithmetic is atomic --------------------------------------------

enum Atomic : uint32_t { kLoad, kStore, kExchange, kCompareExchange, kAdd, kSubtract, kMin, kMax, kAnd, kOr, kXor };

template <typename T> static T read_as(const void* p) {
  T value;
  memcpy(&value, p, sizeof value);
  return value;
}

template <typename T> static T updated(uint32_t op, T old, T operand) {
  switch (op) {
    case kStore: case kExchange: return operand;
    case kAdd: return (T)(old + operand);
    case kSubtract: return (T)(old - operand);
    case kMin: return operand < old ? operand : old;
    case kMax: return operand > old ? operand : old;
  }
  if constexpr (T(0.5) == T(0)) {  // integers
    if (op == kAnd) return (T)(old & operand);
    if (op == kOr) return (T)(old | operand);
    if (op == kXor) return (T)(old ^ operand);
  }
  return old;
}

template <typename T> static uint32_t atomic(uint32_t op, void* p, const void* operand, void* expected, void* out) {
  T old = read_as<T>(p);
  if (out) memcpy(out, &old, sizeof old);
  if (op == kLoad) return 0;
  T given = read_as<T>(operand);
  if (op == kCompareExchange) {
    bool same = !memcmp(expected, &old, sizeof old);
    memcpy(same ? p : expected, same ? &given : &old, sizeof old);
    return same;
  }
  T now = updated(op, old, given);
  memcpy(p, &now, sizeof now);
  return 0;
}

API NOINLINE uint32_t __msl_atomic(uint32_t op, uint32_t type, void* p, const void* operand, void* expected,
                                   void* out) {
  uint32_t bytes = type == 9 ? 8 : type == 4 ? 1 : 4;
  if (M->launch->checks & kCheckMemory) access((uintptr_t)p, bytes, op != kLoad, true, CALLER);
  switch (type) {
    case 0: return atomic<float>(op, p, operand, expected, out);
    case 4: return atomic<uint8_t>(op, p, operand, expected, out);
    case 7: return atomic<int32_t>(op, p, operand, expected, out);
    case 9: return atomic<uint64_t>(op, p, operand, expected, out);
    default: return atomic<uint32_t>(op, p, operand, expected, out);
  }
}

// ---- threadgroup variables ----------------------------------------------------------------------------------------

// Bytes before each variable that belong to none: an index just past the end of one is not in the next.
constexpr uint32_t kGap = 64;

// The variable's memory: the first thread that comes makes it, NaN for floats.
API NOINLINE void* __msl_tg_alloc(const char* name, uint32_t id, uint64_t bytes, uint32_t align) {
  for (uint32_t i = 0; i < M->n_variables; i++) {
    const Variable& v = M->variables[i];
    if (v.id == id && v.bytes == bytes && !strcmp(v.name, name)) return M->threadgroup_memory + v.offset;
  }
  if (align < 16) align = 16;
  uint32_t offset = (M->threadgroup_used + kGap + align - 1) / align * align;
  M->threadgroup_bytes += (uint32_t)((bytes + 15) / 16 * 16);
  bool too_many = M->n_variables == kMaxVariables || offset + bytes > kThreadgroupSpace;
  if (M->threadgroup_bytes > kThreadgroupLimit || too_many) {
    report(kThreadgroupMemory, CALLER, "%u bytes with %s, but the limit is %u", M->threadgroup_bytes, name,
           kThreadgroupLimit);
    M->stop = true;
    leave_fiber();
  }
  M->variables[M->n_variables++] = {id, offset, (uint32_t)bytes, name};
  M->threadgroup_used = offset + (uint32_t)bytes;
  return memset(M->threadgroup_memory + offset, 0xff, bytes);
}
