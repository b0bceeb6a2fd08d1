// The part of the Metal standard library that compute kernels use.
#pragma once
#include "msl_language.h"
#include "msl_traits.h"
#include "msl_bfloat.h"
#include "msl_vector.h"
#include "msl_math.h"
#include "msl_simd.h"
#include "msl_matrix.h"
#include "msl_atomic.h"

// as_type is a global name in Metal.
template <typename To, typename From> MSL_CFN To as_type(From f) {
  static_assert(sizeof(To) == sizeof(From), "as_type: the sizes differ");
  return __builtin_bit_cast(To, f);
}

// Function constants cannot be set through mx.fast.metal_kernel; a header that was written for a metallib may still
// declare some. They read as 0 unless specialised before the header is included.
template <int N> struct __msl_function_constant { static constexpr constant int value = 0; };

// Tells the threadgroup variables of a kernel apart; rewrite.py writes it.
#define MSL_TG_ID(N) (((uint)__LINE__ << 8) + (N))

// The results of some conditional operators; rewrite.py writes it.
template <typename T> MSL_CFN metal::remove_cv_t<T> __msl_rv(const T& x) { return x; }
template <typename T> MSL_CFN metal::remove_cv_t<T> __msl_rv(const __constant T& x) { return x; }
