// Per-token KL estimators, elementwise on log-probabilities.
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

// ---- a block of tokens: estimates and slopes, then their weights, then the outputs ---------------------------------

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
