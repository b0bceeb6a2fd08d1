// What a SIMD-group computes together: reductions, scans, shuffles, votes and products of 8 x 8 matrices. Kernels give
// the codes below through include/msl_simd.h.
#include <cstring>

#include "machine.h"

namespace offmetal {

constexpr uint32_t kQuad = 16;  // added to the code of a reduction, shuffle or vote among four lanes

template <typename T> static T load(const void* p, uint32_t i) {
  T value;
  memcpy(&value, (const char*)p + i * sizeof(T), sizeof(T));
  return value;
}
template <typename T> static void store(void* p, uint32_t i, T value) {
  memcpy((char*)p + i * sizeof(T), &value, sizeof(T));
}
static bool has(uint32_t mask, uint32_t lane) { return mask >> lane & 1; }

// ---- element types ------------------------------------------------------------------------------------------------

struct Half { uint16_t bits; };
struct Bfloat { uint16_t bits; };

static uint32_t bits_of(float f) { return load<uint32_t>(&f, 0); }
static float float_of(uint32_t bits) { return load<float>(&bits, 0); }

static float value(float f) { return f; }
static float value(Bfloat b) { return float_of((uint32_t)b.bits << 16); }
static float value(Half h) {
  uint32_t sign = (uint32_t)(h.bits & 0x8000) << 16, exponent = h.bits >> 10 & 31, fraction = h.bits & 1023;
  if (exponent == 31) return float_of(sign | 0x7f800000u | fraction << 13);
  if (exponent) return float_of(sign | (exponent + 112) << 23 | fraction << 13);
  return (sign ? -1.0f : 1.0f) * (float)fraction * 0x1p-24f;
}

template <typename F> static F rounded(float f);
template <> float rounded<float>(float f) { return f; }
template <> Bfloat rounded<Bfloat>(float f) {
  uint32_t u = bits_of(f);
  if ((u & 0x7fffffff) > 0x7f800000) return {(uint16_t)(u >> 16 | 64)};  // a NaN stays one
  return {(uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
template <> Half rounded<Half>(float f) {
  uint32_t u = bits_of(f), magnitude = u & 0x7fffffff;
  uint16_t sign = u >> 16 & 0x8000;
  if (magnitude > 0x7f800000) return {(uint16_t)(sign | 0x7e00)};
  if (magnitude >= 0x477ff000) return {(uint16_t)(sign | 0x7c00)};
  if (magnitude < 0x38800000)  // subnormal: the adder rounds
    return {(uint16_t)(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000))};
  uint32_t up = magnitude + 0xfff + (magnitude >> 13 & 1);
  return {(uint16_t)(sign | (up - 0x38000000) >> 13)};
}

template <typename T> struct Arithmetic {  // integers wrap around
  static T sum(T a, T b) { return (T)((uint32_t)a + (uint32_t)b); }
  static T product(T a, T b) { return (T)((uint32_t)a * (uint32_t)b); }
  static T min(T a, T b) { return a < b ? a : b; }
  static T max(T a, T b) { return a > b ? a : b; }
  static T bitwise(uint32_t op, T a, T b);
  static T number(int n) { return (T)n; }
};
template <typename F> struct FloatArithmetic {  // rounded after each operation
  static F sum(F a, F b) { return rounded<F>(value(a) + value(b)); }
  static F product(F a, F b) { return rounded<F>(value(a) * value(b)); }
  static F min(F a, F b) { return rounded<F>(__builtin_fminf(value(a), value(b))); }
  static F max(F a, F b) { return rounded<F>(__builtin_fmaxf(value(a), value(b))); }
  static F bitwise(uint32_t, F a, F) { return a; }  // the library has none
  static F number(int n) { return rounded<F>((float)n); }
};
template <> struct Arithmetic<float> : FloatArithmetic<float> {};
template <> struct Arithmetic<Half> : FloatArithmetic<Half> {};
template <> struct Arithmetic<Bfloat> : FloatArithmetic<Bfloat> {};

// ---- reductions and scans -----------------------------------------------------------------------------------------

enum Reduction : uint32_t {
  kSum, kProduct, kMin, kMax, kAnd, kOr, kXor,
  kSumBefore, kSumUpTo, kProductBefore, kProductUpTo  // scans: exclusive, inclusive
};

template <typename T> T Arithmetic<T>::bitwise(uint32_t op, T a, T b) {
  return op == kAnd ? a & b : op == kOr ? a | b : a ^ b;
}

template <typename T> static T combine(uint32_t op, T a, T b) {
  switch (op) {
    case kSum: return Arithmetic<T>::sum(a, b);
    case kProduct: return Arithmetic<T>::product(a, b);
    case kMin: return Arithmetic<T>::min(a, b);
    case kMax: return Arithmetic<T>::max(a, b);
    default: return Arithmetic<T>::bitwise(op, a, b);
  }
}

template <typename T> static void scan(Lane* lanes, uint32_t mask, uint32_t op, uint32_t component) {
  bool sum = op == kSumBefore || op == kSumUpTo, inclusive = op == kSumUpTo || op == kProductUpTo;
  T so_far = Arithmetic<T>::number(!sum);
  for (uint32_t i = 0; i < kSimd; i++) {
    if (!has(mask, i)) continue;
    T with = combine<T>(sum ? kSum : kProduct, so_far, load<T>(lanes[i].in, component));
    store<T>(lanes[i].out, component, inclusive ? with : so_far);
    so_far = with;
  }
}

// A butterfly over lane distances 1, 2, 4, 8, 16: the order in which Apple's GPUs add.
template <typename T>
static void butterfly(Lane* lanes, uint32_t mask, uint32_t op, uint32_t component, uint32_t width) {
  T now[kSimd], next[kSimd];
  for (uint32_t i = 0; i < kSimd; i++)
    now[i] = has(mask, i) ? load<T>(lanes[i].in, component) : Arithmetic<T>::number(0);
  uint32_t have = mask;  // lanes whose value comes from an active one
  for (uint32_t distance = 1; distance < width; distance <<= 1) {
    uint32_t will_have = 0;
    for (uint32_t i = 0; i < kSimd; i++) {
      uint32_t low = i & ~distance, high = i | distance;
      if (has(have, low) && has(have, high)) next[i] = combine<T>(op, now[low], now[high]);
      else next[i] = now[has(have, low) ? low : high];
      if (has(have, low) || has(have, high)) will_have |= 1u << i;
    }
    memcpy(now, next, sizeof now);
    have = will_have;
  }
  for (uint32_t i = 0; i < kSimd; i++)
    if (has(mask, i)) store<T>(lanes[i].out, component, now[i]);
}

// a: Reduction, b: type, c: components
template <typename T> static void reduce(Lane* lanes, uint32_t mask, const Lane& q) {
  uint32_t op = q.a % kQuad;
  for (uint32_t component = 0; component < q.c; component++) {
    if (op >= kSumBefore) scan<T>(lanes, mask, op, component);
    else butterfly<T>(lanes, mask, op, component, q.a >= kQuad ? 4 : kSimd);
  }
}

static void reduce_any(Lane* lanes, uint32_t mask, const Lane& q) {
  switch (q.b) {
    case 0: return reduce<float>(lanes, mask, q);
    case 1: return reduce<Half>(lanes, mask, q);
    case 2: return reduce<Bfloat>(lanes, mask, q);
    case 3: return reduce<int8_t>(lanes, mask, q);
    case 4: return reduce<uint8_t>(lanes, mask, q);
    case 5: return reduce<int16_t>(lanes, mask, q);
    case 6: return reduce<uint16_t>(lanes, mask, q);
    case 7: return reduce<int32_t>(lanes, mask, q);
    default: return reduce<uint32_t>(lanes, mask, q);
  }
}

// ---- shuffles -----------------------------------------------------------------------------------------------------

enum Shuffle : uint32_t { kLane, kUp, kDown, kXorLane, kRotateUp, kRotateDown, kFillUp, kFillDown, kFirst };

// Where a lane reads, or null: a: Shuffle, b: bytes, c: lane or distance, d: modulo of a fill
static const void* source_of(Lane* lanes, uint32_t mask, uint32_t i) {
  Lane& q = lanes[i];
  uint32_t kind = q.a % kQuad, width = q.a >= kQuad ? 4 : kSimd, first = i / width * width;
  bool filling = kind == kFillUp || kind == kFillDown;
  if (filling && q.d < width) {
    width = q.d;
    first += (i - first) / width * width;
  }
  int64_t own = i - first, distance = q.c, from = own;
  switch (kind) {
    case kLane: from = distance; break;
    case kUp: case kFillUp: from = own - distance; break;
    case kDown: case kFillDown: from = own + distance; break;
    case kXorLane: from = own ^ distance; break;
    case kRotateUp: from = (own + width - distance % width) % width; break;
    case kRotateDown: from = (own + distance) % width; break;
    case kFirst: from = __builtin_ctz(width == 4 ? mask >> first & 15 : mask); break;
  }
  M->current = &q;
  if (from < 0 || from >= width) {
    if (kind == kUp || kind == kDown) return q.in;  // the outer lanes keep their value
    if (filling) {
      from += from < 0 ? (int64_t)width : -(int64_t)width;
      bool there = from >= 0 && from < width && has(mask, first + from);
      return there ? lanes[first + from].in2 : q.in2;
    }
    report(kInactiveLane, q.caller(), "shuffle or broadcast with a lane index outside the SIMD-group");
    return nullptr;
  }
  if (has(mask, first + from)) return lanes[first + from].in;
  report(kInactiveLane, q.caller(), "shuffle or broadcast reads lane %d, which is inactive here", (int)(first + from));
  return nullptr;
}

static void shuffle(Lane* lanes, uint32_t mask) {
  char values[kSimd][16];  // inputs and outputs may be the same variable
  for (uint32_t i = 0; i < kSimd; i++) {
    if (!has(mask, i)) continue;
    const void* source = source_of(lanes, mask, i);
    if (source) memcpy(values[i], source, lanes[i].b);
    else memset(values[i], 0xff, lanes[i].b);
  }
  for (uint32_t i = 0; i < kSimd; i++)
    if (has(mask, i)) memcpy(lanes[i].out, values[i], lanes[i].b);
}

// ---- votes and matrices -------------------------------------------------------------------------------------------

enum Vote : uint32_t { kAll, kAny, kBallot, kIsFirst };

// a: Vote, b: the lane's own
static void vote(Lane* lanes, uint32_t mask) {
  uint32_t yes = 0;
  for (uint32_t i = 0; i < kSimd; i++)
    if (has(mask, i) && lanes[i].b) yes |= 1u << i;
  for (uint32_t i = 0; i < kSimd; i++) {
    if (!has(mask, i)) continue;
    uint32_t among = lanes[i].a >= kQuad ? mask & 15u << (i & ~3u) : mask;
    switch (lanes[i].a % kQuad) {
      case kAll: lanes[i].result = (yes & among) == among; break;
      case kAny: lanes[i].result = (yes & among) != 0; break;
      case kBallot: lanes[i].result = yes; break;
      case kIsFirst: lanes[i].result = (uint32_t)__builtin_ctz(mask) == i; break;
    }
  }
}

static float element(const void* p, uint32_t type, uint32_t i) {
  return type == 0 ? load<float>(p, i) : type == 1 ? value(load<Half>(p, i)) : value(load<Bfloat>(p, i));
}

// Which two elements of an 8 x 8 matrix a lane holds, as on Apple's GPUs: those at (row, column) and behind it.
static void place_in_matrix(uint32_t lane, uint32_t& row, uint32_t& column) {
  uint32_t quad = lane / 4;
  row = (quad & 4) + lane / 2 % 4;
  column = (quad & 2) * 2 + lane % 2 * 2;
}

// d = a b + c; a to d: types of the four
static void multiply(Lane* lanes, uint32_t mask, const Lane& q) {
  if (mask != ~0u) report(kInactiveLane, q.caller(), "simdgroup matrix operation without all 32 lanes");
  float a[8][8] = {}, b[8][8] = {}, d[8][8] = {};
  uint32_t row, column;
  for (uint32_t i = 0; i < kSimd; i++) {
    if (!has(mask, i)) continue;
    place_in_matrix(i, row, column);
    for (uint32_t e = 0; e < 2; e++) {
      a[row][column + e] = element(lanes[i].in, q.b, e);
      b[row][column + e] = element(lanes[i].in2, q.c, e);
      d[row][column + e] = element(lanes[i].in3, q.d, e);
    }
  }
  for (auto& line : d) {
    const float* left = a[&line - d];
    for (int k = 0; k < 8; k++)
      for (int j = 0; j < 8; j++) line[k] += left[j] * b[j][k];
  }
  for (uint32_t i = 0; i < kSimd; i++) {
    if (!has(mask, i)) continue;
    place_in_matrix(i, row, column);
    for (uint32_t e = 0; e < 2; e++) {
      float f = d[row][column + e];
      if (q.a == 0) store(lanes[i].out, e, f);
      else if (q.a == 1) store(lanes[i].out, e, rounded<Half>(f));
      else store(lanes[i].out, e, rounded<Bfloat>(f));
    }
  }
}

void execute(Lane* lanes, uint32_t mask, const Lane& first) {
  switch (first.operation) {
    case kReduce: return reduce_any(lanes, mask, first);
    case kShuffle: return shuffle(lanes, mask);
    case kVote: return vote(lanes, mask);
    default: return multiply(lanes, mask, first);
  }
}

}  // namespace offmetal

// ---- called by kernels --------------------------------------------------------------------------------------------
using namespace offmetal;

API NOINLINE void __msl_reduce(uint32_t op, uint32_t type, uint32_t components, const void* in, void* out) {
  Lane* q = M->current;
  arrive(q, kReduce, __builtin_frame_address(0));
  q->a = op, q->b = type, q->c = components, q->in = in, q->out = out;
  wait(q, kAtSimd);
}
API NOINLINE void __msl_shuffle(uint32_t kind, uint32_t bytes, const void* in, const void* fill, uint32_t lane,
                                uint32_t modulo, void* out) {
  Lane* q = M->current;
  arrive(q, kShuffle, __builtin_frame_address(0));
  q->a = kind, q->b = bytes, q->c = lane, q->d = modulo, q->in = in, q->in2 = fill, q->out = out;
  wait(q, kAtSimd);
}
API NOINLINE uint64_t __msl_vote(uint32_t kind, uint32_t own) {
  Lane* q = M->current;
  arrive(q, kVote, __builtin_frame_address(0));
  q->a = kind, q->b = own;
  wait(q, kAtSimd);
  return q->result;
}
API NOINLINE void __msl_mma(uint32_t type_d, uint32_t type_a, uint32_t type_b, uint32_t type_c, void* d, const void* a,
                            const void* b, const void* c) {
  Lane* q = M->current;
  arrive(q, kMultiply, __builtin_frame_address(0));
  q->a = type_d, q->b = type_a, q->c = type_b, q->d = type_c, q->in = a, q->in2 = b, q->in3 = c, q->out = d;
  wait(q, kAtSimd);
}
API NOINLINE void __msl_barrier(uint32_t threadgroup, uint32_t flags) {
  Lane* q = M->current;
  arrive(q, threadgroup ? kThreadgroupBarrier : kSimdBarrier, __builtin_frame_address(0));
  q->a = flags;
  wait(q, threadgroup ? kAtBarrier : kAtSimd);
}
API uint32_t __msl_lane() { return M->current->lane; }
