// Per-token KL estimators, elementwise on log-probabilities.
#pragma once

#include "rewardops/cpu/kernels.h"
#include "rewardops/cpu/math.h"

namespace rewardops::cpu {
namespace REWARDOPS_ISA {
namespace {

// (e^x - 1 - x) / x^2 on |x| < 1 by its Taylor series, to the precision of T. Unrolled:
// a loop inside would keep the loop over tokens from becoming SIMD code.
template <typename T>
inline T exp_remainder(T x) {
  constexpr int kTerms = sizeof(T) == 8 ? 18 : 9;
  T y = 1;
#pragma GCC unroll 20
  for (int k = kTerms + 2; k > 2; --k) y = 1 + y * x * (T{1} / static_cast<T>(k));
  return y / 2;
}

template <typename T>
inline T exp_minus_1_minus_x(T x) {
  const bool near = x < 1 && x > -1;
  const T s = near ? x : T{0};
  const T small = s * s * exp_remainder(s), large = exp_any(x) - 1 - x;
  return near ? small : large;
}

template <typename T>
inline T expm1(T x) {
  const bool near = x < 1 && x > -1;
  const T s = near ? x : T{0};
  const T small = s + s * s * exp_remainder(s), large = exp_any(x) - 1;
  return near ? small : large;
}

template <typename T, typename Function>
inline void each_token(const TokenKlArgs<T>& a, int64_t begin, int64_t end, Function value) {
  if (a.mask) {
#pragma omp simd
    for (int64_t k = begin; k < end; ++k) {
      const T v = value(a.logprob[k] - a.ref_logprob[k], k);
      a.out[k] = a.mask[k] ? v : T{0};
    }
  } else {
#pragma omp simd
    for (int64_t k = begin; k < end; ++k) a.out[k] = value(a.logprob[k] - a.ref_logprob[k], k);
  }
}

template <typename T>
void token_kl(const TokenKlArgs<T>& a, int64_t begin, int64_t end) {
  switch (a.estimator) {
    case KlEstimator::k1: return each_token(a, begin, end, [](T d, int64_t) { return d; });
    case KlEstimator::k2: return each_token(a, begin, end, [](T d, int64_t) { return d * d / 2; });
    case KlEstimator::k3: return each_token(a, begin, end, [](T d, int64_t) { return exp_minus_1_minus_x(-d); });
  }
}

template <typename T>
void token_kl_backward(const TokenKlArgs<T>& a, int64_t begin, int64_t end) {
  const T* grad = a.grad;
  switch (a.estimator) {
    case KlEstimator::k1: return each_token(a, begin, end, [=](T, int64_t k) { return grad[k]; });
    case KlEstimator::k2: return each_token(a, begin, end, [=](T d, int64_t k) { return grad[k] * d; });
    case KlEstimator::k3: return each_token(a, begin, end, [=](T d, int64_t k) { return grad[k] * -expm1(-d); });
  }
}

}  // namespace
}  // namespace REWARDOPS_ISA
}  // namespace rewardops::cpu
