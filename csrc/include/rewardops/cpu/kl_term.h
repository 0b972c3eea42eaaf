// The KL estimate of one token, its slopes, and its importance ratio.
#pragma once

#include "rewardops/cpu/kernels.h"
#include "rewardops/cpu/math.h"
#include "rewardops/cpu/simd.h"

// A call that is not inlined keeps the loop over tokens from becoming SIMD code.
#define REWARDOPS_INLINE [[gnu::always_inline]] inline

namespace rewardops::cpu {
namespace REWARDOPS_ISA {
namespace {

// (e^x - 1 - x) / x^2 on |x| < 1 by its Taylor series. The series is unrolled:
// an inner loop would keep the loop over tokens from becoming SIMD code.
REWARDOPS_INLINE double exp_series(double x) {
  double y = 1;
#pragma GCC unroll 20
  for (int k = 20; k > 2; --k) y = 1 + y * x * (1.0 / k);
  return y / 2;
}

REWARDOPS_INLINE double exp_minus_1_minus_x(double x) {
  const bool near = x < 1 && x > -1;
  const double s = near ? x : 0.0;
  const double finite = x < 1000 ? x : 1000;  // infinity less infinity would be NaN
  const double small = s * s * exp_series(s), large = exp_any(x) - 1 - finite;
  return near ? small : large;
}

REWARDOPS_INLINE double expm1(double x) {
  const bool near = x < 1 && x > -1;
  const double s = near ? x : 0.0;
  const double small = s + s * s * exp_series(s), large = exp_any(x) - 1;
  return near ? small : large;
}

// condition ? a : b by masks. Where an operand is a constant, compilers turn the plain form into branches to what
// follows from the constant, and the loop over tokens would not become SIMD code; as with && and ||.
REWARDOPS_INLINE float select(bool condition, float a, float b) {
  const uint32_t mask = -static_cast<uint32_t>(condition);
  return bits<float>((bits<uint32_t>(a) & mask) | (bits<uint32_t>(b) & ~mask));
}
REWARDOPS_INLINE double select(bool condition, double a, double b) {
  const uint64_t mask = -static_cast<uint64_t>(condition);
  return bits<double>((bits<uint64_t>(a) & mask) | (bits<uint64_t>(b) & ~mask));
}

// With x = n ln 2 + r: 2^n (e^r - 1 - r) + ((2^n - 1) + (2^n r - x)), whose brackets are exact where they cancel. The
// power is applied in halves, as 2^128 overflows. kLinear: minus x.
template <bool kLinear>
REWARDOPS_INLINE float exp_less(float x) {
  float c = x < -87.0f ? -87.0f : x;
  c = c > 89.0f ? 89.0f : c;
  const float n = round_to_integer(c * 1.44269504f);
  const float r = reduce(c, n);
  const float half = power_of_two(integer_of(n - 1.0f));
  const float rest = kLinear ? half * r - 0.5f * x : half * r;
  const float y = 2.0f * (half * exp_remainder(r) + ((half - 0.5f) + rest));
  return select(x > 89.0f, infinity<float>(), y);
}

REWARDOPS_INLINE float exp_minus_1_minus_x(float x) { return exp_less<true>(x); }
REWARDOPS_INLINE float expm1(float x) { return exp_less<false>(x); }

template <typename T>
REWARDOPS_INLINE T clamped(T x, T largest) {
  return x > largest ? largest : (x < -largest ? -largest : x);
}

// a - b; 0 where they are equal, infinities included.
template <typename T>
REWARDOPS_INLINE T difference(T a, T b) {
  return select(a == b, T{0}, a - b);
}

template <typename T>
REWARDOPS_INLINE T sign_of(T x) {
  return select(x == x, x > 0 ? T{1} : (x < 0 ? T{-1} : T{0}), x);
}

// a - b of probabilities a = b e^d and b, accurate also where they are close.
template <typename T>
REWARDOPS_INLINE T gap(T d, T a, T b) {
  return d > -1 && d < 1 ? b * expm1(d) : a - b;
}

// log(own / rest) of own = 1 - a and rest = 1 - b, with apart = a - b; accurate also where they are close.
template <typename T>
REWARDOPS_INLINE T log_rest(T apart, T own, T rest) {
  const T change = -apart / rest;
  return change > T{-0.5} && change < T{0.5} ? log1p_any(change) : log_positive(own) - log_positive(rest);
}

template <typename T>
struct KlTerm {
  T value, on_logprob, on_ref;
};

// Where d is below this, exp(-d) - 1 + d is exp(-d) in every digit of double.
template <typename T>
constexpr T kFar = T{-64};

// The divergence of the sampled token against all others, and its slopes.
template <KlEstimator kind, typename T>
REWARDOPS_INLINE KlTerm<T> binary_term(T logprob, T ref, T largest_value) {
  const T d = difference(logprob, ref), a = exp_any(logprob), b = exp_any(ref);
  T value, on_logprob, on_ref;
  if constexpr (kind == KlEstimator::binary_tv) {
    const T apart = gap(d, a, b), sign = sign_of(apart);
    value = sign * apart;
    on_logprob = sign * a;
    on_ref = -sign * b;
  } else {
    // sum p (e^-x - 1 + x) over both outcomes, each at least 0: nothing cancels. Of an outcome of probability 0 under
    // the policy the reference's probability is left.
    const bool excluded = d == infinity<T>();  // by the reference alone
    const T rest = -expm1(logprob), ref_rest = -expm1(ref);
    const T y = ref_rest > 0 ? log_rest(gap(d, a, b), rest, ref_rest) : infinity<T>();
    const T own = select((a > 0) & (d >= kFar<T>), a * exp_minus_1_minus_x(-d), b);
    const T other = select(rest > 0, rest * exp_minus_1_minus_x(-y), select(ref_rest > 0, ref_rest, T{0}));
    value = select(excluded, d, own + other);
    on_logprob = select(excluded, d, select((rest > 0) & (a > 0), a * (d - y), T{0}));
    const T far_ref = select(rest > 0, infinity<T>(), T{0});  // where the reference gives all others 0
    on_ref = select(ref_rest > 0, select(rest > 0, rest, T{0}) * b / ref_rest - a, far_ref);
  }
  const bool outside = (value > largest_value) | (value < -largest_value), number = d == d;
  return {select(number, clamped(value, largest_value), d), select(number, select(outside, T{0}, on_logprob), d),
          select(number, select(outside, T{0}, on_ref), d)};
}

// The estimate and its slopes without the ratio, d = logprob - ref_logprob with its clamp, if any: limits where a
// probability is 0, NaN where a log-probability is NaN. Unused results cost nothing once the function is inlined.
template <KlEstimator kind, typename T>
REWARDOPS_INLINE KlTerm<T> kl_term(T logprob, T ref, T largest_d, T largest_value) {
  if constexpr (kind == KlEstimator::binary_kl || kind == KlEstimator::binary_tv) {
    return binary_term<kind>(logprob, ref, largest_value);
  } else {
    const T whole = difference(logprob, ref), d = clamped(whole, largest_d);
    T value, slope;
    if constexpr (kind == KlEstimator::k1 || kind == KlEstimator::k1_plus) {
      value = d;
      slope = select(d == d, T{1}, d);
    } else if constexpr (kind == KlEstimator::abs) {
      value = d < 0 ? -d : d;
      slope = sign_of(d);
    } else if constexpr (kind == KlEstimator::k2) {
      value = d * d / 2;
      slope = d;
    } else {
      value = exp_minus_1_minus_x(-d);
      slope = -expm1(-d);
    }
    // Straight-through estimator: the gradient of k2.
    if constexpr (kind == KlEstimator::k1_plus || kind == KlEstimator::k3_plus) slope = d;
    const bool outside =
        (whole > largest_d) | (whole < -largest_d) | (value > largest_value) | (value < -largest_value);
    slope = select(outside, T{0}, slope);
    return {clamped(value, largest_value), slope, -slope};
  }
}

template <typename T>
struct KlRatio {
  T log, value;  // its logarithm within the clamp, before the cap; the ratio itself
  bool capped;
  bool free;  // neither unknown nor clamped nor capped
  bool live;  // and it has a gradient
};

// live_d: the clamp where the ratio has a gradient, else a negative number: a condition that is the same for all tokens
// would keep the loop from becoming SIMD code.
template <typename T>
REWARDOPS_INLINE KlRatio<T> kl_ratio(T logprob, T old, T largest_d, T live_d, T cap) {
  const T whole = select(old == old, difference(logprob, old), T{0}), log = clamped(whole, largest_d);
  const T ratio = exp_any(log);
  const bool known = (old == old) & (ratio <= cap);
  const auto within = [&](T most) { return bool(known & (whole <= most) & (whole >= -most)); };
  return {log, select(ratio > cap, cap, ratio), ratio > cap, within(largest_d), within(live_d)};
}

// ratio x, with the limit of 0 times infinity: 0 where the policy gives the token probability 0, else infinity.
template <typename T>
REWARDOPS_INLINE T weigh(const KlRatio<T>& ratio, T x) {
  const bool infinite = (x == infinity<T>()) | (x == -infinity<T>());
  const T product = select(x == 0, x, ratio.value * x);
  return select(infinite, select(ratio.log == -infinity<T>(), T{0}, x), product);
}

}  // namespace
}  // namespace REWARDOPS_ISA
}  // namespace rewardops::cpu
