// 8 x 8 matrices of a SIMD-group.
#pragma once

namespace metal {
// Two elements per lane, at the place that Apple's GPUs have them (MLX's steel kernels rely on it): lane -> (row, first
// column).
template <typename T, int C, int R> struct simdgroup_matrix {
  static_assert(C == 8 && R == 8, "only 8x8 simdgroup matrices exist");
  typedef vec<T, 2> storage_type;
  storage_type __e;
  simdgroup_matrix() = default;
  MSL_FN explicit simdgroup_matrix(T d) { uint r, c; __rc(r, c);
    __e = storage_type(r == c ? d : T(0), r == c + 1 ? d : T(0)); }
  MSL_FN thread storage_type& thread_elements() { return *(thread storage_type*)&__e; }
  MSL_FN const thread storage_type& thread_elements() const { return *(const thread storage_type*)&__e; }
  MSL_FN static void __rc(thread uint& r, thread uint& c) {
    uint lane = __msl_lane(), q = lane / 4;
    r = (q & 4) + ((lane / 2) % 4);
    c = (q & 2) * 2 + (lane % 2) * 2;
  }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;
template <typename T, int C, int R = C>
  MSL_FN simdgroup_matrix<T, C, R> make_filled_simdgroup_matrix(T v) { simdgroup_matrix<T, C, R> m;
  m.__e = vec<T, 2>(v); return m; }

#define MSL_MAT_MEM(AS) \
  template <typename T, int C, int R> \
    MSL_FN void simdgroup_load(thread simdgroup_matrix<T, C, R>& d, const AS T* src, ulong elements_per_row = C, \
    vec<ulong, 2> origin = vec<ulong, 2>(0), bool transpose = false) { \
    uint r, c; simdgroup_matrix<T, C, R>::__rc(r, c); \
    const AS T* p = src + origin.y * elements_per_row + origin.x; \
    d.__e = transpose ? vec<T, 2>(p[c * elements_per_row + r], p[(c + 1) * elements_per_row + r]) \
      : vec<T, 2>(p[r * elements_per_row + c], p[r * elements_per_row + c + 1]); \
  } \
  template <typename T, int C, int R> \
    MSL_FN void simdgroup_store(thread simdgroup_matrix<T, C, R>& s, AS T* dst, ulong elements_per_row = C, \
    vec<ulong, 2> origin = vec<ulong, 2>(0), bool transpose = false) { \
    uint r, c; simdgroup_matrix<T, C, R>::__rc(r, c); \
    AS T* p = dst + origin.y * elements_per_row + origin.x; \
    if (transpose) { p[c * elements_per_row + r] = s.__e.x; p[(c + 1) * elements_per_row + r] = s.__e.y; } \
    else { p[r * elements_per_row + c] = s.__e.x; p[r * elements_per_row + c + 1] = s.__e.y; } \
  }
MSL_MAT_MEM(device) MSL_MAT_MEM(threadgroup)

template <typename TD, typename TA, typename TB, typename TC>
MSL_FN void simdgroup_multiply_accumulate(thread simdgroup_matrix<TD, 8, 8>& d,
  thread simdgroup_matrix<TA, 8, 8>& a, thread simdgroup_matrix<TB, 8, 8>& b, thread simdgroup_matrix<TC, 8, 8>& c) {
  __msl_mma(__msl_code<TD>::v, __msl_code<TA>::v, __msl_code<TB>::v, __msl_code<TC>::v, &d.__e, &a.__e, &b.__e, &c.__e);
}
template <typename TD, typename TA, typename TB>
MSL_FN void simdgroup_multiply(thread simdgroup_matrix<TD, 8, 8>& d, thread simdgroup_matrix<TA, 8, 8>& a,
  thread simdgroup_matrix<TB, 8, 8>& b) {
  vec<TD, 2> z = vec<TD, 2>((TD)0.0f);
  __msl_mma(__msl_code<TD>::v, __msl_code<TA>::v, __msl_code<TB>::v, __msl_code<TD>::v, &d.__e, &a.__e, &b.__e, &z);
}
template <typename T>
  MSL_FN simdgroup_matrix<T, 8, 8> operator*(simdgroup_matrix<T, 8, 8> a, simdgroup_matrix<T, 8, 8> b) {
  simdgroup_matrix<T, 8, 8> d; simdgroup_multiply(d, a, b); return d; }
} // namespace metal
