// The functions that CUDA C++ has in device code. Included by cuda_on_host.h.
#pragma once

// ---- barriers, shuffles, votes -----------------------------------------------------------------------------

inline void __syncthreads() { cuda_on_host::sync_count(false); }
inline int __syncthreads_count(int p) { return static_cast<int>(cuda_on_host::sync_count(p != 0)); }
inline int __syncthreads_or(int p) { return __syncthreads_count(p) != 0; }
inline int __syncthreads_and(int p) { return __syncthreads_count(p == 0) == 0; }
inline void __syncwarp(unsigned mask = 0xffffffffu) { cuda_on_host::meet_warp(mask, 0); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const unsigned me = cuda_on_host::lane(), first = me / width * width;
  return cuda_on_host::exchange(mask, value, [&](auto of) { return of(first + (source & (width - 1))); });
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const unsigned me = cuda_on_host::lane();
  return cuda_on_host::exchange(mask, value, [&](auto of) { return me % width < delta ? value : of(me - delta); });
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const unsigned me = cuda_on_host::lane();
  return cuda_on_host::exchange(
      mask, value, [&](auto of) { return me % width + delta >= unsigned(width) ? value : of(me + delta); });
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const unsigned me = cuda_on_host::lane();
  return cuda_on_host::exchange(mask, value, [&](auto of) {
    const unsigned other = me ^ unsigned(bits);
    return other / width > me / width ? value : of(other);
  });
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const unsigned own = predicate ? 1u << cuda_on_host::lane() : 0;
  return cuda_on_host::reduce(mask, own, [](unsigned a, unsigned b) { return a | b; });
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
template <typename T>
unsigned __match_any_sync(unsigned mask, T value) {
  return cuda_on_host::exchange(mask, value, [&](auto of) {
    unsigned found = 0;
    for (unsigned k = 0; k < cuda_on_host::kWarp; ++k)
      if (mask >> k & 1 && of(k) == value) found |= 1u << k;
    return found;
  });
}

// Of int and unsigned; _and, _or and _xor of unsigned only.
#define CUDA_ON_HOST_REDUCE(name, T, joined)                                   \
  inline T __reduce_##name##_sync(unsigned mask, T value) {                    \
    return cuda_on_host::reduce(mask, value, [](T a, T b) { return joined; }); \
  }
CUDA_ON_HOST_REDUCE(add, unsigned, a + b)
CUDA_ON_HOST_REDUCE(add, int, static_cast<int>(unsigned(a) + unsigned(b)))
CUDA_ON_HOST_REDUCE(min, unsigned, a < b ? a : b)
CUDA_ON_HOST_REDUCE(min, int, a < b ? a : b)
CUDA_ON_HOST_REDUCE(max, unsigned, a < b ? b : a)
CUDA_ON_HOST_REDUCE(max, int, a < b ? b : a)
CUDA_ON_HOST_REDUCE(and, unsigned, a& b)
CUDA_ON_HOST_REDUCE(or, unsigned, a | b)
CUDA_ON_HOST_REDUCE(xor, unsigned, a ^ b)
#undef CUDA_ON_HOST_REDUCE

// ---- memory ------------------------------------------------------------------------------------------------

namespace cuda_on_host {

template <typename T>
struct Itself {
  using type = T;
};
template <typename T>
using Same = typename Itself<T>::type;  // of an argument that is converted, as overloads would have it

// An atomic that leaves memory as it was may be one of a thread that polls: others get their turn.
inline void polled(bool unchanged) { unchanged ? give_way() : moved(); }

template <typename T>
bool same_bits(const T& a, const T& b) {
  return std::memcmp(&a, &b, sizeof a) == 0;
}

// Stores next(old) in the place of `old`, which it returns.
template <typename T, typename Next>
T update(T* at, int order, Next next) {
  T old, now;
  __atomic_load(at, &old, __ATOMIC_RELAXED);
  do now = next(old);
  while (!__atomic_compare_exchange(at, &old, &now, true, order, __ATOMIC_RELAXED));
  polled(same_bits(old, now));
  return old;
}

// Stores `value` where `expected` is; returns what was there.
template <typename T>
T compare_and_swap(T* at, T expected, T value, int order) {
  const T wanted = expected;
  __atomic_compare_exchange(at, &expected, &value, false, order, __ATOMIC_RELAXED);
  polled(!same_bits(wanted, expected) || same_bits(wanted, value));
  return expected;
}

}  // namespace cuda_on_host

#define CUDA_ON_HOST_ATOMIC(name, next)                                                                   \
  template <typename T>                                                                                   \
  T atomic##name(T* at, cuda_on_host::Same<T> value) {                                                    \
    return cuda_on_host::update(at, __ATOMIC_RELAXED, [=]([[maybe_unused]] T old) -> T { return next; }); \
  }
CUDA_ON_HOST_ATOMIC(Add, old + value)
CUDA_ON_HOST_ATOMIC(Sub, old - value)
CUDA_ON_HOST_ATOMIC(Min, value < old ? value : old)
CUDA_ON_HOST_ATOMIC(Max, old < value ? value : old)
CUDA_ON_HOST_ATOMIC(And, old& value)
CUDA_ON_HOST_ATOMIC(Or, old | value)
CUDA_ON_HOST_ATOMIC(Xor, old ^ value)
CUDA_ON_HOST_ATOMIC(Exch, value)
#undef CUDA_ON_HOST_ATOMIC
template <typename T>
T atomicCAS(T* at, cuda_on_host::Same<T> expected, cuda_on_host::Same<T> value) {
  return cuda_on_host::compare_and_swap(at, expected, value, __ATOMIC_RELAXED);
}

// The thread sanitizer does not know fences; it does know an order by an atomic, of which this makes rather too much.
inline std::atomic<int> cuda_on_host_fence{0};
inline void __threadfence() { cuda_on_host_fence.fetch_add(0, std::memory_order_acq_rel); }
inline void __threadfence_block() { __threadfence(); }
inline void __threadfence_system() { __threadfence(); }
inline void __nanosleep(unsigned) { cuda_on_host::give_way(); }
[[noreturn]] inline void __trap() { cuda_on_host::fail("__trap"); }

// Loads and stores with a hint for the caches.
#define CUDA_ON_HOST_LOAD(name) \
  template <typename T>         \
  T name(const T* at) {         \
    return *at;                 \
  }
#define CUDA_ON_HOST_STORE(name)                  \
  template <typename T>                           \
  void name(T* at, cuda_on_host::Same<T> value) { \
    *at = value;                                  \
  }
CUDA_ON_HOST_LOAD(__ldg)
CUDA_ON_HOST_LOAD(__ldca)
CUDA_ON_HOST_LOAD(__ldcg)
CUDA_ON_HOST_LOAD(__ldcs)
CUDA_ON_HOST_LOAD(__ldlu)
CUDA_ON_HOST_STORE(__stwb)
CUDA_ON_HOST_STORE(__stcg)
CUDA_ON_HOST_STORE(__stcs)
CUDA_ON_HOST_STORE(__stwt)
#undef CUDA_ON_HOST_LOAD
#undef CUDA_ON_HOST_STORE

// ---- bits --------------------------------------------------------------------------------------------------

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int k = 0; k < 32; ++k) reversed |= (x >> k & 1) << (31 - k);
  return reversed;
}

#define CUDA_ON_HOST_BITS(name, To, From)      \
  inline To name(From x) {                     \
    static_assert(sizeof(To) == sizeof(From)); \
    To bits;                                   \
    std::memcpy(&bits, &x, sizeof bits);       \
    return bits;                               \
  }
CUDA_ON_HOST_BITS(__float_as_int, int, float)
CUDA_ON_HOST_BITS(__float_as_uint, unsigned, float)
CUDA_ON_HOST_BITS(__int_as_float, float, int)
CUDA_ON_HOST_BITS(__uint_as_float, float, unsigned)
CUDA_ON_HOST_BITS(__double_as_longlong, long long, double)
CUDA_ON_HOST_BITS(__longlong_as_double, double, long long)
#undef CUDA_ON_HOST_BITS

// ---- arithmetic --------------------------------------------------------------------------------------------

// The C library has declared some of these names, for itself: hence macros.
#define __expf(x) ::expf(x)
#define __exp2f(x) ::exp2f(x)
#define __logf(x) ::logf(x)
#define __log2f(x) ::log2f(x)
#define __powf(x, y) ::powf(x, y)
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float rsqrtf(float x) noexcept { return 1.f / sqrtf(x); }
inline double rsqrt(double x) noexcept { return 1. / sqrt(x); }
// Rounded for itself: the compiler may not make a multiplication and an addition one. (A call that is not inlined.)
[[gnu::noinline]] inline float __fmul_rn(float x, float y) { return x * y; }
[[gnu::noinline]] inline float __fadd_rn(float x, float y) { return x + y; }
[[gnu::noinline]] inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }

// Of mixed types as CUDA has them; of floating-point numbers, the one that is no NaN.
template <typename A, typename B, typename T = std::common_type_t<A, B>,
          typename = std::enable_if_t<std::is_arithmetic_v<T> && std::is_integral_v<A> == std::is_integral_v<B>>>
constexpr T min(A a, B b) {
  if constexpr (std::is_floating_point_v<T>) return std::fmin(T(a), T(b));
  else return T(b) < T(a) ? T(b) : T(a);
}
template <typename A, typename B, typename T = std::common_type_t<A, B>,
          typename = std::enable_if_t<std::is_arithmetic_v<T> && std::is_integral_v<A> == std::is_integral_v<B>>>
constexpr T max(A a, B b) {
  if constexpr (std::is_floating_point_v<T>) return std::fmax(T(a), T(b));
  else return T(a) < T(b) ? T(b) : T(a);
}
