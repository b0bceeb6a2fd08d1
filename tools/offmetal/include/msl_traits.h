// Type traits.
#pragma once
namespace metal {
template <typename T, T v> struct integral_constant {
  static constexpr constant T value = v;
  typedef T value_type;
  typedef integral_constant type;
  constexpr operator T() const { return v; }
};
template <bool B> using bool_constant = integral_constant<bool, B>;
typedef bool_constant<true> true_type;
typedef bool_constant<false> false_type;
template <bool B, typename T = void> struct enable_if {};
template <typename T> struct enable_if<true, T> { typedef T type; };
template <bool B, typename T = void> using enable_if_t = typename enable_if<B, T>::type;
template <bool B, typename T, typename F> struct conditional { typedef T type; };
template <typename T, typename F> struct conditional<false, T, F> { typedef F type; };
template <bool B, typename T, typename F> using conditional_t = typename conditional<B, T, F>::type;
template <typename A, typename B> struct is_same : bool_constant<__is_same(A, B)> {};
#define MSL_TRAIT1(NAME, EXPR) \
  template <typename T> struct NAME : bool_constant<EXPR> {}; \
  template <typename T> static constexpr constant bool NAME##_v = EXPR;
template <typename T> struct remove_const { typedef T type; };
template <typename T> struct remove_const<const T> { typedef T type; };
template <typename T> struct remove_volatile { typedef T type; };
template <typename T> struct remove_volatile<volatile T> { typedef T type; };
template <typename T> struct remove_addrspace { typedef T type; };
template <typename T> struct remove_addrspace<__global T> { typedef T type; };
template <typename T> struct remove_addrspace<__local T> { typedef T type; };
template <typename T> struct remove_addrspace<__constant T> { typedef T type; };
template <typename T> struct remove_addrspace<__private T> { typedef T type; };
template <typename T> struct remove_addrspace<const __global T> { typedef const T type; };
template <typename T> struct remove_addrspace<const __local T> { typedef const T type; };
template <typename T> struct remove_addrspace<const __constant T> { typedef const T type; };
template <typename T> struct remove_addrspace<const __private T> { typedef const T type; };
template <typename T> using remove_addrspace_t = typename remove_addrspace<T>::type;
template <typename T> struct remove_cv { typedef typename remove_volatile<typename remove_const<T>::type>::type type; };
template <typename T> using remove_cv_t = typename remove_cv<remove_addrspace_t<T>>::type;
template <typename T> using remove_const_t = typename remove_const<T>::type;
template <typename T> struct remove_reference { typedef T type; };
template <typename T> struct remove_reference<T&> { typedef T type; };
template <typename T> struct remove_reference<T&&> { typedef T type; };
template <typename T> using remove_reference_t = typename remove_reference<T>::type;
template <typename T> struct remove_pointer { typedef T type; };
template <typename T> struct remove_pointer<T*> { typedef T type; };
template <typename T> using remove_pointer_t = typename remove_pointer<T>::type;
template <typename T> using decay_t = remove_cv_t<remove_reference_t<T>>;
template <typename T> struct decay { typedef decay_t<T> type; };
template <typename A, typename B> static constexpr constant bool is_same_v = __is_same(A, B);
template <typename T>
  static constexpr constant bool __msl_is_fp = __is_same(remove_cv_t<T>, float) || __is_same(remove_cv_t<T>, half)
  || __is_same(remove_cv_t<T>, bfloat);
MSL_TRAIT1(is_floating_point,
  (__is_same(remove_cv_t<T>, float) || __is_same(remove_cv_t<T>, half) || __is_same(remove_cv_t<T>, bfloat)))
MSL_TRAIT1(is_integral, __is_integral(remove_cv_t<T>))
MSL_TRAIT1(is_arithmetic, (__is_integral(remove_cv_t<T>) || __msl_is_fp<T>))
MSL_TRAIT1(is_signed, (__is_integral(remove_cv_t<T>) ? __is_signed(remove_cv_t<T>) : __msl_is_fp<T>))
MSL_TRAIT1(is_unsigned, __is_unsigned(remove_cv_t<T>))
MSL_TRAIT1(is_void, __is_void(T))
MSL_TRAIT1(is_pointer, __is_pointer(T))
MSL_TRAIT1(is_reference, __is_reference(T))
MSL_TRAIT1(is_const, __is_const(T))
MSL_TRAIT1(is_enum, __is_enum(T))
MSL_TRAIT1(is_class, __is_class(T))
MSL_TRAIT1(is_scalar, (__is_integral(remove_cv_t<T>) || __msl_is_fp<T> || __is_pointer(T) || __is_enum(T)))
MSL_TRAIT1(is_trivially_copyable, __is_trivially_copyable(T))
template <typename From, typename To> struct is_convertible : bool_constant<__is_convertible_to(From, To)> {};
template <typename From, typename To> static constexpr constant bool is_convertible_v = __is_convertible_to(From, To);
template <typename... B> struct _disjunction : false_type {};
template <typename B1, typename... Bn>
  struct _disjunction<B1, Bn...> : conditional_t<bool(B1::value), B1, _disjunction<Bn...>> {};
template <typename... B> struct _conjunction : true_type {};
template <typename B1, typename... Bn>
  struct _conjunction<B1, Bn...> : conditional_t<bool(B1::value), _conjunction<Bn...>, B1> {};
template <typename... B> using disjunction = _disjunction<B...>;
template <typename... B> using conjunction = _conjunction<B...>;
template <typename B> struct negation : bool_constant<!bool(B::value)> {};
template <typename T> struct make_unsigned { typedef T type; };
template <> struct make_unsigned<char> { typedef uchar type; };
template <> struct make_unsigned<signed char> { typedef uchar type; };
template <> struct make_unsigned<short> { typedef ushort type; };
template <> struct make_unsigned<int> { typedef uint type; };
template <> struct make_unsigned<long> { typedef ulong type; };
template <typename T> using make_unsigned_t = typename make_unsigned<T>::type;
template <typename T> struct make_signed { typedef T type; };
template <> struct make_signed<uchar> { typedef char type; };
template <> struct make_signed<ushort> { typedef short type; };
template <> struct make_signed<uint> { typedef int type; };
template <> struct make_signed<ulong> { typedef long type; };
template <typename T> using make_signed_t = typename make_signed<T>::type;
template <typename T> T&& declval() noexcept;

} // namespace metal
