// Token statistics, backward: one read and one write of each row, whatever the upstream gradients.
//
// With p, q the probabilities of policy and reference and m their mixture, the gradient of every output is a sum of the
// same few terms. The upstream gradients of a row are folded into the coefficients of these terms first.
#pragma once

#include "rewardops/cpu/logits_mixture.h"

namespace rewardops::cpu {
namespace REWARDOPS_ISA {
namespace {

// Gradient in the scaled logits z of the policy:
//   p (on_p + on_log log p + on_gap (log p - log q - mean_gap) + on_mixed (log p - log m))
//     + on_square p^2 + on_q q + on_one
//   + [column = token] on_token
// and the same for the reference with the sides exchanged.
struct Side {
  double on_p = 0, on_log = 0, on_gap = 0, mean_gap = 0, on_mixed = 0;
  double on_square = 0, on_square_log = 0, on_q = 0, on_one = 0, on_token = 0;
  bool plain() const { return on_log == 0 && pair_free() && on_square == 0 && on_square_log == 0 && on_one == 0; }
  bool pair_free() const { return on_gap == 0 && on_mixed == 0 && on_q == 0; }
};

template <typename Acc>
inline void gather(const TokenStatsBackwardArgs& a, int64_t n, bool found, Side& policy, Side& ref) {
  const auto up = [&](Output o) {
    return a.grads[o] ? static_cast<double>(static_cast<const Acc*>(a.grads[o])[n]) : 0.0;
  };
  const auto saved = [&](Saved row) { return a.saved[row * a.count + n]; };
  // An infinite divergence does not change with the logits: it has no gradient.
  const auto divergence = [&](Output o, Saved row, double* value) {
    *value = saved(row);
    if (!std::isinf(*value)) return up(o);
    return *value = 0;
  };
  const double none = std::numeric_limits<double>::quiet_NaN();
  // A token's log-probability that is NaN has a gradient of NaN.
  const double logprob = a.grads[kLogprob] && !found ? none : up(kLogprob);
  const double entropy = up(kEntropy), sum_sq = up(kSumSq), moment = up(kSumSqLogprob);
  policy.on_p = up(kLogsumexp) - logprob - entropy * saved(kSavedEntropy) - (2 * sum_sq + moment) * saved(kSavedSumSq) -
                2 * moment * saved(kSavedSumSqLogprob);
  policy.on_log = -entropy;
  policy.on_square = 2 * sum_sq + moment;
  policy.on_square_log = 2 * moment;
  policy.on_one = up(kMeanLogit) / static_cast<double>(a.in.vocab);
  policy.on_token = logprob;
  if (!a.in.ref_logits.data) return;
  const double kl = divergence(kKl, kSavedKl, &policy.mean_gap), jsd = up(kJsd), beta = a.in.beta;
  const double reverse = divergence(kReverseKl, kSavedReverseKl, &ref.mean_gap);
  const double ref_logprob = a.grads[kRefLogprob] && !found ? none : up(kRefLogprob);
  // Divergences of NaN are in no gradient that was not asked for.
  const auto mean_of = [&](Saved row) { return a.grads[kJsd] ? saved(row) : 0.0; };
  policy.on_p += reverse - (1 - beta) * jsd * mean_of(kMixedKl);
  policy.on_gap = kl;
  policy.on_mixed = (1 - beta) * jsd;
  policy.on_q = -reverse;
  ref.on_p = kl - ref_logprob - beta * jsd * mean_of(kRefMixedKl);
  ref.on_gap = reverse;
  ref.on_mixed = beta * jsd;
  ref.on_q = -kl;
  ref.on_token = ref_logprob;
}

// The same coefficients from the gradient of a record, whose sums are relative to its own shifts and not normalised.
inline void gather_record(const double* grad, bool found, bool has_ref, Side& policy, Side& ref) {
  policy.on_p = grad[kFieldTotal] + grad[kFieldWeighted];
  policy.on_log = grad[kFieldWeighted];
  policy.on_square = 2 * grad[kFieldSquares] + grad[kFieldSquaresWeighted];
  policy.on_square_log = 2 * grad[kFieldSquaresWeighted];
  policy.on_one = grad[kFieldDistance];
  policy.on_token = found ? grad[kFieldToken] : 0;
  if (!has_ref) return;
  policy.on_p += grad[kFieldKl];
  policy.on_gap = grad[kFieldKl];
  policy.on_q = -grad[kFieldReverse];
  ref.on_p = grad[kFieldRefTotal] + grad[kFieldReverse];
  ref.on_gap = grad[kFieldReverse];
  ref.on_q = -grad[kFieldKl];
  ref.on_token = found ? grad[kFieldRefToken] : 0;
}

// The largest logit of a row, and the sum of e^((x - shift) / temperature).
struct Normaliser {
  double shift = 0, total = 1;
};

// The coefficients of a side in the accumulation type, for terms in e^distance. The normalisers are folded into them in
// double, together with the constants of log p = distance - log total. Near the largest logit, where the mass is,
// distances are small and nearly free of rounding, and so are the gaps minus their mean.
template <typename Acc>
struct Gradient {
  using L = Lanes<Acc>;
  const L on_e, on_distance, on_gap, mean_gap, on_square, on_square_distance, on_other, on_one, shift, high, low,
      furthest;

  Gradient(const Side& s, const Normaliser& own, double other_total, double temperature)
      : on_e(lanes(folded(s, own.total, other_total) / own.total)),
        on_distance(lanes(s.on_log / own.total)),
        on_gap(lanes(s.on_gap / own.total)),
        mean_gap(lanes(mean_of(s, own.total, other_total))),
        on_square(lanes((s.on_square - (s.on_square_log == 0 ? 0 : s.on_square_log * std::log(own.total))) /
                        (own.total * own.total))),
        on_square_distance(lanes(s.on_square_log / (own.total * own.total))),
        on_other(lanes(s.on_q / other_total)),
        on_one(lanes(s.on_one)),
        shift(lanes(own.shift)),
        high(L::splat(Inverse<Acc>(temperature).high)),
        low(L::splat(Inverse<Acc>(temperature).low)),
        furthest(lanes(-1e30)) {}

  static L lanes(double x) { return L::splat(static_cast<Acc>(x)); }
  // The mean gap of distances: log p - log q = distance - other distance + log (other total / total).
  static double mean_of(const Side& s, double total, double other_total) {
    return s.on_gap == 0 ? 0 : s.mean_gap - std::log(other_total / total);
  }
  static double folded(const Side& s, double total, double other_total) {
    const double mean = mean_of(s, total, other_total), rounding = mean - static_cast<double>(static_cast<Acc>(mean));
    return s.on_p - s.on_gap * rounding - (s.on_log == 0 ? 0 : s.on_log * std::log(total));
  }
  // The distance as Inverse::distance computes it. -inf becomes a finite distance without mass: no inf - inf arises.
  L distance(L x) const {
    const L y = larger(furthest, x - shift);
    return fma(y, high, y * low);
  }
  L plain(L x) const { return on_e * exp(distance(x)); }
  L policy(L x) const {
    const L d = distance(x), e = exp(d);
    return fma(inner(d, e), e, on_one);
  }
  L inner(L d, L e) const { return fma(fma(on_square_distance, d, on_square), e, fma(on_distance, d, on_e)); }
  // The gradient, from the distances of this side and of the other one, and their exponentials.
  L pair(L d, L e, L other, L other_e) const {
    const L sum = fma(on_gap, d - other - mean_gap, inner(d, e));
    return fma(on_other, other_e, fma(sum, e, on_one));
  }
};

// The gradients of the scaled logits of a block; count is a multiple of the lanes.
template <typename Acc>
inline void block_gradient(const Gradient<Acc>& of, bool plain, const Acc* z, int64_t count, Acc* g) {
  using L = Lanes<Acc>;
  if (plain)
    for (int64_t k = 0; k < count; k += L::kWidth) of.plain(L::load(z + k)).store(g + k);
  else
    for (int64_t k = 0; k < count; k += L::kWidth) of.policy(L::load(z + k)).store(g + k);
}

template <typename Acc>
inline void block_gradients(const Gradient<Acc>& policy, const Gradient<Acc>& ref, const Acc* z, const Acc* x,
                            int64_t count, Acc* g, Acc* h) {
  using L = Lanes<Acc>;
  for (int64_t k = 0; k < count; k += L::kWidth) {
    const L d = policy.distance(L::load(z + k)), r = ref.distance(L::load(x + k));
    const L e = exp(d), f = exp(r);
    policy.pair(d, e, r, f).store(g + k);
    if (h) ref.pair(r, f, d, e).store(h + k);
  }
}

// Turns gradients of scaled logits into gradients of stored logits: 1 / temperature, and the softcap's slope.
template <typename T, typename Acc>
inline void store_block(const Acc* g, const Acc* slope, int64_t n, Acc factor, T* out) {
  const auto narrowed = [](Acc x) {
    if constexpr (sizeof(T) == 8) return x;
    else return narrow<T>(x);
  };
  if (slope) {
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) out[k] = narrowed(g[k] * factor * slope[k]);
  } else {
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) out[k] = narrowed(g[k] * factor);
  }
}

template <typename Acc>
inline void store_block(const LogitsRows& rows, int64_t n, int64_t start, const Acc* g, const Acc* slope, int64_t count,
                        Acc factor) {
  if constexpr (sizeof(Acc) == 8) {
    store_block(g, slope, count, factor, logits_row<double>(rows, n) + start);
  } else {
    switch (rows.dtype) {
      case DType::bf16: return store_block(g, slope, count, factor, logits_row<bfloat16>(rows, n) + start);
      case DType::f16: return store_block(g, slope, count, factor, logits_row<float16>(rows, n) + start);
      default: return store_block(g, slope, count, factor, logits_row<float>(rows, n) + start);
    }
  }
}

// The softcap's slope at the stored logits of a block; null without a softcap.
template <typename Acc>
inline const Acc* slopes_of(const LogitsRows& rows, int64_t n, int64_t start, int64_t count, double softcap,
                            Acc* buffer) {
  if (!(softcap > 0)) return nullptr;
  const Acc* x = load_block(rows, n, start, count, 0.0, buffer);
  const Acc inverse = static_cast<Acc>(1.0 / softcap);
#pragma omp simd
  for (int64_t k = 0; k < count; ++k) buffer[k] = tanh_slope(x[k] * inverse);
  return buffer;
}

inline void store_zeros(const LogitsRows& rows, int64_t n, int64_t begin, int64_t end) {
  if (!rows.data || end <= begin) return;
  const int64_t size = rows.dtype == DType::f64 ? 8 : rows.dtype == DType::f32 ? 4 : 2;
  std::memset(logits_row<char>({rows.data, rows.dtype, 1, 0, 0}, 0) + (rows.offset(n) + begin) * size, 0,
              (end - begin) * size);
}

template <typename Acc>
inline void backward_row(const TokenStatsBackwardArgs& a, int64_t n) {
  const LogitsArgs& in = a.in;
  if (in.masked(n)) {
    store_zeros(a.grad_logits, n, 0, a.width);
    store_zeros(a.grad_ref, n, 0, a.width);
    return;
  }
  const double t = in.temperature_of(n);
  const auto [column, found] = TokenColumn(in, n);
  Side policy, ref;
  Normaliser norm, ref_norm;
  if (a.record) {
    const double* r = a.record + n * kFields;
    gather_record(a.grad_record + n * kFields, found, in.ref_logits.data, policy, ref);
    // The product rounds to the original logit. Where all logits are -inf, any shift leaves them without mass.
    norm.shift = std::isinf(r[kFieldShift]) ? 0 : r[kFieldShift] * t;
    ref_norm.shift = std::isinf(r[kFieldRefShift]) ? 0 : r[kFieldRefShift] * t;
  } else {
    const double* saved = a.saved + n;
    gather<Acc>(a, n, found, policy, ref);
    norm = {saved[kShift * a.count], saved[kTotal * a.count]};
    if (in.ref_logits.data) ref_norm = {saved[kRefShift * a.count], saved[kRefTotal * a.count]};
  }
  const Gradient<Acc> of_policy(policy, norm, ref_norm.total, t), of_ref(ref, ref_norm, norm.total, t);
  const LogSoftmax<Acc> logp(t, norm.shift, std::log(norm.total)), logq(t, ref_norm.shift, std::log(ref_norm.total));
  const bool write_policy = a.grad_logits.data, write_ref = a.grad_ref.data;
  // Without a divergence the two sides do not meet: a NaN on one does not reach the other.
  const bool apart = policy.pair_free() && ref.pair_free(), paired = write_ref || !apart,
             mixed = policy.on_mixed != 0 || ref.on_mixed != 0;

  alignas(64) Acc z_buffer[kLogitsBlock];
  alignas(64) Acc x_buffer[kLogitsBlock];
  alignas(64) Acc g[kLogitsBlock];
  alignas(64) Acc h[kLogitsBlock];
  for (int64_t start = 0; start < in.vocab; start += kLogitsBlock) {
    const int64_t count = columns_of_block(in, start), padded = padded_to_lanes<Acc>(count);
    const auto load = [&](const LogitsRows& rows, Acc* buffer) {
      const Acc* x = load_block(rows, n, start, count, in.softcap, buffer);
      if (padded == count || x == buffer) return x;
      std::memcpy(buffer, x, count * sizeof(Acc));  // padded, so that full lanes may be read
      return static_cast<const Acc*>(buffer);
    };
    const Acc* z = load(in.logits, z_buffer);
    const Acc* x = paired ? load(in.ref_logits, x_buffer) : z;
    if (apart) block_gradient(of_policy, policy.plain(), z, padded, g);
    if (apart && write_ref) block_gradient(of_ref, ref.plain(), x, padded, h);
    if (!apart) block_gradients(of_policy, of_ref, z, x, padded, g, write_ref ? h : nullptr);
    if (mixed) add_mixture(policy.on_mixed, ref.on_mixed, logp, logq, static_cast<Acc>(in.beta), z, x, count, g, h);
    if (found && column >= start && column < start + count) {
      g[column - start] += static_cast<Acc>(policy.on_token);
      if (write_ref) h[column - start] += static_cast<Acc>(ref.on_token);
    }
    // Both slopes before either gradient is stored, which may overwrite the logits. The buffers are free by now.
    const Acc* slope = slopes_of(in.logits, n, start, count, in.softcap, z_buffer);
    const Acc* ref_slope = write_ref ? slopes_of(in.ref_logits, n, start, count, in.softcap, x_buffer) : nullptr;
    if (write_policy) store_block(a.grad_logits, n, start, g, slope, count, logp.inverse.high);
    if (write_ref) store_block(a.grad_ref, n, start, h, ref_slope, count, logp.inverse.high);
  }
  store_zeros(a.grad_logits, n, in.vocab, a.width);
  store_zeros(a.grad_ref, n, in.vocab, a.width);
}

}  // namespace

void token_stats_backward(const TokenStatsBackwardArgs& a, int64_t begin, int64_t end) {
  const FlushSubnormals flush;
  for (int64_t n = begin; n < end; ++n) {
    if (a.in.logits.dtype == DType::f64) backward_row<double>(a, n);
    else backward_row<float>(a, n);
  }
}

}  // namespace REWARDOPS_ISA
}  // namespace rewardops::cpu
