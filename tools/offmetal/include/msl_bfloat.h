// bfloat, and the limits of all scalar types.
#pragma once
// bfloat is a class, not clang's __bf16, as Metal's rules are stricter: it converts implicitly to float only, and
// float or half convert to it only explicitly. (`out[i] = some_float` with a bfloat output is the most common reason
// why a kernel that was tested with half does not compile.)
struct bfloat {
  ushort __bits;
  bfloat() = default;
  template <typename U, metal::enable_if_t<metal::__msl_is_fp<U> && !__is_same(U, bfloat), int> = 0>
    MSL_CFN explicit bfloat(U u) : __bits(round((float)u)) {}
  template <typename U, metal::enable_if_t<__is_integral(U), char> = 0> MSL_CFN bfloat(U u) : __bits(round((float)u)) {}
  template <int = 0> MSL_CFN bfloat(const __constant bfloat& o) : __bits(o.__bits) {}
  MSL_CFN static ushort round(float f) {
    uint u = __builtin_bit_cast(uint, f);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (ushort)((u >> 16) | 64);
    return (ushort)((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
  }
  template <typename U, metal::enable_if_t<__is_same(U, float), int> = 0>
    MSL_CFN operator U() const { return __builtin_bit_cast(float, (uint)__bits << 16); }
  template <typename U, metal::enable_if_t<__is_same(U, float), int> = 0>
    MSL_CFN operator U() const __constant { return __builtin_bit_cast(float, (uint)__bits << 16); }
  template <typename U, metal::enable_if_t<__is_same(U, half) || __is_integral(U), char> = 0>
    MSL_CFN explicit operator U() const { return (U)__builtin_bit_cast(float, (uint)__bits << 16); }
  template <typename U, metal::enable_if_t<__is_same(U, half) || __is_integral(U), char> = 0>
    MSL_CFN explicit operator U() const __constant { return (U)__builtin_bit_cast(float, (uint)__bits << 16); }
  template <typename U> MSL_FN bfloat& operator+=(U u) { return *this = bfloat((float)*this + (float)u); }
  template <typename U> MSL_FN bfloat& operator-=(U u) { return *this = bfloat((float)*this - (float)u); }
  template <typename U> MSL_FN bfloat& operator*=(U u) { return *this = bfloat((float)*this * (float)u); }
  template <typename U> MSL_FN bfloat& operator/=(U u) { return *this = bfloat((float)*this / (float)u); }
};
MSL_CFN bfloat operator-(bfloat a) { return bfloat(-(float)a); }
#define MSL_BF(OP) \
  MSL_CFN bfloat operator OP(bfloat a, bfloat b) { return bfloat((float)a OP (float)b); } \
  template <typename I, metal::enable_if_t<__is_integral(I), int> = 0> \
    MSL_CFN bfloat operator OP(bfloat a, I b) { return bfloat((float)a OP (float)b); } \
  template <typename I, metal::enable_if_t<__is_integral(I), int> = 0> \
    MSL_CFN bfloat operator OP(I a, bfloat b) { return bfloat((float)a OP (float)b); }
MSL_BF(+) MSL_BF(-) MSL_BF(*) MSL_BF(/)
#undef MSL_BF
#define MSL_BF(OP) \
  MSL_CFN bool operator OP(bfloat a, bfloat b) { return (float)a OP (float)b; } \
  template <typename I, metal::enable_if_t<__is_integral(I), int> = 0> \
    MSL_CFN bool operator OP(bfloat a, I b) { return (float)a OP (float)b; } \
  template <typename I, metal::enable_if_t<__is_integral(I), int> = 0> \
    MSL_CFN bool operator OP(I a, bfloat b) { return (float)a OP (float)b; }
MSL_BF(==) MSL_BF(!=) MSL_BF(<) MSL_BF(>) MSL_BF(<=) MSL_BF(>=)
#undef MSL_BF

namespace metal {
template <typename T> struct numeric_limits { static constexpr constant bool is_specialized = false; };
#define MSL_INT_LIMITS(T, LO, HI) \
  template <> struct numeric_limits<T> { \
    static constexpr constant bool is_specialized = true, is_integer = true, is_signed = (LO < 0); \
    static constexpr constant int digits = sizeof(T) * 8 - (LO < 0); \
    static constexpr T min() { return LO; } static constexpr T max() { return HI; } \
      static constexpr T lowest() { return LO; } \
    static constexpr T infinity() { return 0; } static constexpr T quiet_NaN() { return 0; } };
MSL_INT_LIMITS(bool, 0, 1) MSL_INT_LIMITS(char, -128, 127) MSL_INT_LIMITS(signed char, -128, 127)
  MSL_INT_LIMITS(uchar, 0, 255)
MSL_INT_LIMITS(short, -32768, 32767) MSL_INT_LIMITS(ushort, 0, 65535)
MSL_INT_LIMITS(int, (-2147483647 - 1), 2147483647) MSL_INT_LIMITS(uint, 0u, 4294967295u)
MSL_INT_LIMITS(long, (-9223372036854775807L - 1), 9223372036854775807L)
  MSL_INT_LIMITS(ulong, 0ul, 18446744073709551615ul)
#define MSL_FP_LIMITS(T, LO, HI, EPS, DIG) \
  template <> struct numeric_limits<T> { \
    static constexpr constant bool is_specialized = true, is_integer = false, is_signed = true; \
    static constexpr constant int digits = DIG; \
    static constexpr T min() { return (T)(LO); } static constexpr T max() { return (T)(HI); } \
      static constexpr T lowest() { return (T)(-(HI)); } \
    static constexpr T epsilon() { return (T)(EPS); } \
    static constexpr T infinity() { return (T)__builtin_inff(); } \
      static constexpr T quiet_NaN() { return (T)__builtin_nanf(""); } \
    static constexpr T signaling_NaN() { return (T)__builtin_nanf(""); } };
MSL_FP_LIMITS(float, 1.175494351e-38f, 3.402823466e+38f, 1.192092896e-07f, 24)
MSL_FP_LIMITS(half, 6.103515625e-05f, 65504.0f, 0.0009765625f, 11)
MSL_FP_LIMITS(bfloat, 1.175494351e-38f, 3.3895313892515355e38f, 0.0078125f, 8)
} // namespace metal
