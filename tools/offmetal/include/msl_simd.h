// Barriers and SIMD-group functions.
#pragma once

namespace metal {
template <typename T> struct __msl_code;  // 64-bit integers and bool have none, as on Metal
#define MSL_CODE(T, C) template <> struct __msl_code<T> { static constexpr constant uint v = C; };
MSL_CODE(float, 0) MSL_CODE(half, 1) MSL_CODE(bfloat, 2) MSL_CODE(char, 3) MSL_CODE(uchar, 4) MSL_CODE(short, 5)
  MSL_CODE(ushort, 6) MSL_CODE(int, 7) MSL_CODE(uint, 8)

enum class mem_flags : uint {
  mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4, mem_threadgroup_imageblock = 8,
  mem_object_data = 16 };
MSL_CFN mem_flags operator|(mem_flags a, mem_flags b) { return (mem_flags)((uint)a | (uint)b); }
MSL_FN void threadgroup_barrier(mem_flags f) { __msl_barrier(1, (uint)f); }
MSL_FN void simdgroup_barrier(mem_flags f) { __msl_barrier(0, (uint)f); }

// Reductions and scans, with the codes of runtime/simd.cpp.
template <typename T> struct __msl_rtype { static constexpr constant uint code = __msl_code<T>::v;
  static constexpr constant uint n = 1; };
template <typename T, int N> struct __msl_rtype<vec<T, N>> { static constexpr constant uint code = __msl_code<T>::v;
  static constexpr constant uint n = N; };
#define MSL_REDUCE1(F, OP, T) MSL_FN T F(T x) { T r; __msl_reduce(OP, __msl_rtype<T>::code, 1, &x, &r); return r; } \
  template <int N> \
    MSL_FN vec<T, N> F(vec<T, N> x) { vec<T, N> r; __msl_reduce(OP, __msl_rtype<T>::code, N, &x, &r); return r; }
#define MSL_REDUCE_I(F, OP) MSL_REDUCE1(F, OP, char) MSL_REDUCE1(F, OP, uchar) MSL_REDUCE1(F, OP, short) \
  MSL_REDUCE1(F, OP, ushort) MSL_REDUCE1(F, OP, int) MSL_REDUCE1(F, OP, uint) bool F(bool) = delete;
#define MSL_REDUCE(F, OP) MSL_REDUCE_I(F, OP) MSL_REDUCE1(F, OP, half) MSL_REDUCE1(F, OP, float)
MSL_REDUCE(simd_sum, 0) MSL_REDUCE(simd_product, 1) MSL_REDUCE(simd_min, 2) MSL_REDUCE(simd_max, 3)
MSL_REDUCE_I(simd_and, 4) MSL_REDUCE_I(simd_or, 5) MSL_REDUCE_I(simd_xor, 6)
MSL_REDUCE(simd_prefix_exclusive_sum, 7) MSL_REDUCE(simd_prefix_inclusive_sum, 8)
  MSL_REDUCE(simd_prefix_exclusive_product, 9) MSL_REDUCE(simd_prefix_inclusive_product, 10)
MSL_REDUCE(quad_sum, 16) MSL_REDUCE(quad_product, 17) MSL_REDUCE(quad_min, 18) MSL_REDUCE(quad_max, 19)
  MSL_REDUCE_I(quad_and, 20) MSL_REDUCE_I(quad_or, 21) MSL_REDUCE_I(quad_xor, 22)

// Shuffles, with the codes of runtime/simd.cpp; 16 more for the quad forms.
template <typename T> MSL_FN T __msl_shuf(uint kind, T x, T fill, uint arg, uint modulo = 32) {
  T r;
  static_assert(__msl_rtype<T>::n > 0, "no SIMD shuffle for this type on Metal");
  __msl_shuffle(kind, sizeof(T), &x, &fill, arg, modulo, &r);
  return r;
}
#define MSL_SHUF1(F, K, T) MSL_FN T F(T x, ushort a) { return __msl_shuf<T>(K, x, x, a); }
#define MSL_FILL1(F, K, T) MSL_FN T F(T x, T fill, ushort a) { return __msl_shuf<T>(K, x, fill, a); } \
  MSL_FN T F(T x, T fill, ushort a, ushort m) { return __msl_shuf<T>(K, x, fill, a, m); }
#define MSL_FIRST1(F, K, T) MSL_FN T F(T x) { return __msl_shuf<T>(K, x, x, 0); }
#define MSL_TYPES(M, F, K) M(F, K, char) M(F, K, uchar) M(F, K, short) M(F, K, ushort) M(F, K, int) M(F, K, \
  uint) M(F, K, half) M(F, K, float) \
  M(F, K, char2) M(F, K, uchar2) M(F, K, short2) M(F, K, ushort2) M(F, K, int2) M(F, K, uint2) M(F, K, half2) M(F, \
    K, float2) \
  M(F, K, char4) M(F, K, uchar4) M(F, K, short4) M(F, K, ushort4) M(F, K, int4) M(F, K, uint4) M(F, K, half4) M(F, \
    K, float4)
MSL_TYPES(MSL_SHUF1, simd_shuffle, 0) MSL_TYPES(MSL_SHUF1, simd_broadcast, 0)
  MSL_TYPES(MSL_SHUF1, simd_shuffle_up, 1) MSL_TYPES(MSL_SHUF1, simd_shuffle_down, 2)
MSL_TYPES(MSL_SHUF1, simd_shuffle_xor, 3) MSL_TYPES(MSL_SHUF1, simd_shuffle_rotate_up, 4)
  MSL_TYPES(MSL_SHUF1, simd_shuffle_rotate_down, 5)
MSL_TYPES(MSL_FILL1, simd_shuffle_and_fill_up, 6) MSL_TYPES(MSL_FILL1, simd_shuffle_and_fill_down, 7)
  MSL_TYPES(MSL_FIRST1, simd_broadcast_first, 8)
MSL_TYPES(MSL_SHUF1, quad_shuffle, 16) MSL_TYPES(MSL_SHUF1, quad_broadcast, 16)
  MSL_TYPES(MSL_SHUF1, quad_shuffle_up, 17) MSL_TYPES(MSL_SHUF1, quad_shuffle_down, 18)
  MSL_TYPES(MSL_SHUF1, quad_shuffle_xor, 19)
MSL_TYPES(MSL_SHUF1, quad_shuffle_rotate_up, 20) MSL_TYPES(MSL_SHUF1, quad_shuffle_rotate_down, 21)
  MSL_TYPES(MSL_FIRST1, quad_broadcast_first, 24)

struct simd_vote {
  typedef ulong vote_t;
  vote_t v;
  explicit constexpr simd_vote(vote_t x = 0) : v(x) {}
  explicit operator vote_t() const { return v; }
  bool all() const { return (uint)v == 0xffffffffu; }
  bool any() const { return v != 0; }
};
MSL_FN bool simd_all(bool p) { return __msl_vote(0, p) != 0; }
MSL_FN bool simd_any(bool p) { return __msl_vote(1, p) != 0; }
MSL_FN simd_vote simd_ballot(bool p) { return simd_vote(__msl_vote(2, p)); }
MSL_FN simd_vote simd_active_threads_mask() { return simd_vote(__msl_vote(2, 1)); }
MSL_FN bool simd_is_first() { return __msl_vote(3, 1) != 0; }
MSL_FN bool simd_is_helper_thread() { return false; }
MSL_FN bool quad_all(bool p) { return __msl_vote(16, p) != 0; }
MSL_FN bool quad_any(bool p) { return __msl_vote(17, p) != 0; }

} // namespace metal

// What MLX's bf16_math.h calls.
#define __metal_simd_broadcast metal::simd_broadcast
#define __metal_simd_shuffle metal::simd_shuffle
#define __metal_simd_shuffle_and_fill_down metal::simd_shuffle_and_fill_down
#define __metal_simd_shuffle_and_fill_up metal::simd_shuffle_and_fill_up
#define __metal_simd_shuffle_down metal::simd_shuffle_down
#define __metal_simd_shuffle_up metal::simd_shuffle_up
#define __metal_simd_shuffle_rotate_down metal::simd_shuffle_rotate_down
#define __metal_simd_shuffle_rotate_up metal::simd_shuffle_rotate_up
#define __metal_simd_shuffle_xor metal::simd_shuffle_xor
#define __metal_simd_max metal::simd_max
#define __metal_simd_min metal::simd_min
#define __metal_simd_sum metal::simd_sum
#define __metal_simd_product metal::simd_product
#define __metal_simd_prefix_exclusive_product metal::simd_prefix_exclusive_product
#define __metal_simd_prefix_exclusive_sum metal::simd_prefix_exclusive_sum
#define __metal_simd_prefix_inclusive_product metal::simd_prefix_inclusive_product
#define __metal_simd_prefix_inclusive_sum metal::simd_prefix_inclusive_sum
#define __metal_simd_xor(x) (x) /* bit operations do not exist for floating point */
