// Token statistics, forward: the outputs of a row, or its record of partial sums, from one read of the row (two where
// the Jensen-Shannon divergence is among the outputs).
#pragma once

#include "rewardops/cpu/logits_mixture.h"
#include "rewardops/cpu/logits_sums.h"

namespace rewardops::cpu {
namespace REWARDOPS_ISA {
namespace {

constexpr double kLn2 = 0.6931471805599453;

// Bits of Term that the outputs need.
inline int terms_of(const TokenStatsArgs& a) {
  int terms = 0;
  if (a.outputs[kEntropy]) terms |= kTermEntropy;
  if (a.outputs[kSumSq]) terms |= kTermSquares;
  if (a.outputs[kSumSqLogprob]) terms |= kTermSquares | kTermSquareLogs;
  if (a.outputs[kMeanLogit]) terms |= kTermMean;
  if (a.outputs[kKl]) terms |= kTermKl;
  if (a.outputs[kReverseKl]) terms |= kTermReverse;
  return terms;
}

// Partial statistics of a part of a row, to be merged with those of the other parts.
template <typename T>
inline void write_record(const TokenStatsArgs& a, int64_t n) {
  using Acc = typename AccOf<T>::type;
  double* r = a.record + n * kFields;
  for (int k = 0; k < kFields; ++k) r[k] = 0;
  if (a.in.masked(n)) return;
  const double t = a.in.temperature_of(n), none = std::numeric_limits<double>::quiet_NaN();
  const Sums s = sums_of<T>(a.in, n, a.terms, t);
  const auto [column, found] = TokenColumn(a.in, n);
  // The total of a part with a NaN or an infinity is NaN. So is its shift then, which all statistics depend on.
  r[kFieldShift] = s.total == s.total ? s.shift / t : none;
  r[kFieldTotal] = s.total;
  r[kFieldWeighted] = a.terms & kTermEntropy ? kLn2 * s.weighted : none;
  r[kFieldSquares] = a.terms & kTermSquares ? s.squares : none;
  r[kFieldSquaresWeighted] = a.terms & kTermSquareLogs ? kLn2 * s.squares_weighted : none;
  const double moved = s.empty() ? 0 : (s.origin - s.shift) * static_cast<double>(a.in.vocab);
  r[kFieldDistance] = a.terms & kTermMean ? (s.distance + moved) / t : none;
  r[kFieldColumns] = static_cast<double>(a.in.vocab);
  r[kFieldFound] = found;
  if (found) r[kFieldToken] = static_cast<double>(logit_at<Acc>(a.in.logits, n, column, a.in.softcap)) / t;
  if (!a.in.ref_logits.data) return;
  const double broken = infinity<double>();
  r[kFieldRefShift] = s.ref_total == s.ref_total ? s.ref_shift / t : none;
  r[kFieldRefTotal] = s.ref_total;
  if (found) r[kFieldRefToken] = static_cast<double>(logit_at<Acc>(a.in.ref_logits, n, column, a.in.softcap)) / t;
  r[kFieldKl] = !(a.terms & kTermKl) ? none : s.kl_broken ? broken : s.kl / t;
  r[kFieldReverse] = !(a.terms & kTermReverse) ? none : s.reverse_broken ? broken : s.reverse / t;
}

// Outputs of a row, and the statistics that the backward pass reads.
template <typename T>
inline void write_outputs(const TokenStatsArgs& a, int64_t n) {
  using Acc = typename AccOf<T>::type;
  const auto put = [&](Output o, double value) {
    if (a.outputs[o]) static_cast<Acc*>(a.outputs[o])[n] = static_cast<Acc>(value);
  };
  const auto save = [&](Saved row, double value) { a.saved[row * a.count + n] = value; };
  const auto put_top1 = [&](bool value) {
    if (a.outputs[kIsTop1]) static_cast<uint8_t*>(a.outputs[kIsTop1])[n] = value;
  };
  if (a.in.masked(n)) {
    for (int o = 0; o < kOutputs; ++o)
      if (o != kIsTop1) put(static_cast<Output>(o), 0);
    put_top1(false);
    return;  // `saved` was allocated as zeros
  }
  const double t = a.in.temperature_of(n), none = std::numeric_limits<double>::quiet_NaN();
  const Sums s = sums_of<T>(a.in, n, terms_of(a), t);
  const bool empty = s.empty();
  const double log_sum = empty ? none : std::log(s.total);
  const auto [column, found] = TokenColumn(a.in, n);
  const double at_token = found ? static_cast<double>(logit_at<Acc>(a.in.logits, n, column, a.in.softcap)) : none;
  const double entropy = log_sum - kLn2 * s.weighted / s.total, sum_sq = s.squares / (s.total * s.total);
  const double sum_sq_logprob = kLn2 * s.squares_weighted / (s.total * s.total) - log_sum * sum_sq;
  put(kLogprob, (at_token - s.shift) / t - log_sum);
  put(kEntropy, entropy);
  put(kLogsumexp, s.shift / t + log_sum);
  put(kSumSq, empty ? none : sum_sq);
  put(kSumSqLogprob, sum_sq_logprob);
  put(kMeanLogit, s.total != s.total ? none : (s.origin + s.distance / static_cast<double>(a.in.vocab)) / t);
  put_top1(at_token == s.shift && !empty && s.total == s.total);
  save(kShift, s.shift);
  save(kTotal, empty ? none : s.total);
  if (a.outputs[kEntropy]) save(kSavedEntropy, entropy);
  if (a.outputs[kSumSq] || a.outputs[kSumSqLogprob]) save(kSavedSumSq, sum_sq);
  if (a.outputs[kSumSqLogprob]) save(kSavedSumSqLogprob, sum_sq_logprob);
  if (!a.in.ref_logits.data) return;

  const bool ref_empty = s.ref_empty();
  const double ref_log_sum = ref_empty ? none : std::log(s.ref_total);
  const double ref_token = found ? static_cast<double>(logit_at<Acc>(a.in.ref_logits, n, column, a.in.softcap)) : none;
  const double normalisers = ref_log_sum - log_sum;
  const double kl = s.kl_broken && normalisers == normalisers ? infinity<double>() : s.kl / t / s.total + normalisers;
  const double reverse =
      s.reverse_broken && normalisers == normalisers ? infinity<double>() : s.reverse / t / s.ref_total - normalisers;
  put(kRefLogprob, (ref_token - s.ref_shift) / t - ref_log_sum);
  put(kKl, kl);
  put(kReverseKl, reverse);
  save(kRefShift, s.ref_shift);
  save(kRefTotal, ref_empty ? none : s.ref_total);
  if (a.outputs[kKl]) save(kSavedKl, kl);
  if (a.outputs[kReverseKl]) save(kSavedReverseKl, reverse);
  if (a.outputs[kJsd]) {
    const auto [mixed, ref_mixed] =
        mixed_divergences<Acc>(a.in, n, {t, s.shift, log_sum}, {t, s.ref_shift, ref_log_sum});
    put(kJsd, a.in.beta * ref_mixed + (1 - a.in.beta) * mixed);
    save(kMixedKl, mixed);
    save(kRefMixedKl, ref_mixed);
  }
}

template <typename T>
void token_stats_rows(const TokenStatsArgs& a, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    if (a.record) write_record<T>(a, n);
    else write_outputs<T>(a, n);
  }
}

}  // namespace

void token_stats(const TokenStatsArgs& a, int64_t begin, int64_t end) {
  const FlushSubnormals flush;
  switch (a.in.logits.dtype) {
    case DType::f32: return token_stats_rows<float>(a, begin, end);
    case DType::f64: return token_stats_rows<double>(a, begin, end);
    case DType::bf16: return token_stats_rows<bfloat16>(a, begin, end);
    case DType::f16: return token_stats_rows<float16>(a, begin, end);
  }
}

}  // namespace REWARDOPS_ISA
}  // namespace rewardops::cpu
