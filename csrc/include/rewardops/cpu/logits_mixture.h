// The Jensen-Shannon divergence: a second pass over both rows, once their normalisers are known.
#pragma once

#include "rewardops/cpu/logits_load.h"

namespace rewardops::cpu {
namespace REWARDOPS_ISA {
namespace {

// log p - log m and log q - log m, from two log-probabilities; the mixture is m = beta q + (1 - beta) p.
template <typename Acc>
struct Mixture {
  Acc excess, ref_excess;
  Mixture(Acc logp, Acc logq, Acc beta) {
    const bool first = logp >= logq;
    const Acc high = first ? logp : logq, low = first ? logq : logp;
    const Acc weight = first ? Acc{1} - beta : beta;
    const Acc log_m = log1p_any((Acc{1} - weight) * expm1_negative(low - high));  // relative to high
    excess = (logp - high) - log_m;
    ref_excess = (logq - high) - log_m;
  }
};

// Division by the temperature as a product with its reciprocal in two parts: one part alone is off by half a
// unit in the last place, which a distance of -20 turns into 20 units of the probability.
template <typename Acc>
struct Inverse {
  Acc high, low;
  explicit Inverse(double temperature)
      : high(static_cast<Acc>(1.0 / temperature)),
        low(static_cast<Acc>(1.0 / temperature - static_cast<double>(high))) {}
  // Distance from the row's largest logit to x; -inf becomes a finite one without mass: no inf - inf arises.
  Acc distance(Acc x, Acc shift) const {
    const Acc y = x - shift;
    const Acc c = y < Acc(-1e30) ? Acc(-1e30) : y;
    return c * high + c * low;
  }
};

// Normalisation of a row: turns its logits into log-probabilities.
template <typename Acc>
struct LogSoftmax {
  Inverse<Acc> inverse;
  Acc shift;    // the largest logit
  Acc log_sum;  // log of the sum of e^((x - shift) / temperature)

  LogSoftmax(double temperature, double largest, double log_total)
      : inverse(temperature), shift(static_cast<Acc>(largest)), log_sum(static_cast<Acc>(log_total)) {}
  Acc of(Acc x) const { return inverse.distance(x, shift) - log_sum; }
};

// KL(p || m) and KL(q || m).
struct MixedDivergences {
  double mixed = 0, ref_mixed = 0;
};

template <typename Acc>
inline MixedDivergences mixed_divergences(const LogitsArgs& in, int64_t n, LogSoftmax<Acc> policy,
                                          LogSoftmax<Acc> ref) {
  alignas(64) Acc z[kLogitsBlock];
  alignas(64) Acc x[kLogitsBlock];
  const Acc beta = static_cast<Acc>(in.beta);
  MixedDivergences out;
  for (int64_t start = 0; start < in.vocab; start += kLogitsBlock) {
    const int64_t count = columns_of_block(in, start);
    const Acc* zs = load_block(in.logits, n, start, count, in.softcap, z);
    const Acc* xs = load_block(in.ref_logits, n, start, count, in.softcap, x);
    Acc sum = 0, ref_sum = 0;
#pragma omp simd reduction(+ : sum, ref_sum)
    for (int64_t k = 0; k < count; ++k) {
      const Acc logp = policy.of(zs[k]), logq = ref.of(xs[k]);
      const Mixture<Acc> m(logp, logq, beta);
      sum += exp_flushed(logp) * m.excess;
      ref_sum += exp_flushed(logq) * m.ref_excess;
    }
    out.mixed += sum;
    out.ref_mixed += ref_sum;
  }
  return out;
}

// Adds the divergence's gradient in the scaled logits of a block to both sides' gradients g and h. `on_mixed` and
// `ref_on_mixed` are its upstream gradients, weighted by the sides' shares of the mixture.
template <typename Acc>
inline void add_mixture(double on_mixed, double ref_on_mixed, LogSoftmax<Acc> policy, LogSoftmax<Acc> ref, Acc beta,
                        const Acc* z, const Acc* x, int64_t count, Acc* g, Acc* h) {
  const Acc up = static_cast<Acc>(on_mixed), ref_up = static_cast<Acc>(ref_on_mixed);
#pragma omp simd
  for (int64_t k = 0; k < count; ++k) {
    const Acc logp = policy.of(z[k]), logq = ref.of(x[k]);
    const Mixture<Acc> m(logp, logq, beta);
    g[k] += up * exp_flushed(logp) * m.excess;
    h[k] += ref_up * exp_flushed(logq) * m.ref_excess;
  }
}

}  // namespace
}  // namespace REWARDOPS_ISA
}  // namespace rewardops::cpu
