// Math, integer, relational and geometric functions.
// Overloads are per type, not templates, so that calls which are ambiguous on
// Metal, e.g. max(float, 0), are ambiguous here too. fast:: and precise:: have
// the same (host libm) accuracy; a half function rounds the float result once.
#pragma once

// The names MLX's bf16_math.h builds its bfloat overloads from.
#define MSL_M1(N, E) MSL_FN float __metal_##N(float x, bool = false) { return E; }
#define MSL_M2(N, E) MSL_FN float __metal_##N(float x, float y, bool = false) { return E; }
#define MSL_M3(N, E) MSL_FN float __metal_##N(float x, float y, float z, bool = false) { return E; }
MSL_M1(fabs, __builtin_fabsf(x)) MSL_M1(acos, __builtin_acosf(x)) MSL_M1(acosh, __builtin_acoshf(x))
MSL_M1(asin, __builtin_asinf(x)) MSL_M1(asinh, __builtin_asinhf(x)) MSL_M1(atan, __builtin_atanf(x))
  MSL_M1(atanh, __builtin_atanhf(x))
MSL_M1(ceil, __builtin_ceilf(x)) MSL_M1(cos, __builtin_cosf(x)) MSL_M1(cosh, __builtin_coshf(x))
  MSL_M1(cospi, __builtin_cosf(x * M_PI_F))
MSL_M1(exp, __builtin_expf(x)) MSL_M1(exp2, __builtin_exp2f(x)) MSL_M1(exp10, __builtin_powf(10.0f, x))
  MSL_M1(floor, __builtin_floorf(x))
MSL_M1(fract, (__builtin_fminf(x - __builtin_floorf(x), 0x1.fffffep-1f))) MSL_M1(log, __builtin_logf(x))
  MSL_M1(log2, __builtin_log2f(x)) MSL_M1(log10, __builtin_log10f(x))
MSL_M1(rint, __builtin_rintf(x)) MSL_M1(round, __builtin_roundf(x)) MSL_M1(rsqrt, (1.0f / __builtin_sqrtf(x)))
  MSL_M1(sin, __builtin_sinf(x))
MSL_M1(sinh, __builtin_sinhf(x)) MSL_M1(sinpi, __builtin_sinf(x * M_PI_F)) MSL_M1(sqrt, __builtin_sqrtf(x))
  MSL_M1(tan, __builtin_tanf(x))
MSL_M1(tanh, __builtin_tanhf(x)) MSL_M1(tanpi, __builtin_tanf(x * M_PI_F)) MSL_M1(trunc, __builtin_truncf(x))
MSL_M1(saturate, (__builtin_fminf(__builtin_fmaxf(x, 0.0f), 1.0f)))
  MSL_M1(sign, (x > 0 ? 1.0f : x < 0 ? -1.0f : x == x ? x : 0.0f))
MSL_M2(atan2, __builtin_atan2f(x, y)) MSL_M2(divide, (x / y)) MSL_M2(fmax, __builtin_fmaxf(x, y))
  MSL_M2(fmin, __builtin_fminf(x, y))
MSL_M2(fmod, __builtin_fmodf(x, y)) MSL_M2(pow, __builtin_powf(x, y)) MSL_M2(powr, __builtin_powf(x, y))
  MSL_M2(nextafter, __builtin_nextafterf(x, y))
MSL_M2(copysign, __builtin_copysignf(x, y)) MSL_M2(fdim, __builtin_fdimf(x, y)) MSL_M2(step, (y < x ? 0.0f : 1.0f))
MSL_M3(fma, __builtin_fmaf(x, y, z)) MSL_M3(fmax3, __builtin_fmaxf(__builtin_fmaxf(x, y), z))
  MSL_M3(fmin3, __builtin_fminf(__builtin_fminf(x, y), z))
MSL_M3(fmedian3, (__builtin_fmaxf(__builtin_fminf(x, y), __builtin_fminf(__builtin_fmaxf(x, y), z))))
  MSL_M3(mix, (x + (y - x) * z))
MSL_M3(clamp, (__builtin_fminf(__builtin_fmaxf(x, y), z)))
MSL_FN float __metal_smoothstep(float a, float b, float x, bool = false) {
  float t = __metal_saturate((x - a) / (b - a)); return t * t * (3.0f - 2.0f * t); }
MSL_FN float __metal_ldexp(float x, int k, bool = false) { return __builtin_ldexpf(x, k); }
MSL_FN float __metal_frexp(float x, int* e) {
  int k = 0;
  if (x == 0.0f || x - x != 0.0f) { *e = 0; return x; }
  float a = __builtin_fabsf(x);
  while (a >= 1.0f) { a *= 0.5f; k++; }
  while (a < 0.5f) { a *= 2.0f; k--; }
  *e = k;
  return __builtin_copysignf(a, x);
}
MSL_FN ushort __metal_get_simdgroup_size(ushort) { return 32; }
MSL_FN ushort __metal_get_thread_index_in_simdgroup(ushort) { return (ushort)__msl_lane(); }

#define MSL_V1(F, T) template <int N> MSL_FN vec<T, N> F(vec<T, N> x) { MSL_EACH(N, F(x.x), F(x.y), F(x.z), F(x.w)) }
#define MSL_V2(F, T) \
  template <int N> \
  MSL_FN vec<T, N> F(vec<T, N> x, vec<T, N> y) { MSL_EACH(N, F(x.x, y.x), F(x.y, y.y), F(x.z, y.z), F(x.w, y.w)) }
#define MSL_V3(F, T) \
  template <int N> \
  MSL_FN vec<T, N> F(vec<T, N> x, vec<T, N> y, vec<T, N> z) { \
  MSL_EACH(N, F(x.x, y.x, z.x), F(x.y, y.y, z.y), F(x.z, y.z, z.z), F(x.w, y.w, z.w)) }
#define MSL_D1(F, B) MSL_FN half F(half x) { return (half)__metal_##B((float)x); } \
  MSL_FN float F(float x) { return __metal_##B(x); } MSL_V1(F, half) MSL_V1(F, float)
#define MSL_D2(F, B) MSL_FN half F(half x, half y) { return (half)__metal_##B((float)x, (float)y); } \
  MSL_FN float F(float x, float y) { return __metal_##B(x, y); } MSL_V2(F, half) MSL_V2(F, float)
#define MSL_D3(F, B) \
  MSL_FN half F(half x, half y, half z) { return (half)__metal_##B((float)x, (float)y, (float)z); } \
  MSL_FN float F(float x, float y, float z) { return __metal_##B(x, y, z); } MSL_V3(F, half) MSL_V3(F, float)
#define MSL_FP_FUNCS \
  MSL_D1(fabs, fabs) MSL_D1(abs, fabs) MSL_D1(acos, acos) MSL_D1(acosh, acosh) MSL_D1(asin, asin) \
    MSL_D1(asinh, asinh) MSL_D1(atan, atan) MSL_D1(atanh, atanh) \
  MSL_D1(ceil, ceil) MSL_D1(cos, cos) MSL_D1(cosh, cosh) MSL_D1(cospi, cospi) MSL_D1(exp, exp) MSL_D1(exp2, exp2) \
    MSL_D1(exp10, exp10) MSL_D1(floor, floor) \
  MSL_D1(fract, fract) MSL_D1(log, log) MSL_D1(log2, log2) MSL_D1(log10, log10) MSL_D1(rint, rint) \
    MSL_D1(round, round) MSL_D1(rsqrt, rsqrt) MSL_D1(sin, sin) \
  MSL_D1(sinh, sinh) MSL_D1(sinpi, sinpi) MSL_D1(sqrt, sqrt) MSL_D1(tan, tan) MSL_D1(tanh, tanh) \
    MSL_D1(tanpi, tanpi) MSL_D1(trunc, trunc) MSL_D1(saturate, saturate) MSL_D1(sign, sign) \
  MSL_D2(atan2, atan2) MSL_D2(divide, divide) MSL_D2(fmax, fmax) MSL_D2(fmin, fmin) MSL_D2(max, fmax) \
    MSL_D2(min, fmin) MSL_D2(fmod, fmod) MSL_D2(pow, pow) MSL_D2(powr, powr) \
  MSL_D2(nextafter, nextafter) MSL_D2(copysign, copysign) MSL_D2(fdim, fdim) MSL_D2(step, step) \
  MSL_D3(fma, fma) MSL_D3(fmax3, fmax3) MSL_D3(fmin3, fmin3) MSL_D3(max3, fmax3) MSL_D3(min3, fmin3) \
    MSL_D3(median3, fmedian3) MSL_D3(fmedian3, fmedian3) MSL_D3(mix, mix) MSL_D3(clamp, clamp) \
    MSL_D3(smoothstep, smoothstep) \
  MSL_FN half ldexp(half x, int k) { return (half)__metal_ldexp((float)x, k); } \
    MSL_FN float ldexp(float x, int k) { return __metal_ldexp(x, k); } \
  MSL_FN half frexp(half x, thread int& e) { int t; float m = __metal_frexp((float)x, &t); e = t; return (half)m; } \
    MSL_FN float frexp(float x, thread int& e) { int t; float m = __metal_frexp(x, &t); e = t; return m; } \
  MSL_FN half modf(half x, thread half& i) { i = trunc(x); return (half)(x - i); } \
    MSL_FN float modf(float x, thread float& i) { i = trunc(x); return x - i; } \
  MSL_FN half sincos(half x, thread half& c) { c = cos(x); return sin(x); } \
    MSL_FN float sincos(float x, thread float& c) { c = cos(x); return sin(x); }

namespace metal {
MSL_FP_FUNCS
namespace fast { MSL_FP_FUNCS }
namespace precise { MSL_FP_FUNCS }

#define MSL_INT_FUNCS(T) \
  MSL_FN T max(T x, T y) { return x > y ? x : y; } MSL_FN T min(T x, T y) { return x < y ? x : y; } \
  MSL_FN T clamp(T x, T lo, T hi) { return min(max(x, lo), hi); } \
    MSL_FN T max3(T x, T y, T z) { return max(max(x, y), z); } \
    MSL_FN T min3(T x, T y, T z) { return min(min(x, y), z); } \
  MSL_FN T median3(T x, T y, T z) { return max(min(x, y), min(max(x, y), z)); } \
  MSL_FN T popcount(T x) { return (T)__builtin_popcountl((ulong)(make_unsigned_t<T>)x); } \
  MSL_FN T clz(T x) { \
    return (T)(x == 0 ? 8 * sizeof(T) : __builtin_clzl((ulong)(make_unsigned_t<T>)x) - (64 - 8 * sizeof(T))); } \
  MSL_FN T ctz(T x) { return (T)(x == 0 ? 8 * sizeof(T) : __builtin_ctzl((ulong)(make_unsigned_t<T>)x)); } \
  MSL_FN T rotate(T v, T i) { typedef make_unsigned_t<T> U; \
    constexpr uint b = 8 * sizeof(T); uint k = (uint)i & (b - 1); U u = (U)v; \
    return (T)(U)(k ? (U)(u << k) | (U)(u >> (b - k)) : u); } \
  MSL_FN T reverse_bits(T v) { typedef make_unsigned_t<T> U; U u = (U)v, r = 0; \
    for (uint i = 0; i < 8 * sizeof(T); i++) { r = (U)((U)(r << 1) | (u & 1)); u = (U)(u >> 1); } return (T)r; } \
  MSL_FN T extract_bits(T x, uint off, uint bits) { if (bits == 0) return 0; \
    constexpr uint b = 8 * sizeof(T); return (T)((T)((make_unsigned_t<T>)x << (b - bits - off)) >> (b - bits)); } \
  MSL_FN T insert_bits(T base, T ins, uint off, uint bits) { typedef make_unsigned_t<T> U; \
    U m = bits >= 8 * sizeof(T) ? (U)~(U)0 : (U)(((U)1 << bits) - 1); \
    return (T)(((U)base & (U)~(U)(m << off)) | (U)(((U)ins & m) << off)); } \
  MSL_FN make_unsigned_t<T> absdiff(T x, T y) { typedef make_unsigned_t<T> U; \
    return x > y ? (U)x - (U)y : (U)y - (U)x; } \
  MSL_FN T addsat(T x, T y) { T r; \
    if (__builtin_add_overflow(x, y, &r)) return (is_signed_v<T> && y < 0) ? numeric_limits<T>::min() \
    : numeric_limits<T>::max(); return r; } \
  MSL_FN T subsat(T x, T y) { T r; \
    if (__builtin_sub_overflow(x, y, &r)) return (is_signed_v<T> && y > 0) || !is_signed_v<T> \
    ? numeric_limits<T>::min() : numeric_limits<T>::max(); return r; } \
  MSL_V2(max, T) MSL_V2(min, T) MSL_V3(clamp, T) MSL_V1(popcount, T) MSL_V1(clz, T) MSL_V1(ctz, T)
MSL_INT_FUNCS(char) MSL_INT_FUNCS(uchar) MSL_INT_FUNCS(short) MSL_INT_FUNCS(ushort) MSL_INT_FUNCS(int)
  MSL_INT_FUNCS(uint) MSL_INT_FUNCS(long) MSL_INT_FUNCS(ulong)
#define MSL_ABS(T) MSL_FN T abs(T x) { return x < 0 ? (T)-x : x; } MSL_V1(abs, T)
MSL_ABS(char) MSL_ABS(short) MSL_ABS(int) MSL_ABS(long)
#define MSL_UABS(T) MSL_FN T abs(T x) { return x; }
MSL_UABS(uchar) MSL_UABS(ushort) MSL_UABS(uint) MSL_UABS(ulong)
MSL_FN int mulhi(int a, int b) { return (int)(((long)a * (long)b) >> 32); }
MSL_FN uint mulhi(uint a, uint b) { return (uint)(((ulong)a * (ulong)b) >> 32); }
MSL_FN int mul24(int a, int b) { return ((a << 8) >> 8) * ((b << 8) >> 8); }
MSL_FN uint mul24(uint a, uint b) { return (a & 0xffffff) * (b & 0xffffff); }
MSL_FN int mad24(int a, int b, int c) { return mul24(a, b) + c; }
MSL_FN uint mad24(uint a, uint b, uint c) { return mul24(a, b) + c; }
MSL_FN uint hadd(uint a, uint b) { return (uint)(((ulong)a + b) >> 1); }
MSL_FN int hadd(int a, int b) { return (int)(((long)a + b) >> 1); }

#define MSL_CLASSIFY(F, E) \
  MSL_FN bool F(float x) { return E; } MSL_FN bool F(half h) { float x = (float)h; return E; } \
    MSL_FN bool F(bfloat h) { float x = (float)h; return E; } \
  template <typename T, int N> MSL_FN vec<bool, N> F(vec<T, N> v) { MSL_EACH(N, F(v.x), F(v.y), F(v.z), F(v.w)) }
MSL_CLASSIFY(isnan, __builtin_isnan(x)) MSL_CLASSIFY(isinf, __builtin_isinf(x))
  MSL_CLASSIFY(isfinite, __builtin_isfinite(x))
MSL_CLASSIFY(isnormal, __builtin_isnormal(x)) MSL_CLASSIFY(signbit, (__builtin_bit_cast(int, x) < 0))

MSL_FN bool any(bool x) { return x; }
MSL_FN bool all(bool x) { return x; }
template <int N>
  MSL_FN bool any(vec<bool, N> v) { bool r = false; for (int i = 0; i < N; i++) r = r || v[i]; return r; }
template <int N> MSL_FN bool all(vec<bool, N> v) { bool r = true; for (int i = 0; i < N; i++) r = r && v[i]; return r; }
#define MSL_SELECT(T) MSL_FN T select(T a, T b, bool c) { return c ? b : a; }
MSL_SELECT(char) MSL_SELECT(uchar) MSL_SELECT(short) MSL_SELECT(ushort) MSL_SELECT(int) MSL_SELECT(uint)
  MSL_SELECT(long) MSL_SELECT(ulong) MSL_SELECT(half) MSL_SELECT(float) MSL_SELECT(bfloat) MSL_SELECT(bool)
template <typename T, int N>
  MSL_FN vec<T, N> select(vec<T, N> a, vec<T, N> b, vec<bool, N> c) { vec<T, N> r;
  for (int i = 0; i < N; i++) r[i] = c[i] ? b[i] : a[i]; return r; }
template <typename T, int N> MSL_FN vec<T, N> select(vec<T, N> a, vec<T, N> b, bool c) { return c ? b : a; }

template <typename T, int N>
  MSL_FN T dot(vec<T, N> a, vec<T, N> b) { T s = a[0] * b[0]; for (int i = 1; i < N; i++) s = (T)(s + a[i] * b[i]);
  return s; }
template <typename T, int N> MSL_FN T length_squared(vec<T, N> a) { return dot(a, a); }
template <typename T, int N> MSL_FN T length(vec<T, N> a) { return sqrt(dot(a, a)); }
template <typename T, int N> MSL_FN T distance(vec<T, N> a, vec<T, N> b) { return length(a - b); }
template <typename T, int N> MSL_FN vec<T, N> normalize(vec<T, N> a) { return a * rsqrt(dot(a, a)); }
template <typename T>
  MSL_FN vec<T, 3> cross(vec<T, 3> a, vec<T, 3> b) {
  return vec<T, 3>(a.y * b.z - a.z * b.y, a.z * b.x - a.x * b.z, a.x * b.y - a.y * b.x); }

MSL_FN vec<float, 4> unpack_unorm4x8_to_float(uint x) {
  return vec<float, 4>((x & 255) / 255.0f, ((x >> 8) & 255) / 255.0f, ((x >> 16) & 255) / 255.0f,
  (x >> 24) / 255.0f); }
MSL_FN vec<half, 4> unpack_unorm4x8_to_half(uint x) { return vec<half, 4>(unpack_unorm4x8_to_float(x)); }
template <typename T> struct uniform { T __v; uniform() = default; MSL_CFN uniform(T v) : __v(v) {}
  MSL_CFN operator T() const { return __v; } };
template <typename T> MSL_CFN uniform<T> make_uniform(T v) { return uniform<T>(v); }
template <typename T> MSL_FN void swap(thread T& a, thread T& b) { T t = a; a = b; b = t; }
template <typename T, size_t N> struct array { T __elems[N]; MSL_FN T& operator[](size_t i) { return __elems[i]; }
  MSL_FN const T& operator[](size_t i) const { return __elems[i]; } constexpr size_t size() const { return N; } };
} // namespace metal
