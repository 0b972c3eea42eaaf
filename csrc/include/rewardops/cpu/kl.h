// Per-token KL estimators, elementwise on log-probabilities.
#pragma once

#include "rewardops/cpu/kernels.h"
#include "rewardops/cpu/math.h"
#include "rewardops/cpu/simd.h"

namespace rewardops::cpu {
namespace REWARDOPS_ISA {
namespace {

// (e^x - 1 - x) / x^2 on |x| < 1 by its Taylor series. The series is unrolled:
// an inner loop would keep the loop over tokens from becoming SIMD code.
inline double exp_series(double x) {
  double y = 1;
#pragma GCC unroll 20
  for (int k = 20; k > 2; --k) y = 1 + y * x * (1.0 / k);
  return y / 2;
}

inline double exp_minus_1_minus_x(double x) {
  const bool near = x < 1 && x > -1;
  const double s = near ? x : 0.0;
  const double small = s * s * exp_series(s), large = exp_any(x) - 1 - x;
  return near ? small : large;
}

inline double expm1(double x) {
  const bool near = x < 1 && x > -1;
  const double s = near ? x : 0.0;
  const double small = s + s * s * exp_series(s), large = exp_any(x) - 1;
  return near ? small : large;
}

// With x = n ln 2 + r: 2^n (e^r - 1 - r) + ((2^n - 1) + (2^n r - x)), whose brackets are exact where they cancel. The
// power is applied in halves, as 2^128 overflows. kLinear: minus x.
template <bool kLinear>
inline float exp_less(float x) {
  float c = x < -87.0f ? -87.0f : x;
  c = c > 89.0f ? 89.0f : c;
  const float n = round_to_integer(c * 1.44269504f);
  const float r = reduce(c, n);
  const float half = power_of_two(integer_of(n - 1.0f));
  const float rest = kLinear ? half * r - 0.5f * x : half * r;
  const float y = 2.0f * (half * exp_remainder(r) + ((half - 0.5f) + rest));
  return x > 89.0f ? infinity<float>() : y;
}

inline float exp_minus_1_minus_x(float x) { return exp_less<true>(x); }
inline float expm1(float x) { return exp_less<false>(x); }

template <typename T>
inline T clamped(T x, T largest) {
  return x > largest ? largest : (x < -largest ? -largest : x);
}

// a - b of probabilities a = b e^d and b, accurate also where they are close.
template <typename T>
inline T gap(T d, T a, T b) {
  return d > -1 && d < 1 ? b * expm1(d) : a - b;
}

// log(own / rest) of own = 1 - a and rest = 1 - b, with apart = a - b; accurate also where they are close.
template <typename T>
inline T log_rest(T apart, T own, T rest) {
  const T change = -apart / rest;
  return change > T{-0.5} && change < T{0.5} ? log1p_any(change) : log_positive(own) - log_positive(rest);
}

template <typename T>
struct KlTerm {
  T value, on_logprob, on_ref;
};

// The estimate and its slopes, d = logprob - ref_logprob with its clamp, if any. Unused results cost nothing once the
// function is inlined.
template <KlEstimator kind, typename T>
inline KlTerm<T> kl_term(T logprob, T ref, T largest_d, T largest_value) {
  const T whole = logprob - ref;
  if constexpr (kind == KlEstimator::binary_kl || kind == KlEstimator::binary_tv) {
    const T a = exp_any(logprob), b = exp_any(ref);
    T value, on_logprob, on_ref;
    if constexpr (kind == KlEstimator::binary_tv) {
      const T apart = gap(whole, a, b), sign = apart > 0 ? T{1} : (apart < 0 ? T{-1} : T{0});
      value = sign * apart;
      on_logprob = sign * a;
      on_ref = -sign * b;
    } else {
      // sum p (e^-x - 1 + x) over both outcomes, each at least 0: nothing cancels.
      const T rest = -expm1(logprob), ref_rest = -expm1(ref);
      const T y = ref_rest > 0 ? log_rest(gap(whole, a, b), rest, ref_rest) : infinity<T>();
      const T own = a > 0 ? a * exp_minus_1_minus_x(-whole) : b;
      const T other = rest > 0 ? rest * exp_minus_1_minus_x(-y) : ref_rest;
      value = own + other;
      on_logprob = rest > 0 && a > 0 ? a * (whole - y) : T{0};
      on_ref = rest > 0 ? rest * b / ref_rest - a : T{0};
    }
    const bool inside = value <= largest_value && value >= -largest_value;
    return {clamped(value, largest_value), inside ? on_logprob : T{0}, inside ? on_ref : T{0}};
  } else {
    const T d = clamped(whole, largest_d);
    T value, slope;
    if constexpr (kind == KlEstimator::k1 || kind == KlEstimator::k1_plus) {
      value = d;
      slope = T{1};
    } else if constexpr (kind == KlEstimator::abs) {
      value = d < 0 ? -d : d;
      slope = d > 0 ? T{1} : (d < 0 ? T{-1} : T{0});
    } else if constexpr (kind == KlEstimator::k2) {
      value = d * d / 2;
      slope = d;
    } else {
      value = exp_minus_1_minus_x(-d);
      slope = -expm1(-d);
    }
    const bool inside = whole <= largest_d && whole >= -largest_d && value <= largest_value && value >= -largest_value;
    slope = inside ? slope : T{0};
    // Straight-through estimator: the gradient of k2.
    if constexpr (kind == KlEstimator::k1_plus || kind == KlEstimator::k3_plus) slope = whole;
    return {clamped(value, largest_value), slope, -slope};
  }
}

constexpr int64_t kKlBlock = 1024;

template <KlEstimator kind, bool kWeighted, typename T>
inline void kl_forward(const TokenKlArgs<T>& a, int64_t begin, int64_t end) {
  alignas(64) T buffer[kKlBlock];
  for (int64_t start = begin; start < end; start += kKlBlock) {
    const int64_t n = end - start < kKlBlock ? end - start : kKlBlock;
    const T *logprob = a.logprob + start, *ref = a.ref_logprob + start;
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) {
      T v = kl_term<kind>(logprob[k], ref[k], a.largest_d, a.largest_value).value;
      if constexpr (kWeighted) v *= exp_any(logprob[k] - a.old_logprob[start + k]);
      buffer[k] = a.scale * v;
    }
    if (a.rewards)
#pragma omp simd
      for (int64_t k = 0; k < n; ++k) buffer[k] += a.rewards[start + k];
    if (a.mask)
#pragma omp simd
      for (int64_t k = 0; k < n; ++k) buffer[k] = a.mask[start + k] ? buffer[k] : T{0};
    store_out(a.out + start, buffer, n, a.stream);
  }
}

template <KlEstimator kind, bool kWeighted, bool kRef, typename T>
inline void kl_backward(const TokenKlArgs<T>& a, int64_t begin, int64_t end) {
  alignas(64) T buffer[kKlBlock];
  T* out = kRef ? a.out_ref : a.out;
  const T ratio_slope = a.ratio_grad && !kRef ? T{1} : T{0};
  for (int64_t start = begin; start < end; start += kKlBlock) {
    const int64_t n = end - start < kKlBlock ? end - start : kKlBlock;
    const T *logprob = a.logprob + start, *ref = a.ref_logprob + start, *grad = a.grad + start;
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) {
      const KlTerm<T> t = kl_term<kind>(logprob[k], ref[k], a.largest_d, a.largest_value);
      T g = kRef ? t.on_ref : t.on_logprob;
      if constexpr (kWeighted) g = exp_any(logprob[k] - a.old_logprob[start + k]) * (g + ratio_slope * t.value);
      buffer[k] = grad[k] * a.scale * g;
    }
    if (a.mask)
#pragma omp simd
      for (int64_t k = 0; k < n; ++k) buffer[k] = a.mask[start + k] ? buffer[k] : T{0};
    store_out(out + start, buffer, n, a.stream);
  }
}

template <KlEstimator kind, typename T>
inline void kl_of(const TokenKlArgs<T>& a, int64_t begin, int64_t end) {
  if (!a.grad) return a.old_logprob ? kl_forward<kind, true>(a, begin, end) : kl_forward<kind, false>(a, begin, end);
  if (a.out)
    a.old_logprob ? kl_backward<kind, true, false>(a, begin, end) : kl_backward<kind, false, false>(a, begin, end);
  if (a.out_ref)
    a.old_logprob ? kl_backward<kind, true, true>(a, begin, end) : kl_backward<kind, false, true>(a, begin, end);
}

// The forward pass, or the backward pass where there is an upstream gradient.
template <typename T>
void token_kl(const TokenKlArgs<T>& a, int64_t begin, int64_t end) {
  switch (a.estimator) {
    case KlEstimator::k1: return kl_of<KlEstimator::k1>(a, begin, end);
    case KlEstimator::abs: return kl_of<KlEstimator::abs>(a, begin, end);
    case KlEstimator::k2: return kl_of<KlEstimator::k2>(a, begin, end);
    case KlEstimator::k3: return kl_of<KlEstimator::k3>(a, begin, end);
    case KlEstimator::k1_plus: return kl_of<KlEstimator::k1_plus>(a, begin, end);
    case KlEstimator::k3_plus: return kl_of<KlEstimator::k3_plus>(a, begin, end);
    case KlEstimator::binary_kl: return kl_of<KlEstimator::binary_kl>(a, begin, end);
    case KlEstimator::binary_tv: return kl_of<KlEstimator::binary_tv>(a, begin, end);
  }
}

}  // namespace
}  // namespace REWARDOPS_ISA
}  // namespace rewardops::cpu
