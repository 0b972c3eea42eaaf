// Token statistics: one read of a row forward, one read and one write backward.
//
// A block of the row stays in the L1 cache between the pass that finds its maximum and the pass that sums,
// so memory is read once; sums run in float over a few hundred terms and in double beyond.
#pragma once

#include "rewardops/cpu/kernels.h"
#include "rewardops/cpu/math.h"

namespace rewardops::cpu {
namespace REWARDOPS_ISA {
namespace {

constexpr int64_t kLogitsBlock = 2048;
constexpr int64_t kSumBlock = 256;  // as many terms as are summed in float before they go into a double

template <typename T> struct AccOf { using type = float; };
template <> struct AccOf<double> { using type = double; };

template <typename T>
inline const T* logits_row(const LogitsArgs& in, int64_t n) {
  return static_cast<const T*>(in.logits) + (n / in.inner) * in.stride_outer + (n % in.inner) * in.stride_inner;
}

// The block in the accumulation type (the row itself where it already is) and its largest entry.
template <typename T, typename Acc>
inline const Acc* load_block(const T* x, int64_t n, Acc* buffer, Acc* largest) {
  Acc top = -infinity<Acc>();
  if constexpr (sizeof(T) == sizeof(Acc)) {
#pragma omp simd reduction(max : top)
    for (int64_t k = 0; k < n; ++k) top = x[k] > top ? x[k] : top;
    *largest = top;
    return x;
  } else {
#pragma omp simd reduction(max : top)
    for (int64_t k = 0; k < n; ++k) {
      const Acc v = widen(x[k]);
      buffer[k] = v;
      top = v > top ? v : top;
    }
    *largest = top;
    return buffer;
  }
}

// Division by the temperature as a product with its reciprocal in two parts: one part alone is off by half a
// unit in the last place, which a distance of -20 turns into 20 units of the probability.
template <typename Acc>
struct Inverse {
  Acc high, low;
  explicit Inverse(double temperature)
      : high(static_cast<Acc>(1.0 / temperature)),
        low(static_cast<Acc>(1.0 / temperature - static_cast<double>(high))) {}
  // Of a logit to the row's largest; -inf becomes a distance that is as good, and makes no inf - inf.
  Acc distance(Acc x, Acc shift) const {
    const Acc y = x - shift;
    const Acc c = y < Acc(-1e30) ? Acc(-1e30) : y;
    return c * high + c * low;
  }
};

// e^((x - shift) / temperature) and its exponent, for the sums: float works in powers of two. What lies further
// below the largest logit than the smallest normal number reaches, -inf too, weighs exactly 0.
template <typename Acc>
struct Weight;

template <>
struct Weight<float> {
  static constexpr double kUnit = 0.6931471805599453;  // of the exponent, in nats
  float high, low, furthest;
  explicit Weight(double temperature) {
    const double scale = 1.4426950408889634 / temperature;
    high = static_cast<float>(scale);
    low = static_cast<float>(scale - static_cast<double>(high));
    furthest = static_cast<float>(-124.9 / scale);
  }
  float exponent(float x, float shift) const {
    const float y = x - shift;
    const float c = y < furthest ? furthest : y;  // NaN passes
    return c * high + c * low;
  }
  float value(float x, float shift, float exponent) const {
    return x - shift < furthest ? 0.0f : exp2_clamped(exponent);
  }
};

template <>
struct Weight<double> {
  static constexpr double kUnit = 1.0;
  double inverse;
  explicit Weight(double temperature) : inverse(1.0 / temperature) {}
  double exponent(double x, double shift) const {
    const double d = (x - shift) * inverse;
    return d < -740.0 ? -740.0 : d;
  }
  double value(double x, double shift, double exponent) const {
    return (x - shift) * inverse < -740.0 ? 0.0 : std::exp(exponent);
  }
};

struct Partial {
  double shift = -infinity<double>();  // the largest logit so far
  double sum = 0;                      // of e^d, d = (x - shift) / temperature
  double weighted = 0;                 // of e^d d
};

template <bool kEntropy, bool kHasLargest, typename Acc>
inline void add_block(const Acc* x, int64_t n, Acc shift, const Weight<Acc>& weight, Partial& p) {
  for (int64_t from = 0; from < n; from += kSumBlock) {
    const int64_t to = from + kSumBlock < n ? from + kSumBlock : n;
    Acc sum = 0, weighted = 0, ones = 0;
#pragma omp simd reduction(+ : sum, weighted, ones)
    for (int64_t k = from; k < to; ++k) {
      const Acc d = weight.exponent(x[k], shift);
      const Acc e = weight.value(x[k], shift, d);
      if (kEntropy) weighted += e * d;
      if (kHasLargest) {
        sum += x[k] == shift ? Acc{0} : e;
        ones += x[k] == shift ? Acc{1} : Acc{0};
      } else {
        sum += e;
      }
    }
    p.sum += ones;
    p.sum += sum;
    p.weighted += Weight<Acc>::kUnit * weighted;
  }
}

template <bool kEntropy, typename T>
inline Partial row_partial(const T* row, int64_t vocab, double temperature) {
  using Acc = typename AccOf<T>::type;
  alignas(64) Acc buffer[kLogitsBlock];
  const Weight<Acc> weight(temperature);
  Partial p;
  for (int64_t start = 0; start < vocab; start += kLogitsBlock) {
    const int64_t n = vocab - start < kLogitsBlock ? vocab - start : kLogitsBlock;
    Acc largest;
    const Acc* x = load_block(row + start, n, buffer, &largest);
    if (static_cast<double>(largest) > p.shift) {
      if (p.sum != 0) {
        const double d = (p.shift - static_cast<double>(largest)) / temperature;
        const double scale = std::exp(d);
        p.weighted = scale == 0 ? 0 : scale * (p.weighted + p.sum * d);
        p.sum *= scale;
      }
      p.shift = largest;
    }
    if (p.shift == -infinity<double>()) {
      // All -inf so far, which has no mass; a NaN among them must still be seen.
      for (int64_t k = 0; k < n; ++k) p.sum += x[k] == x[k] ? 0.0 : static_cast<double>(x[k]);
      continue;
    }
    const Acc shift = static_cast<Acc>(p.shift);
    if (static_cast<double>(largest) == p.shift) {
      // The terms of the largest logit are exactly 1. Summed apart from the rest they do not swallow the
      // digits of a peaked row's tail, which are all that its entropy is made of.
      add_block<kEntropy, true>(x, n, shift, weight, p);
    } else {
      add_block<kEntropy, false>(x, n, shift, weight, p);
    }
  }
  return p;
}

template <typename T>
void token_stats_rows(const TokenStatsArgs& a, int64_t begin, int64_t end) {
  using Acc = typename AccOf<T>::type;
  auto* logprob = static_cast<Acc*>(a.logprob);
  auto* entropy = static_cast<Acc*>(a.entropy);
  auto* shift = static_cast<Acc*>(a.shift);
  auto* log_sum = static_cast<Acc*>(a.log_sum);
  for (int64_t n = begin; n < end; ++n) {
    if (a.in.mask && !a.in.mask[n]) {
      logprob[n] = shift[n] = log_sum[n] = 0;
      if (entropy) entropy[n] = 0;
      continue;
    }
    const T* row = logits_row<T>(a.in, n);
    const Partial p = entropy ? row_partial<true>(row, a.in.vocab, a.in.temperature)
                              : row_partial<false>(row, a.in.vocab, a.in.temperature);
    const double none = std::numeric_limits<double>::quiet_NaN();
    const bool empty = p.shift == -infinity<double>();  // no column has any mass
    const double log_total = empty ? none : std::log(p.sum);
    const int64_t token = a.in.tokens[n];
    const bool in_range = token >= 0 && token < a.in.vocab;
    shift[n] = static_cast<Acc>(p.shift);
    log_sum[n] = static_cast<Acc>(log_total);
    logprob[n] = static_cast<Acc>(
        in_range ? (static_cast<double>(widen(row[token])) - p.shift) / a.in.temperature - log_total : none);
    if (entropy) entropy[n] = static_cast<Acc>(empty ? none : log_total - p.weighted / p.sum);
  }
}

template <typename T>
inline T narrow_acc(typename AccOf<T>::type x) {
  if constexpr (sizeof(T) == 8) return x; else return narrow<T>(x);
}

template <typename T>
void token_stats_backward_rows(const TokenStatsBackwardArgs& a, int64_t begin, int64_t end) {
  using Acc = typename AccOf<T>::type;
  const auto* up_logprob = static_cast<const Acc*>(a.grad_logprob);
  const auto* up_entropy = static_cast<const Acc*>(a.grad_entropy);
  const auto* up_log_sum = static_cast<const Acc*>(a.grad_log_sum);
  const auto* entropy = static_cast<const Acc*>(a.entropy);
  const auto* shifts = static_cast<const Acc*>(a.shift);
  const auto* log_sums = static_cast<const Acc*>(a.log_sum);
  const Inverse<Acc> inverse(a.in.temperature);
  const Acc limit = flush_limit(Acc{});
  const int64_t vocab = a.in.vocab;
  for (int64_t n = begin; n < end; ++n) {
    T* out = static_cast<T*>(a.grad_logits) + n * vocab;
    if (a.in.mask && !a.in.mask[n]) {
      std::memset(out, 0, vocab * sizeof(T));
      continue;
    }
    const T* row = logits_row<T>(a.in, n);
    const Acc on_token = up_logprob ? up_logprob[n] : Acc{0};
    const Acc on_p = (up_log_sum ? up_log_sum[n] : Acc{0}) - on_token;
    const Acc on_entropy = up_entropy ? up_entropy[n] : Acc{0};
    const Acc h = up_entropy ? entropy[n] : Acc{0};
    const Acc shift = shifts[n], log_sum = log_sums[n];
    const auto gradient = [=](Acc x) {
      const Acc logp = inverse.distance(x, shift) - log_sum;
      const Acc p = exp_flushed(logp);
      return (on_p - on_entropy * ((logp < limit ? limit : logp) + h)) * p;
    };
    if (up_entropy) {
#pragma omp simd
      for (int64_t k = 0; k < vocab; ++k) out[k] = narrow_acc<T>(gradient(widen(row[k])) * inverse.high);
    } else {
#pragma omp simd
      for (int64_t k = 0; k < vocab; ++k) {
        const Acc p = exp_flushed(inverse.distance(widen(row[k]), shift) - log_sum);
        out[k] = narrow_acc<T>(on_p * p * inverse.high);
      }
    }
    const int64_t token = a.in.tokens[n];
    if (token >= 0 && token < vocab) {
      out[token] = narrow_acc<T>((on_token + gradient(widen(row[token]))) * inverse.high);
    } else {
      out[0] = narrow_acc<T>(std::numeric_limits<Acc>::quiet_NaN());  // its logprob is NaN as well
    }
  }
}

void token_stats(const TokenStatsArgs& a, int64_t begin, int64_t end) {
  switch (a.in.dtype) {
    case DType::f32: return token_stats_rows<float>(a, begin, end);
    case DType::f64: return token_stats_rows<double>(a, begin, end);
    case DType::bf16: return token_stats_rows<bfloat16>(a, begin, end);
    case DType::f16: return token_stats_rows<float16>(a, begin, end);
  }
}

void token_stats_backward(const TokenStatsBackwardArgs& a, int64_t begin, int64_t end) {
  switch (a.in.dtype) {
    case DType::f32: return token_stats_backward_rows<float>(a, begin, end);
    case DType::f64: return token_stats_backward_rows<double>(a, begin, end);
    case DType::bf16: return token_stats_backward_rows<bfloat16>(a, begin, end);
    case DType::f16: return token_stats_backward_rows<float16>(a, begin, end);
  }
}

}  // namespace
}  // namespace REWARDOPS_ISA
}  // namespace rewardops::cpu
