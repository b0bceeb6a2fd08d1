// The language: address spaces, words, scalar types and the functions that the runtime offers.
//
// Kernels are compiled as "C++ for OpenCL" (clang -x clcpp), not as plain C++: it is the only language of an
// unmodified clang with Metal's address spaces in its type system (device, constant, threadgroup and thread pointers
// are distinct types, member functions can be qualified with them), and it forbids what Metal forbids: virtual
// functions, exceptions, function pointers, the C++ library, double. On x86-64 and aarch64 each address space is the
// ordinary one, so the object code runs as it is and can be instrumented.
#pragma once
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#pragma clang diagnostic ignored "-Wunknown-pragmas"
#pragma clang diagnostic ignored "-Wunknown-attributes"

#define __METAL__ 1
#ifndef __METAL_VERSION__
#define __METAL_VERSION__ 320
#endif
#define __METAL_MACOS__ 1
#define __HAVE_BFLOAT__ 1

// ---- address spaces
#define device __global
#define constant __constant
#define threadgroup __local
#define thread __private
#define kernel  // kernels are plain functions here; __msl_entry calls them
// OpenCL reserves words that MSL leaves to the user.
#define global msl_user_global
#define local msl_user_local
#define generic msl_user_generic
#define pipe msl_user_pipe

#define METAL_FUNC inline __attribute__((__always_inline__))
#define METAL_CONST static constant constexpr const
#define MSL_FN inline __attribute__((__always_inline__))
#define MSL_CFN inline constexpr __attribute__((__always_inline__))

#define __METAL_MAYBE_FAST_MATH__ false
#define __METAL_FAST_MATH__ true
#define __METAL_PRECISE_MATH__ false

// ---- scalar types
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;
typedef unsigned long size_t;
typedef long ptrdiff_t;
typedef unsigned long uintptr_t;
typedef long intptr_t;
struct bfloat;

#define INFINITY (__builtin_inff())
#define NAN (__builtin_nanf(""))
#define MAXFLOAT (3.402823466e+38f)
#define FLT_MAX (3.402823466e+38f)
#define FLT_MIN (1.175494351e-38f)
#define FLT_EPSILON (1.192092896e-07f)
#define HALF_MAX ((half)65504.0f)
#define HUGE_VALF (__builtin_inff())
#define INT_MAX 2147483647
#define INT_MIN (-INT_MAX - 1)
#define UINT_MAX 0xffffffffu
#define SHRT_MAX 32767
#define USHRT_MAX 65535
#define CHAR_BIT 8
#define M_E_F 2.71828182845904523536f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LOG10E_F 0.43429448190325182765f
#define M_LN2_F 0.69314718055994530942f
#define M_LN10_F 2.30258509299404568402f
#define M_PI_F 3.14159265358979323846f
#define M_PI_2_F 1.57079632679489661923f
#define M_1_PI_F 0.31830988618379067154f
#define M_2_PI_F 0.63661977236758134308f
#define M_SQRT2_F 1.41421356237309504880f
#define M_SQRT1_2_F 0.70710678118654752440f

// ---- the runtime
// Everything that crosses threads goes through these functions. They are convergent (no code motion across control
// flow) and nomerge (each call site keeps its own return address, by which the runtime tells sites apart).
#define MSL_RT extern "C" __attribute__((convergent, nomerge, nothrow))
MSL_RT void __msl_reduce(uint op, uint type, uint n, const void* in, void* out);
MSL_RT void __msl_shuffle(uint kind, uint bytes, const void* data, const void* fill, uint arg, uint modulo, void* out);
MSL_RT ulong __msl_vote(uint kind, uint pred);
MSL_RT void __msl_mma(uint td, uint ta, uint tb, uint tc, void* d, const void* a, const void* b, const void* c);
MSL_RT void __msl_barrier(uint scope, uint flags);
MSL_RT uint __msl_atomic(uint op, uint type, volatile void* p, const void* v, void* expected, void* out);
MSL_RT void* __msl_tg_alloc(const __constant char* name, uint id, ulong bytes, uint align);
MSL_RT uint __msl_lane(void);
extern "C" void* memcpy(void*, const void*, size_t);
