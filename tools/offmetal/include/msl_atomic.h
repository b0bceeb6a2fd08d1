// Atomics. Only memory_order_relaxed exists on Metal before 3.2.
#pragma once
namespace metal {
enum memory_order {
  memory_order_relaxed = 0, memory_order_acquire = 2, memory_order_release = 3, memory_order_acq_rel = 4,
  memory_order_seq_cst = 5 };
enum thread_scope { thread_scope_thread, thread_scope_simdgroup, thread_scope_threadgroup, thread_scope_device };
template <typename T> struct __msl_acode;
template <> struct __msl_acode<float> { static constexpr constant uint v = 0; };
template <> struct __msl_acode<int> { static constexpr constant uint v = 7; };
template <> struct __msl_acode<uint> { static constexpr constant uint v = 8; };
template <> struct __msl_acode<bool> { static constexpr constant uint v = 4; };
template <> struct __msl_acode<ulong> { static constexpr constant uint v = 9; };
template <typename T> struct atomic { T __s; atomic() = default; };
template <typename T> using _atomic = atomic<T>;
// With the codes of runtime/accesses.cpp.
#define MSL_ATOMIC_RMW(F, OP) \
  template <typename T, typename U> MSL_FN T F(volatile device atomic<T>* p, U u, memory_order) { \
    static_assert(!is_floating_point_v<T> || OP <= 5, "atomic<float> has add, sub and exchange only"); \
      T v = (T)u, o; __msl_atomic(OP, __msl_acode<T>::v, p, &v, nullptr, &o); return o; } \
  template <typename T, typename U> MSL_FN T F(volatile threadgroup atomic<T>* p, U u, memory_order) { \
    static_assert(!is_floating_point_v<T>, "atomic<float> exists in device memory only"); T v = (T)u, o; \
      __msl_atomic(OP, __msl_acode<T>::v, p, &v, nullptr, &o); return o; }
MSL_ATOMIC_RMW(atomic_exchange_explicit, 2) MSL_ATOMIC_RMW(atomic_fetch_add_explicit, 4)
  MSL_ATOMIC_RMW(atomic_fetch_sub_explicit, 5)
MSL_ATOMIC_RMW(atomic_fetch_min_explicit, 6) MSL_ATOMIC_RMW(atomic_fetch_max_explicit, 7)
  MSL_ATOMIC_RMW(atomic_fetch_and_explicit, 8) MSL_ATOMIC_RMW(atomic_fetch_or_explicit, 9)
  MSL_ATOMIC_RMW(atomic_fetch_xor_explicit, 10)
#define MSL_ATOMIC_AS(AS) \
  template <typename T> \
    MSL_FN T atomic_load_explicit(const volatile AS atomic<T>* p, memory_order) { T o; \
    __msl_atomic(0, __msl_acode<T>::v, (volatile AS atomic<T>*)p, nullptr, nullptr, &o); return o; } \
  template <typename T, typename U> \
    MSL_FN void atomic_store_explicit(volatile AS atomic<T>* p, U u, memory_order) { T v = (T)u, o; \
    __msl_atomic(1, __msl_acode<T>::v, p, &v, nullptr, &o); } \
  template <typename T, typename U> \
    MSL_FN bool atomic_compare_exchange_weak_explicit(volatile AS atomic<T>* p, thread T* expected, U desired, \
    memory_order, memory_order) { T v = (T)desired, o; \
    return __msl_atomic(3, __msl_acode<T>::v, p, &v, expected, &o) != 0; }
MSL_ATOMIC_AS(device) MSL_ATOMIC_AS(threadgroup)
MSL_FN void atomic_thread_fence(mem_flags, memory_order) {}
MSL_FN void atomic_thread_fence(mem_flags, memory_order, thread_scope) {}
} // namespace metal
// clang predefines C11 atomic_int etc. in OpenCL mode: give ours other names.
#define MSL_ATOMIC_NAME(N, T) typedef metal::atomic<T> msl_##N; namespace metal { using ::msl_##N; }
MSL_ATOMIC_NAME(atomic_int, int) MSL_ATOMIC_NAME(atomic_uint, uint) MSL_ATOMIC_NAME(atomic_float, float)
  MSL_ATOMIC_NAME(atomic_bool, bool) MSL_ATOMIC_NAME(atomic_ulong, ulong)
#define atomic_int msl_atomic_int
#define atomic_uint msl_atomic_uint
#define atomic_float msl_atomic_float
#define atomic_bool msl_atomic_bool
#define atomic_ulong msl_atomic_ulong
