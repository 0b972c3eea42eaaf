// Per-token KL estimators, a block of tokens at a time: estimates and slopes, then their weights, then the outputs.
#pragma once

#include "rewardops/cpu/kl_term.h"

namespace rewardops::cpu {
namespace REWARDOPS_ISA {
namespace {

constexpr int64_t kKlBlock = 1024;

template <typename T>
struct KlBlock {
  alignas(64) T value[kKlBlock];
  alignas(64) T on_logprob[kKlBlock];
  alignas(64) T on_ref[kKlBlock];
};

template <KlEstimator kind, bool kBackward, typename T>
REWARDOPS_ONCE void kl_terms(const TokenKlArgs<T>& args, int64_t start, int64_t n, KlBlock<T>& block) {
  const TokenKlArgs<T> a = args;  // a copy, which nothing that is stored can change
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) {
    const KlTerm<T> t = kl_term<kind>(a.logprob[start + k], a.ref_logprob[start + k], a.largest_d, a.largest_value);
    block.value[k] = t.value;
    if (kBackward) {
      block.on_logprob[k] = t.on_logprob;
      block.on_ref[k] = t.on_ref;
    }
  }
}

// The straight-through forms have the values of the plain ones.
constexpr KlEstimator value_of(KlEstimator kind) {
  return kind == KlEstimator::k1_plus ? KlEstimator::k1 : kind == KlEstimator::k3_plus ? KlEstimator::k3 : kind;
}

template <KlEstimator kind, typename T>
inline void kl_terms(const TokenKlArgs<T>& a, int64_t start, int64_t n, KlBlock<T>& block) {
  if (a.grad) kl_terms<kind, true>(a, start, n, block);
  else kl_terms<value_of(kind), false>(a, start, n, block);
}

template <typename T>
inline void kl_terms(const TokenKlArgs<T>& a, int64_t start, int64_t n, KlBlock<T>& block) {
  switch (a.estimator) {
    case KlEstimator::k1: return kl_terms<KlEstimator::k1>(a, start, n, block);
    case KlEstimator::abs: return kl_terms<KlEstimator::abs>(a, start, n, block);
    case KlEstimator::k2: return kl_terms<KlEstimator::k2>(a, start, n, block);
    case KlEstimator::k3: return kl_terms<KlEstimator::k3>(a, start, n, block);
    case KlEstimator::k1_plus: return kl_terms<KlEstimator::k1_plus>(a, start, n, block);
    case KlEstimator::k3_plus: return kl_terms<KlEstimator::k3_plus>(a, start, n, block);
    case KlEstimator::binary_kl: return kl_terms<KlEstimator::binary_kl>(a, start, n, block);
    case KlEstimator::binary_tv: return kl_terms<KlEstimator::binary_tv>(a, start, n, block);
  }
}

// True if no token of a block has a limit, a clamped or capped ratio, or a product that could overflow: weights are
// then plain products, whose loops are SIMD code. binary_kl is infinite against a reference that is certain.
template <typename T>
inline bool plain_weights(const TokenKlArgs<T>& a, int64_t start, int64_t n) {
  const T *logprob = a.logprob + start, *ref = a.ref_logprob + start, *old = a.old_logprob + start;
  const T far = a.largest_d < -kFar<T> ? a.largest_d : -kFar<T>, cap = log_positive(a.ratio_cap) - T{0.001};
  const T most = a.ratio_cap < infinity<T>() && cap < far ? cap : far;
  const T certain = a.estimator == KlEstimator::binary_kl ? T(-1e-30) : infinity<T>();
  T odd = 0;
#pragma omp simd reduction(+ : odd)
  for (int64_t k = 0; k < n; ++k) {
    const T d = logprob[k] - ref[k], log = logprob[k] - old[k];
    odd += (d < -kFar<T>)&(d > kFar<T>)&(log < most) & (log > -far) & (ref[k] < certain) ? T{0} : T{1};
  }
  return odd == 0;
}

template <typename T>
REWARDOPS_ONCE void weigh_plainly(const TokenKlArgs<T>& a, int64_t start, int64_t n, KlBlock<T>& block) {
  const T *logprob = a.logprob + start, *old = a.old_logprob + start, slope = a.ratio_grad ? T{1} : T{0};
  if (!a.grad) {
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) block.value[k] *= exp_any(logprob[k] - old[k]);
    return;
  }
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) {
    const T ratio = exp_any(logprob[k] - old[k]);
    block.on_logprob[k] = ratio * (block.on_logprob[k] + slope * block.value[k]);
    block.on_ref[k] *= ratio;
  }
}

// The estimate and its slopes of any token, times the ratio.
template <KlEstimator kind, typename T>
REWARDOPS_INLINE KlTerm<T> weighted(const TokenKlArgs<T>& a, T logprob, T ref, T old, T live_d, const KlTerm<T>& t) {
  constexpr bool kCubic = kind == KlEstimator::k3 || kind == KlEstimator::k3_plus;
  const KlRatio<T> ratio = kl_ratio(logprob, old, a.largest_d, live_d, a.ratio_cap);
  // Of opposite infinities the larger one stays: the value, but for binary_kl against a certain token that is likelier
  // than all others.
  const auto with_value = [&](T slope, T value) {
    const bool opposite = (slope == -infinity<T>()) & (value == infinity<T>());
    T larger = value;
    if (kind == KlEstimator::binary_kl) larger = select(logprob > T(-0.6931471805599453), slope, value);
    return select(ratio.live, select(opposite, larger, slope + value), slope);
  };
  const T value = weigh(ratio, t.value), on_ref = weigh(ratio, t.on_ref);
  const T on_logprob = weigh(ratio, with_value(t.on_logprob, t.value));
  if (!kCubic) return {value, on_logprob, on_ref};
  // Far below the reference k3 is exp(-d), which may overflow where the ratio vanishes: one exponential of both.
  const T whole = difference(logprob, ref), d = clamped(whole, a.largest_d);
  const bool inside = whole >= -a.largest_d;
  const bool within = (t.value < a.largest_value) | (t.value == infinity<T>());
  const bool far = (d < kFar<T>)&within & !ratio.capped;
  const T both = exp_any(select(ratio.free & inside, difference(ref, old), ratio.log - d));
  const T drift = weigh(ratio, d), slope = select(inside, kind == KlEstimator::k3 ? -both : drift, T{0});
  // Of k3's slope and value only the ratio times d is left.
  const T far_on_logprob =
      kind == KlEstimator::k3 ? select(ratio.live, select(inside, drift, both), slope) : with_value(slope, both);
  return {select(far, both, value), select(far, far_on_logprob, on_logprob), select(far, -slope, on_ref)};
}

template <KlEstimator kind, bool kBackward, typename T>
REWARDOPS_ONCE void weigh_block(const TokenKlArgs<T>& a, int64_t start, int64_t n, KlBlock<T>& block) {
  const T live_d = a.ratio_grad ? a.largest_d : T{-1};
  for (int64_t k = 0; k < n; ++k) {
    const KlTerm<T> t{block.value[k], kBackward ? block.on_logprob[k] : T{0}, kBackward ? block.on_ref[k] : T{0}};
    const int64_t at = start + k;
    const KlTerm<T> w = weighted<kind>(a, a.logprob[at], a.ref_logprob[at], a.old_logprob[at], live_d, t);
    block.value[k] = w.value;
    if (!kBackward) continue;
    block.on_logprob[k] = w.on_logprob;
    block.on_ref[k] = w.on_ref;
  }
}

template <KlEstimator kind, typename T>
inline void weigh_block(const TokenKlArgs<T>& a, int64_t start, int64_t n, KlBlock<T>& block) {
  if (a.grad) weigh_block<kind, true>(a, start, n, block);
  else weigh_block<kind, false>(a, start, n, block);
}

template <typename T>
inline void weigh_block(const TokenKlArgs<T>& a, int64_t start, int64_t n, KlBlock<T>& block) {
  if (!a.old_logprob) return;
  if (plain_weights(a, start, n)) return weigh_plainly(a, start, n, block);
  switch (a.estimator) {
    case KlEstimator::k3: return weigh_block<KlEstimator::k3>(a, start, n, block);
    case KlEstimator::k3_plus: return weigh_block<KlEstimator::k3_plus>(a, start, n, block);
    case KlEstimator::binary_kl: return weigh_block<KlEstimator::binary_kl>(a, start, n, block);
    default:
      return weigh_block<KlEstimator::k1>(a, start, n, block);  // and of all whose weights have nothing of their own
  }
}

// The product of a factor and an estimate or slope at token n; 0 where the factor is 0 and the other infinite, which is
// where the product alone is NaN.
template <typename T>
REWARDOPS_INLINE T silenced(const TokenKlArgs<T>& a, int64_t n, T factor, T product) {
  const T logprob = a.logprob[n], ref = a.ref_logprob[n];
  const bool lost = (factor == 0) & (product != product) & (logprob == logprob) & (ref == ref);
  return select(lost, T{0}, product);
}

template <typename T>
inline void store_kl(const TokenKlArgs<T>& a, T* buffer, T* out, int64_t start, int64_t n) {
  if (a.mask)
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) buffer[k] = a.mask[start + k] ? buffer[k] : T{0};
  store_out(out + start, buffer, n, a.stream);
}

template <typename T>
inline void kl_forward(const TokenKlArgs<T>& args, T* value, int64_t start, int64_t n) {
  const TokenKlArgs<T> a = args;
  if (a.scale != 1)
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) value[k] *= a.scale;
  if (a.scale == 0)
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) value[k] = silenced(a, start + k, a.scale, value[k]);
  if (a.rewards)
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) value[k] += a.rewards[start + k];
  store_kl(a, value, a.out, start, n);
}

template <typename T>
inline void kl_backward(const TokenKlArgs<T>& args, T* slope, T* out, int64_t start, int64_t n) {
  if (!out) return;
  const TokenKlArgs<T> a = args;
  const T* grad = a.grad + start;
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) {
    const T factor = grad[k] * a.scale;
    slope[k] = silenced(a, start + k, factor, factor * slope[k]);
  }
  store_kl(a, slope, out, start, n);
}

}  // namespace

// The forward pass, or the backward pass where there is an upstream gradient.
template <typename T>
void token_kl(const TokenKlArgs<T>& a, int64_t begin, int64_t end) {
  KlBlock<T> block;
  for (int64_t start = begin; start < end; start += kKlBlock) {
    const int64_t n = end - start < kKlBlock ? end - start : kKlBlock;
    kl_terms(a, start, n, block);
    weigh_block(a, start, n, block);
    if (!a.grad) {
      kl_forward(a, block.value, start, n);
    } else {
      kl_backward(a, block.on_logprob, a.out, start, n);
      kl_backward(a, block.on_ref, a.out_ref, start, n);
    }
  }
}

}  // namespace REWARDOPS_ISA
}  // namespace rewardops::cpu
