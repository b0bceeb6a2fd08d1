// Vectors, packed vectors and small matrices.
#pragma once
namespace metal {
template <typename T, int N> struct vec;
template <typename T> struct __msl_isvec : false_type { static constexpr constant int n = 1; typedef T elem; };
template <typename T, int N> struct __msl_isvec<vec<T, N>> : true_type { static constexpr constant int n = N;
  typedef T elem; };
template <typename T, int N> struct __msl_isvec<const vec<T, N>> : true_type { static constexpr constant int n = N;
  typedef T elem; };
template <typename T> using make_scalar_t = typename __msl_isvec<remove_cv_t<T>>::elem;
template <typename T> struct make_scalar { typedef make_scalar_t<T> type; };
template <typename T> static constexpr constant bool is_vector_v = __msl_isvec<T>::value;

template <typename T, int N> struct __msl_store;
template <typename T> struct alignas(2 * sizeof(T)) __msl_store<T, 2> {
  union { T x; T r; }; union { T y; T g; };
};
template <typename T> struct alignas(4 * sizeof(T)) __msl_store<T, 3> {
  union { T x; T r; }; union { T y; T g; }; union { T z; T b; };
};
template <typename T> struct alignas(4 * sizeof(T)) __msl_store<T, 4> {
  union { T x; T r; }; union { T y; T g; }; union { T z; T b; }; union { T w; T a; };
};

// A writable swizzle. rewrite.py turns `v.xz = e` into `v.template __swzref<0,2>() = e` and any other use of `v.xz`
// into the value `v.template __swz<0,2>()`.
template <typename P, typename T, int... I> struct __msl_swzref {
  P* p;
  typedef vec<T, sizeof...(I)> V;
  MSL_FN void set(V v) { int k = 0; ((void)(((*p)[I] = v[k++])), ...); }
  MSL_FN V get() const { return V((*p)[I]...); }
  MSL_FN void operator=(V v) { set(v); }
#define MSL_OP(OP) MSL_FN void operator OP##=(V v) { set(get() OP v); }
  MSL_OP(+) MSL_OP(-) MSL_OP(*) MSL_OP(/) MSL_OP(&) MSL_OP(|) MSL_OP(^)
#undef MSL_OP
};

template <typename T, int N> struct vec : __msl_store<T, N> {
  typedef T value_type;
  vec() = default;
  MSL_CFN vec(T s) { fill(s); }
  template <typename A, typename B, typename... R> MSL_CFN vec(A a, B b, R... r) {
    static_assert(__msl_isvec<A>::n + __msl_isvec<B>::n + (0 + ... + __msl_isvec<R>::n) == N,
                  "vector constructor: the number of components does not match");
    int k = 0;
    put(k, a); put(k, b); (put(k, r), ...);
  }
  template <typename U, enable_if_t<!__is_same(U, T), int> = 0> MSL_CFN explicit vec(const vec<U, N>& o) {
    this->x = (T)o.x; this->y = (T)o.y;
    if constexpr (N > 2) this->z = (T)o.z;
    if constexpr (N > 3) this->w = (T)o.w;
  }
  template <typename U> MSL_CFN vec(const __constant vec<U, N>& o) {
    this->x = (T)o.x; this->y = (T)o.y;
    if constexpr (N > 2) this->z = (T)o.z;
    if constexpr (N > 3) this->w = (T)o.w;
  }
  // A whole vector from shared memory, by component: clang checks the alignment of members, not of copies.
  template <typename V, enable_if_t<__is_same(V, vec), int> = 0> MSL_FN vec(const __global V& o) { take(o); }
  template <typename V, enable_if_t<__is_same(V, vec), int> = 0> MSL_FN vec(const __local V& o) { take(o); }
  template <typename V> MSL_FN void take(const V& o) {
    this->x = o.x; this->y = o.y;
    if constexpr (N > 2) this->z = o.z;
    if constexpr (N > 3) this->w = o.w;
  }
  MSL_CFN void fill(T s) {
    this->x = s; this->y = s;
    if constexpr (N > 2) this->z = s;
    if constexpr (N > 3) this->w = s;
  }
  template <typename U> MSL_CFN void put1(int& k, U u) {
    if (k == 0) this->x = (T)u;
    if (k == 1) this->y = (T)u;
    if constexpr (N > 2) { if (k == 2) this->z = (T)u; }
    if constexpr (N > 3) { if (k == 3) this->w = (T)u; }
    k++;
  }
  template <typename U> MSL_CFN void put(int& k, U u) {
    if constexpr (__msl_isvec<U>::value) {
      put1(k, u.x); put1(k, u.y);
      if constexpr (__msl_isvec<U>::n > 2) put1(k, u.z);
      if constexpr (__msl_isvec<U>::n > 3) put1(k, u.w);
    } else {
      put1(k, u);
    }
  }
  MSL_FN T& operator[](int i) { return (&this->x)[i]; }
  MSL_FN const T& operator[](int i) const { return (&this->x)[i]; }
  MSL_FN T operator[](int i) const __constant { return (&this->x)[i]; }
  template <int... I> MSL_FN vec<T, sizeof...(I)> __swz() const {
    static_assert(((I < N) && ...), "swizzle: no such component");
    return vec<T, sizeof...(I)>((*this)[I]...);
  }
  template <int... I>
    MSL_FN vec<T, sizeof...(I)> __swz() const __constant { return vec<T, sizeof...(I)>((*this)[I]...); }
  template <int... I> MSL_FN __msl_swzref<vec, T, I...> __swzref() { return {this}; }
};

#define MSL_EACH(N, EXPR0, EXPR1, EXPR2, EXPR3) \
  if constexpr (N == 2) return {EXPR0, EXPR1}; \
  else if constexpr (N == 3) return {EXPR0, EXPR1, EXPR2}; \
  else return {EXPR0, EXPR1, EXPR2, EXPR3};
#define MSL_BIN(OP) \
  template <typename T, int N> MSL_CFN vec<T, N> operator OP(vec<T, N> a, vec<T, N> b) { \
    MSL_EACH(N, T(a.x OP b.x), T(a.y OP b.y), T(a.z OP b.z), T(a.w OP b.w)) } \
  template <typename T, int N, typename S, enable_if_t<is_arithmetic_v<S>, int> = 0> \
    MSL_CFN vec<T, N> operator OP(vec<T, N> a, S s) { return a OP vec<T, N>((T)s); } \
  template <typename T, int N, typename S, enable_if_t<is_arithmetic_v<S>, int> = 0> \
    MSL_CFN vec<T, N> operator OP(S s, vec<T, N> b) { return vec<T, N>((T)s) OP b; } \
  template <typename T, int N, typename S> MSL_FN vec<T, N>& operator OP##=(vec<T, N>& a, S s) { a = a OP s; return a; }
MSL_BIN(+) MSL_BIN(-) MSL_BIN(*) MSL_BIN(/) MSL_BIN(%) MSL_BIN(&) MSL_BIN(|) MSL_BIN(^) MSL_BIN(<<) MSL_BIN(>>)
#define MSL_CMP(OP) \
  template <typename T, int N> MSL_CFN vec<bool, N> operator OP(vec<T, N> a, vec<T, N> b) { \
    MSL_EACH(N, bool(a.x OP b.x), bool(a.y OP b.y), bool(a.z OP b.z), bool(a.w OP b.w)) } \
  template <typename T, int N, typename S, enable_if_t<is_arithmetic_v<S>, int> = 0> \
    MSL_CFN vec<bool, N> operator OP(vec<T, N> a, S s) { return a OP vec<T, N>((T)s); } \
  template <typename T, int N, typename S, enable_if_t<is_arithmetic_v<S>, int> = 0> \
    MSL_CFN vec<bool, N> operator OP(S s, vec<T, N> b) { return vec<T, N>((T)s) OP b; }
MSL_CMP(==) MSL_CMP(!=) MSL_CMP(<) MSL_CMP(>) MSL_CMP(<=) MSL_CMP(>=)
template <int N> MSL_CFN vec<bool, N> operator&&(vec<bool, N> a, vec<bool, N> b) { return a & b; }
template <int N> MSL_CFN vec<bool, N> operator||(vec<bool, N> a, vec<bool, N> b) { return a | b; }
template <typename T, int N>
  MSL_CFN vec<T, N> operator-(vec<T, N> a) { MSL_EACH(N, T(-a.x), T(-a.y), T(-a.z), T(-a.w)) }
template <typename T, int N> MSL_CFN vec<T, N> operator+(vec<T, N> a) { return a; }
template <typename T, int N>
  MSL_CFN vec<T, N> operator~(vec<T, N> a) { MSL_EACH(N, T(~a.x), T(~a.y), T(~a.z), T(~a.w)) }
template <int N> MSL_CFN vec<bool, N> operator!(vec<bool, N> a) { MSL_EACH(N, !a.x, !a.y, !a.z, !a.w) }

template <typename T, int N> struct __msl_packed {
  T v[N];
  __msl_packed() = default;
  MSL_FN __msl_packed(vec<T, N> o) { for (int i = 0; i < N; i++) v[i] = o[i]; }
  MSL_FN operator vec<T, N>() const { vec<T, N> o; for (int i = 0; i < N; i++) o[i] = v[i]; return o; }
  MSL_FN T& operator[](int i) { return v[i]; }
  MSL_FN const T& operator[](int i) const { return v[i]; }
};
} // namespace metal

#define MSL_VECS(NAME, T) \
  typedef metal::vec<T, 2> NAME##2; typedef metal::vec<T, 3> NAME##3; typedef metal::vec<T, 4> NAME##4; \
  typedef metal::__msl_packed<T, 2> packed_##NAME##2; typedef metal::__msl_packed<T, 3> packed_##NAME##3; \
    typedef metal::__msl_packed<T, 4> packed_##NAME##4; \
  namespace metal { using ::NAME##2; using ::NAME##3; using ::NAME##4; using ::packed_##NAME##2; \
    using ::packed_##NAME##3; using ::packed_##NAME##4; }
MSL_VECS(bool, bool) MSL_VECS(char, char) MSL_VECS(uchar, uchar) MSL_VECS(short, short) MSL_VECS(ushort, ushort)
MSL_VECS(int, int) MSL_VECS(uint, uint) MSL_VECS(long, long) MSL_VECS(ulong, ulong)
MSL_VECS(half, half) MSL_VECS(float, float) MSL_VECS(bfloat, bfloat)

namespace metal {
using ::size_t; using ::uint8_t; using ::uint16_t; using ::uint32_t; using ::uint64_t;
using ::int8_t; using ::int16_t; using ::int32_t; using ::int64_t; using ::uint; using ::ushort; using ::uchar;
  using ::ulong;

// float2x2 ... float4x4: columns, as in Metal.
template <typename T, int C, int R> struct matrix {
  vec<T, R> columns[C];
  matrix() = default;
  MSL_FN explicit matrix(T d) {
    for (int c = 0; c < C; c++) for (int r = 0; r < R; r++) columns[c][r] = c == r ? d : T(0); }
  template <typename... V, enable_if_t<sizeof...(V) == C && (C > 1), int> = 0>
    MSL_FN matrix(V... v) { int k = 0; ((columns[k++] = v), ...); }
  MSL_FN vec<T, R>& operator[](int c) { return columns[c]; }
  MSL_FN const vec<T, R>& operator[](int c) const { return columns[c]; }
};
template <typename T, int C, int R> MSL_FN vec<T, R> operator*(matrix<T, C, R> m, vec<T, C> v) {
  vec<T, R> o = m.columns[0] * v[0];
  for (int c = 1; c < C; c++) o = o + m.columns[c] * v[c];
  return o;
}
template <typename T, int C, int R> MSL_FN vec<T, C> operator*(vec<T, R> v, matrix<T, C, R> m) {
  vec<T, C> o;
  for (int c = 0; c < C; c++) { T s = 0; for (int r = 0; r < R; r++) s += m.columns[c][r] * v[r]; o[c] = s; }
  return o;
}
} // namespace metal
typedef metal::matrix<float, 2, 2> float2x2; typedef metal::matrix<float, 3, 3> float3x3;
  typedef metal::matrix<float, 4, 4> float4x4;
typedef metal::matrix<half, 2, 2> half2x2; typedef metal::matrix<half, 3, 3> half3x3;
  typedef metal::matrix<half, 4, 4> half4x4;
