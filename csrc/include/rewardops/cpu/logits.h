// Token statistics, forward: one read of each row.
//
// A row is taken in blocks. A block is summed quickly, relative to the largest logit so far, and again exactly where it
// turns out to hold one as large (or -inf, or NaN); that happens a few times a row. Sums run in float over the 64
// terms of a lane and in double beyond; exponents are in powers of two until the end.
#pragma once

#include "rewardops/cpu/kernels.h"
#include "rewardops/cpu/math.h"
#include "rewardops/cpu/simd.h"

namespace rewardops::cpu {
namespace REWARDOPS_ISA {
namespace {

constexpr int64_t kLogitsBlock = 1024;
constexpr int64_t kAhead = 2 * kLogitsBlock;  // how far ahead of their use columns are asked for
constexpr double kLn2 = 0.6931471805599453;

template <typename T> struct AccOf { using type = float; };
template <> struct AccOf<double> { using type = double; };

template <typename T>
inline T* logits_row(const LogitsRows& rows, int64_t n) {
  return static_cast<T*>(const_cast<void*>(rows.data)) + rows.offset(n);
}

template <typename Acc>
inline Acc capped(Acc x, Acc cap, Acc inverse_cap) { return cap * tanh_any(x * inverse_cap); }

template <typename Acc>
inline Acc capped(Acc x, double softcap) {
  return softcap > 0 ? capped(x, static_cast<Acc>(softcap), static_cast<Acc>(1.0 / softcap)) : x;
}

// Columns of a row in the accumulation type, the softcap applied: in the buffer, or where they lie.
template <typename T, typename Acc>
inline const Acc* load_block(const T* x, int64_t n, double softcap, Acc* buffer) {
  if (softcap > 0) {
    const Acc cap = static_cast<Acc>(softcap), inverse = static_cast<Acc>(1.0 / softcap);
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) buffer[k] = capped(static_cast<Acc>(widen(x[k])), cap, inverse);
    return buffer;
  }
  if constexpr (sizeof(T) == sizeof(Acc)) return x;
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) buffer[k] = widen(x[k]);
  return buffer;
}

template <typename Acc>
inline const Acc* load_block(const LogitsRows& rows, int64_t n, int64_t start, int64_t count, double softcap,
                             Acc* buffer) {
  if constexpr (sizeof(Acc) == 8) {
    return load_block(logits_row<double>(rows, n) + start, count, softcap, buffer);
  } else {
    switch (rows.dtype) {
      case DType::bf16: return load_block(logits_row<bfloat16>(rows, n) + start, count, softcap, buffer);
      case DType::f16: return load_block(logits_row<float16>(rows, n) + start, count, softcap, buffer);
      default: return load_block(logits_row<float>(rows, n) + start, count, softcap, buffer);
    }
  }
}

// One logit, the softcap applied.
template <typename Acc>
inline Acc logit_at(const LogitsRows& rows, int64_t n, int64_t column, double softcap) {
  Acc buffer;
  return *load_block(rows, n, column, 1, softcap, &buffer);
}

// ---- sums ---------------------------------------------------------------------------------------------------

// Which sums are taken beside the total.
enum Term : int { kTermEntropy = 1, kTermSquares = 2, kTermMean = 4, kTermKl = 8, kTermReverse = 16,
                  kTermSquareLogs = 32 };  // the last with kTermSquares alone
constexpr int kPolicyTerms = kTermEntropy | kTermSquares | kTermSquareLogs | kTermMean;
constexpr int kAllTerms = kPolicyTerms | kTermKl | kTermReverse;

// With y = z - shift, u = x - ref_shift (z the logits, x the reference's) and e^ relative to the temperature:
struct Sums {
  double shift = -infinity<double>(), ref_shift = -infinity<double>();  // the largest logits so far
  double total = 0, ref_total = 0;  // of e^y, e^u
  double weighted = 0;              // of e^y y, in powers of two
  double squares = 0;               // of e^2y
  double squares_weighted = 0;      // of e^2y y, in powers of two
  double origin = 0, distance = 0;  // of z - origin, the row's first logit (0 where that is not finite)
  double kl = 0, reverse = 0;       // of e^y (y - u), e^u (u - y)
  bool kl_broken = false, reverse_broken = false;  // a column with mass on one side and none on the other

  void move_shift(double to, double scale) {
    if (shift > -infinity<double>()) {
      const double gap = shift - to, factor = std::exp2(gap * scale);
      weighted = factor * (weighted + total * gap * scale);
      kl = factor * (kl + total * gap);
      reverse -= ref_total * gap;
      squares_weighted = factor * factor * (squares_weighted + squares * gap * scale);
      squares *= factor * factor;
      total *= factor;
    }
    shift = to;
  }
  void move_ref_shift(double to, double scale) {
    if (ref_shift > -infinity<double>()) {
      const double gap = ref_shift - to, factor = std::exp2(gap * scale);
      reverse = factor * (reverse + ref_total * gap);
      kl -= total * gap;
      ref_total *= factor;
    }
    ref_shift = to;
  }
};

// The largest entry, NaN aside; n is a multiple of the lanes.
template <typename Acc>
inline Acc largest_of(const Acc* x, int64_t n) {
  Lanes<Acc> top = Lanes<Acc>::splat(-infinity<Acc>());
  for (int64_t k = 0; k < n; k += Lanes<Acc>::kWidth) top = larger(Lanes<Acc>::load(x + k), top);
  return top.largest();
}

// Exponents of two relative to a shift. Where a product and a sum are one instruction they take one rounding together,
// and the shift is scaled beforehand: rounded down, so that no logit as large has a negative exponent, by `off`.
template <typename Acc>
struct Exponents {
  using L = Lanes<Acc>;
  L shift, scale;
  double off = 0;
  Exponents(double at, Acc by) : shift(L::splat(static_cast<Acc>(at))), scale(L::splat(by)) {
    if (!L::kFused) return;
    const double exact = at * static_cast<double>(by);
    Acc down = static_cast<Acc>(exact);
    down -= std::fabs(down) * 2 * std::numeric_limits<Acc>::epsilon();
    off = static_cast<double>(down) - exact;
    shift = L::splat(-down);
  }
  L of(L x) const { return L::kFused ? fma(x, scale, shift) : (x - shift) * scale; }
};

// The quick way: full lanes of one row. Where a logit reaches the shift, or is -inf or NaN, nothing is added and false
// returned.
template <int kTerms, typename T, typename Acc>
inline bool add_quickly(const T* x, int64_t n, Acc scale, Sums& sums) {
  using L = Lanes<Acc>;
  const Exponents<Acc> exponents(sums.shift, scale);
  const L zero = L::splat(0), origin = L::splat(static_cast<Acc>(sums.origin));
  L total = zero, weighted = zero, squares = zero, square_logs = zero, distance = zero, below = L::splat(Acc(-1));
  for (int64_t k = 0; k < n; k += 2 * L::kWidth) {
    __builtin_prefetch(x + k + kAhead);
    if (sizeof(T) >= 4) __builtin_prefetch(x + k + kAhead + L::kWidth);
    L pair[2];
    L::load_two(x + k, &pair[0], &pair[1]);
    for (const L& v : pair) {
      const L exponent = exponents.of(v), e = exp2(exponent);
      below = both_negative(below, exponent);
      total = total + e;
      if (kTerms & kTermEntropy) weighted = fma(e, exponent, weighted);
      if (kTerms & kTermSquares) squares = fma(e, e, squares);
      if (kTerms & kTermSquareLogs) square_logs = fma(e * e, exponent, square_logs);
      if (kTerms & kTermMean) distance = distance + (v - origin);
    }
  }
  const double t = total.sum(), w = weighted.sum(), factor = std::exp2(exponents.off);
  if (!(below.all_negative() && t + w - (t + w) == 0)) return false;
  sums.total += factor * t;
  if (kTerms & kTermEntropy) sums.weighted += factor * (w + exponents.off * t);
  if (kTerms & kTermSquares) {
    const double s = squares.sum(), square = factor * factor;
    sums.squares += square * s;
    if (kTerms & kTermSquareLogs) sums.squares_weighted += square * (square_logs.sum() + exponents.off * s);
  }
  if (kTerms & kTermMean) sums.distance += distance.sum();
  return true;
}

// The exact way: full lanes of one row, of any logits up to the shift.
template <int kTerms, typename Acc>
inline void add_exactly(const Acc* x, int64_t n, Acc scale, Sums& sums) {
  using L = Lanes<Acc>;
  const L shift = L::splat(static_cast<Acc>(sums.shift)), scales = L::splat(scale);
  const L zero = L::splat(0), one = L::splat(1), low = L::splat(Acc(-2000));
  L total = zero, weighted = zero, squares = zero, square_logs = zero, ones = zero;
  for (int64_t k = 0; k < n; k += L::kWidth) {
    const L y = L::load(x + k) - shift, exponent = larger(low, y * scales), e = exp2(exponent);
    // The terms of the largest logit are exactly 1. Summed apart from the rest they do not swallow the digits of a
    // peaked row's tail, which are all that its entropy is made of.
    total = total + if_zero(y, zero, e);
    ones = ones + if_zero(y, one, zero);
    if (kTerms & kTermEntropy) weighted = fma(e, exponent, weighted);
    if (kTerms & kTermSquares) squares = fma(e, e, squares);
    if (kTerms & kTermSquareLogs) square_logs = fma(e * e, exponent, square_logs);
  }
  sums.total += ones.sum();
  sums.total += total.sum();
  if (kTerms & kTermEntropy) sums.weighted += weighted.sum();
  if (kTerms & kTermSquares) sums.squares += squares.sum();
  if (kTerms & kTermSquareLogs) sums.squares_weighted += square_logs.sum();
}

template <int kTerms, typename T>
inline void add_block(const T* x, int64_t n, typename AccOf<T>::type scale, Sums& sums,
                      typename AccOf<T>::type* buffer) {
  using Acc = typename AccOf<T>::type;
  if (n == kLogitsBlock && sums.shift > -infinity<double>() && add_quickly<kTerms>(x, n, scale, sums))
    return;
  const int64_t padded = (n + Lanes<Acc>::kWidth - 1) / Lanes<Acc>::kWidth * Lanes<Acc>::kWidth;
  for (int64_t k = 0; k < n; ++k) buffer[k] = widen(x[k]);
  for (int64_t k = n; k < padded; ++k) buffer[k] = -infinity<Acc>();
  const double top = largest_of(buffer, padded);
  if (top > sums.shift) sums.move_shift(top, scale);
  if (kTerms & kTermMean)
    for (int64_t k = 0; k < n; ++k) sums.distance += static_cast<double>(buffer[k]) - sums.origin;
  if (sums.shift == -infinity<double>()) {
    // All -inf so far, which has no mass; a NaN among them must still be seen.
    for (int64_t k = 0; k < n; ++k) sums.total += buffer[k] == buffer[k] ? 0.0 : static_cast<double>(buffer[k]);
    return;
  }
  add_exactly<kTerms>(buffer, padded, scale, sums);
}

template <typename Acc>
inline double origin_of(const LogitsArgs& in, int64_t n) {
  const double x = in.vocab > 0 ? static_cast<double>(logit_at<Acc>(in.logits, n, 0, in.softcap)) : 0;
  return x - x == 0 ? x : 0;
}

template <int kTerms, typename T>
inline Sums row_sums(const LogitsArgs& in, int64_t n, double temperature) {
  using Acc = typename AccOf<T>::type;
  alignas(64) Acc buffer[kLogitsBlock];
  alignas(64) Acc cap_buffer[kLogitsBlock];
  const T* row = logits_row<T>(in.logits, n);
  const Acc scale = static_cast<Acc>(1.4426950408889634 / temperature);
  Sums sums;
  if (kTerms & kTermMean) sums.origin = origin_of<Acc>(in, n);
  for (int64_t start = 0; start < in.vocab; start += kLogitsBlock) {
    const int64_t count = in.vocab - start < kLogitsBlock ? in.vocab - start : kLogitsBlock;
    if (in.softcap > 0)
      add_block<kTerms, Acc>(load_block(row + start, count, in.softcap, cap_buffer), count, scale, sums, buffer);
    else
      add_block<kTerms, T>(row + start, count, scale, sums, buffer);
  }
  return sums;
}

// ---- with a reference: both rows together -------------------------------------------------------------------

template <int kTerms, typename T, typename Acc>
inline bool add_pair_quickly(const T* z, const T* x, int64_t n, Acc scale, Sums& sums) {
  using L = Lanes<Acc>;
  const Exponents<Acc> exponents(sums.shift, scale), ref_exponents(sums.ref_shift, scale);
  const L shift = L::splat(static_cast<Acc>(sums.shift)), ref_shift = L::splat(static_cast<Acc>(sums.ref_shift));
  const L zero = L::splat(0), origin = L::splat(static_cast<Acc>(sums.origin));
  L total = zero, weighted = zero, squares = zero, square_logs = zero, distance = zero, kl = zero;
  L ref_total = zero, reverse = zero, below = L::splat(Acc(-1));
  for (int64_t k = 0; k < n; k += 2 * L::kWidth) {
    __builtin_prefetch(z + k + kAhead);
    __builtin_prefetch(x + k + kAhead);
    if (sizeof(T) >= 4) __builtin_prefetch(z + k + kAhead + L::kWidth);
    if (sizeof(T) >= 4) __builtin_prefetch(x + k + kAhead + L::kWidth);
    L zs[2], xs[2];
    L::load_two(z + k, &zs[0], &zs[1]);
    L::load_two(x + k, &xs[0], &xs[1]);
    for (int i = 0; i < 2; ++i) {
      const L exponent = exponents.of(zs[i]), ref_exponent = ref_exponents.of(xs[i]);
      // Before scaling, and each from its own shift: that is exact where it matters.
      const L e = exp2(exponent), r = exp2(ref_exponent), gap = (zs[i] - shift) - (xs[i] - ref_shift);
      below = both_negative(both_negative(below, exponent), ref_exponent);
      total = total + e;
      ref_total = ref_total + r;
      kl = fma(e, gap, kl);
      if (kTerms & kTermEntropy) weighted = fma(e, exponent, weighted);
      if (kTerms & kTermSquares) squares = fma(e, e, squares);
      if (kTerms & kTermSquareLogs) square_logs = fma(e * e, exponent, square_logs);
      if (kTerms & kTermMean) distance = distance + (zs[i] - origin);
      if (kTerms & kTermReverse) reverse = reverse - r * gap;
    }
  }
  const double t = total.sum(), w = weighted.sum(), r = ref_total.sum(), d = distance.sum();
  const double g = kl.sum(), h = reverse.sum(), all = t + w + r + d + g + h;
  if (!(below.all_negative() && all - all == 0)) return false;
  const double factor = std::exp2(exponents.off), ref_factor = std::exp2(ref_exponents.off);
  sums.total += factor * t;
  sums.ref_total += ref_factor * r;
  sums.kl += factor * g;
  if (kTerms & kTermEntropy) sums.weighted += factor * (w + exponents.off * t);
  if (kTerms & kTermSquares) {
    const double s = squares.sum(), square = factor * factor;
    sums.squares += square * s;
    if (kTerms & kTermSquareLogs) sums.squares_weighted += square * (square_logs.sum() + exponents.off * s);
  }
  if (kTerms & kTermMean) sums.distance += d;
  if (kTerms & kTermReverse) sums.reverse += ref_factor * h;
  return true;
}

template <int kTerms, typename Acc>
inline void add_pair_exactly(const Acc* z, const Acc* x, int64_t n, Acc scale, Sums& sums) {
  using L = Lanes<Acc>;
  const auto shift_of = [](double s) { return L::splat(s == -infinity<double>() ? Acc(0) : static_cast<Acc>(s)); };
  const L shift = shift_of(sums.shift), ref_shift = shift_of(sums.ref_shift), scales = L::splat(scale);
  const L zero = L::splat(0), one = L::splat(1), low = L::splat(Acc(-2000));
  const L lowest = L::splat(std::numeric_limits<Acc>::lowest());  // in place of -inf, so that no inf - inf arises
  L total = zero, weighted = zero, squares = zero, square_logs = zero, ones = zero, kl = zero;
  L ref_total = zero, ref_ones = zero, reverse = zero;
  for (int64_t k = 0; k < n; k += L::kWidth) {
    const L y = larger(lowest, L::load(z + k)) - shift, u = larger(lowest, L::load(x + k)) - ref_shift;
    const L exponent = larger(low, y * scales), ref_exponent = larger(low, u * scales);
    const L e = exp2(exponent), r = exp2(ref_exponent), gap = y - u;
    total = total + if_zero(y, zero, e);
    ones = ones + if_zero(y, one, zero);
    ref_total = ref_total + if_zero(u, zero, r);
    ref_ones = ref_ones + if_zero(u, one, zero);
    kl = fma(e, gap, kl);
    if (kTerms & kTermEntropy) weighted = fma(e, exponent, weighted);
    if (kTerms & kTermSquares) squares = fma(e, e, squares);
    if (kTerms & kTermSquareLogs) square_logs = fma(e * e, exponent, square_logs);
    if (kTerms & kTermReverse) reverse = reverse - r * gap;
  }
  sums.total += ones.sum();
  sums.total += total.sum();
  sums.ref_total += ref_ones.sum();
  sums.ref_total += ref_total.sum();
  sums.kl += kl.sum();
  if (kTerms & kTermEntropy) sums.weighted += weighted.sum();
  if (kTerms & kTermSquares) sums.squares += squares.sum();
  if (kTerms & kTermSquareLogs) sums.squares_weighted += square_logs.sum();
  if (kTerms & kTermReverse) sums.reverse += reverse.sum();
}

// A block from rows in the buffers.
template <int kTerms, typename Acc>
inline void add_pair_block(Acc* z, Acc* x, int64_t n, Acc scale, Sums& sums) {
  constexpr Acc kNone = -infinity<Acc>();
  const int64_t padded = (n + Lanes<Acc>::kWidth - 1) / Lanes<Acc>::kWidth * Lanes<Acc>::kWidth;
  for (int64_t k = n; k < padded; ++k) z[k] = x[k] = kNone;
  const double top = largest_of(z, padded), ref_top = largest_of(x, padded);
  if (top > sums.shift) sums.move_shift(top, scale);
  if (ref_top > sums.ref_shift) sums.move_ref_shift(ref_top, scale);
  for (int64_t k = 0; k < n; ++k) {
    sums.kl_broken |= (x[k] == kNone) & (z[k] > kNone);
    sums.reverse_broken |= (z[k] == kNone) & (x[k] > kNone);
  }
  add_pair_exactly<kTerms>(z, x, padded, scale, sums);
  if (kTerms & kTermMean)
    for (int64_t k = 0; k < n; ++k) sums.distance += static_cast<double>(z[k]) - sums.origin;
}

template <int kTerms, typename T>
inline Sums pair_sums(const LogitsArgs& in, int64_t n, double temperature) {
  using Acc = typename AccOf<T>::type;
  alignas(64) Acc z[kLogitsBlock];
  alignas(64) Acc x[kLogitsBlock];
  const Acc scale = static_cast<Acc>(1.4426950408889634 / temperature);
  const bool direct = in.logits.dtype == in.ref.dtype && !(in.softcap > 0);
  Sums sums;
  for (int64_t start = 0; start < in.vocab; start += kLogitsBlock) {
    const int64_t count = in.vocab - start < kLogitsBlock ? in.vocab - start : kLogitsBlock;
    const bool begun = sums.shift > -infinity<double>() && sums.ref_shift > -infinity<double>();
    const bool quick = count == kLogitsBlock && begun;
    bool added = false;
    if (direct && quick)
      added = add_pair_quickly<kTerms>(logits_row<T>(in.logits, n) + start, logits_row<T>(in.ref, n) + start, count,
                                       scale, sums);
    if (!added) {
      const Acc* zs = load_block(in.logits, n, start, count, in.softcap, z);
      const Acc* xs = load_block(in.ref, n, start, count, in.softcap, x);
      if (!direct && quick) added = add_pair_quickly<kTerms>(zs, xs, count, scale, sums);
      if (!added) {
        if (zs != z) std::memcpy(z, zs, count * sizeof(Acc));
        if (xs != x) std::memcpy(x, xs, count * sizeof(Acc));
        add_pair_block<kTerms>(z, x, count, scale, sums);
      }
    }
  }
  return sums;
}

template <typename T>
inline Sums sums_of(const LogitsArgs& in, int64_t n, int terms, double temperature) {
  if (in.ref.data) {
    if (!(terms & ~kTermKl)) return pair_sums<kTermKl, T>(in, n, temperature);
    if (!(terms & ~(kTermKl | kTermEntropy))) return pair_sums<kTermKl | kTermEntropy, T>(in, n, temperature);
    return pair_sums<kAllTerms, T>(in, n, temperature);
  }
  if (!terms) return row_sums<0, T>(in, n, temperature);
  if (terms == kTermEntropy) return row_sums<kTermEntropy, T>(in, n, temperature);
  return row_sums<kPolicyTerms, T>(in, n, temperature);
}

// ---- the Jensen-Shannon divergence: a second pass, with both normalisers ------------------------------------

// Of two log-probabilities and their mixture m = beta q + (1 - beta) p: log p - log m and log q - log m.
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
  // Of a logit to the row's largest; -inf becomes a distance that is as good, and makes no inf - inf.
  Acc distance(Acc x, Acc shift) const {
    const Acc y = x - shift;
    const Acc c = y < Acc(-1e30) ? Acc(-1e30) : y;
    return c * high + c * low;
  }
};

template <typename Acc>
inline void mixed_divergences(const LogitsArgs& in, int64_t n, double temperature, Acc shift, Acc log_sum,
                              Acc ref_shift, Acc ref_log_sum, double* mixed, double* ref_mixed) {
  alignas(64) Acc z[kLogitsBlock];
  alignas(64) Acc x[kLogitsBlock];
  const Inverse<Acc> inverse(temperature);
  const Acc beta = static_cast<Acc>(in.beta);
  *mixed = *ref_mixed = 0;
  for (int64_t start = 0; start < in.vocab; start += kLogitsBlock) {
    const int64_t count = in.vocab - start < kLogitsBlock ? in.vocab - start : kLogitsBlock;
    const Acc* zs = load_block(in.logits, n, start, count, in.softcap, z);
    const Acc* xs = load_block(in.ref, n, start, count, in.softcap, x);
    Acc sum = 0, ref_sum = 0;
#pragma omp simd reduction(+ : sum, ref_sum)
    for (int64_t k = 0; k < count; ++k) {
      const Acc logp = inverse.distance(zs[k], shift) - log_sum;
      const Acc logq = inverse.distance(xs[k], ref_shift) - ref_log_sum;
      const Mixture<Acc> m(logp, logq, beta);
      sum += exp_flushed(logp) * m.excess;
      ref_sum += exp_flushed(logq) * m.ref_excess;
    }
    *mixed += sum;
    *ref_mixed += ref_sum;
  }
}

// ---- rows ---------------------------------------------------------------------------------------------------

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

template <typename T>
inline void write_record(const TokenStatsArgs& a, int64_t n) {
  using Acc = typename AccOf<T>::type;
  double* r = a.record + n * kFields;
  for (int k = 0; k < kFields; ++k) r[k] = 0;
  if (a.in.masked(n)) return;
  const double t = a.in.temperature_of(n), none = std::numeric_limits<double>::quiet_NaN();
  const Sums s = sums_of<T>(a.in, n, a.terms, t);
  const int64_t column = a.in.tokens[n] - a.in.first;
  const bool found = column >= 0 && column < a.in.vocab;
  r[kFieldShift] = s.shift / t;
  r[kFieldTotal] = s.total;
  r[kFieldWeighted] = a.terms & kTermEntropy ? kLn2 * s.weighted : none;
  r[kFieldSquares] = a.terms & kTermSquares ? s.squares : none;
  r[kFieldSquaresWeighted] = a.terms & kTermSquareLogs ? kLn2 * s.squares_weighted : none;
  const double moved = s.shift == -infinity<double>() ? 0 : (s.origin - s.shift) * static_cast<double>(a.in.vocab);
  r[kFieldDistance] = a.terms & kTermMean ? (s.distance + moved) / t : none;
  r[kFieldColumns] = static_cast<double>(a.in.vocab);
  r[kFieldFound] = found;
  if (found) r[kFieldToken] = static_cast<double>(logit_at<Acc>(a.in.logits, n, column, a.in.softcap)) / t;
  if (!a.in.ref.data) return;
  const double broken = infinity<double>();
  r[kFieldRefShift] = s.ref_shift / t;
  r[kFieldRefTotal] = s.ref_total;
  if (found) r[kFieldRefToken] = static_cast<double>(logit_at<Acc>(a.in.ref, n, column, a.in.softcap)) / t;
  r[kFieldKl] = !(a.terms & kTermKl) ? none : s.kl_broken ? broken : s.kl / t;
  r[kFieldReverse] = !(a.terms & kTermReverse) ? none : s.reverse_broken ? broken : s.reverse / t;
}

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
    for (int o = 0; o < kOutputs; ++o) if (o != kIsTop1) put(static_cast<Output>(o), 0);
    put_top1(false);
    return;  // what is saved was zeroed when allocated
  }
  const double t = a.in.temperature_of(n), none = std::numeric_limits<double>::quiet_NaN();
  const Sums s = sums_of<T>(a.in, n, terms_of(a), t);
  const bool empty = s.shift == -infinity<double>();  // no column has any mass
  const double log_sum = empty ? none : std::log(s.total);
  const int64_t column = a.in.tokens[n] - a.in.first;
  const bool found = column >= 0 && column < a.in.vocab;
  const double at_token = found ? static_cast<double>(logit_at<Acc>(a.in.logits, n, column, a.in.softcap)) : none;
  const double entropy = log_sum - kLn2 * s.weighted / s.total, sum_sq = s.squares / (s.total * s.total);
  const double sum_sq_logprob = kLn2 * s.squares_weighted / (s.total * s.total) - log_sum * sum_sq;
  put(kLogprob, (at_token - s.shift) / t - log_sum);
  put(kEntropy, entropy);
  put(kLogsumexp, s.shift / t + log_sum);
  put(kSumSq, empty ? none : sum_sq);
  put(kSumSqLogprob, sum_sq_logprob);
  put(kMeanLogit, (s.origin + s.distance / static_cast<double>(a.in.vocab)) / t);
  put_top1(at_token == s.shift && !empty && s.total == s.total);
  save(kShift, s.shift);
  save(kTotal, empty ? none : s.total);
  if (a.outputs[kEntropy]) save(kSavedEntropy, entropy);
  if (a.outputs[kSumSq] || a.outputs[kSumSqLogprob]) save(kSavedSumSq, sum_sq);
  if (a.outputs[kSumSqLogprob]) save(kSavedSumSqLogprob, sum_sq_logprob);
  if (!a.in.ref.data) return;

  const bool ref_empty = s.ref_shift == -infinity<double>();
  const double ref_log_sum = ref_empty ? none : std::log(s.ref_total);
  const double ref_token = found ? static_cast<double>(logit_at<Acc>(a.in.ref, n, column, a.in.softcap)) : none;
  const double normalisers = ref_log_sum - log_sum;
  const double kl = s.kl_broken && normalisers == normalisers ? infinity<double>() : s.kl / t / s.total + normalisers;
  const double reverse = s.reverse_broken && normalisers == normalisers ? infinity<double>()
                                                                       : s.reverse / t / s.ref_total - normalisers;
  put(kRefLogprob, (ref_token - s.ref_shift) / t - ref_log_sum);
  put(kKl, kl);
  put(kReverseKl, reverse);
  save(kRefShift, s.ref_shift);
  save(kRefTotal, ref_empty ? none : s.ref_total);
  if (a.outputs[kKl]) save(kSavedKl, kl);
  if (a.outputs[kReverseKl]) save(kSavedReverseKl, reverse);
  if (a.outputs[kJsd]) {
    double mixed, ref_mixed;
    mixed_divergences(a.in, n, t, static_cast<Acc>(s.shift), static_cast<Acc>(log_sum), static_cast<Acc>(s.ref_shift),
                      static_cast<Acc>(ref_log_sum), &mixed, &ref_mixed);
    put(kJsd, a.in.beta * ref_mixed + (1 - a.in.beta) * mixed);
    save(kMixedKl, mixed);
    save(kRefMixedKl, ref_mixed);
  }
}

template <typename T>
void token_stats_rows(const TokenStatsArgs& a, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    if (a.record) write_record<T>(a, n); else write_outputs<T>(a, n);
  }
}

void token_stats(const TokenStatsArgs& a, int64_t begin, int64_t end) {
  const FlushSubnormals flush;
  switch (a.in.logits.dtype) {
    case DType::f32: return token_stats_rows<float>(a, begin, end);
    case DType::f64: return token_stats_rows<double>(a, begin, end);
    case DType::bf16: return token_stats_rows<bfloat16>(a, begin, end);
    case DType::f16: return token_stats_rows<float16>(a, begin, end);
  }
}

}  // namespace
}  // namespace REWARDOPS_ISA
}  // namespace rewardops::cpu
