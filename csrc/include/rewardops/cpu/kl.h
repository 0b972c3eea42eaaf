// Per-token KL estimators, elementwise on log-probabilities.
#pragma once

#include "rewardops/cpu/kernels.h"
#include "rewardops/cpu/math.h"

namespace rewardops::cpu {
namespace REWARDOPS_ISA {
namespace {

// (e^x - 1 - x) / x^2 on |x| < 1 by its Taylor series, to the precision of T.
template <typename T>
inline T exp_remainder(T x) {
  constexpr int kTerms = sizeof(T) == 8 ? 18 : 11;
  T y = 0;
  for (int k = kTerms + 1; k >= 2; --k) {
    T factorial = 1;
    for (int j = 2; j <= k; ++j) factorial *= j;
    y = y * x + T{1} / factorial;
  }
  return y;
}

template <typename T>
inline T exp_minus_1_minus_x(T x) {
  const bool near = x < 1 && x > -1;
  const T s = near ? x : T{0};
  return near ? s * s * exp_remainder(s) : exp_any(x) - 1 - x;
}

template <typename T>
inline T expm1(T x) {
  const bool near = x < 1 && x > -1;
  const T s = near ? x : T{0};
  return near ? s + s * s * exp_remainder(s) : exp_any(x) - 1;
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
