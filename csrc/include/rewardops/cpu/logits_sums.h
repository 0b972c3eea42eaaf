// Sums over the columns of one row of logits, and over two rows together where there is a reference.
//
// A row is summed in blocks. A block is summed quickly first, relative to the largest logit so far. A block with a
// logit as large (or -inf, or NaN), which happens a few times a row, is summed again exactly. Sums are float
// over the 64 terms of a lane and double beyond; exponents are powers of two until the end.
#pragma once

#include "rewardops/cpu/logits_load.h"

namespace rewardops::cpu {
namespace REWARDOPS_ISA {
namespace {

constexpr int64_t kAhead = 2 * kLogitsBlock;  // columns from a load to its prefetch

// ---- the sums of a row --------------------------------------------------------------------------------------

// Bits of the sums that are optional; the total is always computed.
enum Term : int {
  kTermEntropy = 1,
  kTermSquares = 2,
  kTermMean = 4,
  kTermKl = 8,
  kTermReverse = 16,
  kTermSquareLogs = 32
};  // kTermSquareLogs needs kTermSquares
constexpr int kPolicyTerms = kTermEntropy | kTermSquares | kTermSquareLogs | kTermMean;
constexpr int kAllTerms = kPolicyTerms | kTermKl | kTermReverse;

// With y = z - shift, u = x - ref_shift (z the logits, x the reference's) and e^ relative to the temperature:
struct Sums {
  double shift = -infinity<double>(), ref_shift = -infinity<double>();  // the largest logits so far
  double total = 0, ref_total = 0;                                      // sums of e^y, e^u
  double weighted = 0;                                                  // sum of e^y y, in powers of two
  double squares = 0;                                                   // sum of e^2y
  double squares_weighted = 0;                                          // sum of e^2y y, in powers of two
  double origin = 0, distance = 0;                 // sum of z - origin, the row's first logit (0 if not finite)
  double kl = 0, reverse = 0;                      // sums of e^y (y - u), e^u (u - y)
  bool kl_broken = false, reverse_broken = false;  // a column with mass on one side and none on the other

  bool empty() const { return shift == -infinity<double>(); }  // no column has any mass
  bool ref_empty() const { return ref_shift == -infinity<double>(); }

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

// Exponents of two relative to a shift. With fused multiply-add, which rounds once, the shift is
// scaled beforehand and rounded down, by `off`: no logit as large as the shift has a negative exponent.
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

// ---- one row ------------------------------------------------------------------------------------------------
//
// The loops below hold their sums in separate variables. As members of a struct, lanes of double are contracted to
// other fused operations, which gives other bits.

// Fast path: full lanes of one row. Where a logit reaches the shift, or is -inf or NaN, nothing is added and the
// result is false.
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

// Exact path: full lanes of one row, any logits up to the shift.
template <int kTerms, typename Acc>
REWARDOPS_ONCE void add_exactly(const Acc* x, int64_t n, Acc scale, Sums& sums) {
  using L = Lanes<Acc>;
  const L shift = L::splat(static_cast<Acc>(sums.shift)), scales = L::splat(scale);
  const L zero = L::splat(0), one = L::splat(1), low = L::splat(Acc(-2000));
  L total = zero, weighted = zero, squares = zero, square_logs = zero, ones = zero;
  for (int64_t k = 0; k < n; k += L::kWidth) {
    const L y = L::load(x + k) - shift, exponent = larger(low, y * scales), e = exp2(exponent);
    // The terms of the largest logit are exactly 1. They are summed apart from the rest, to keep the digits of
    // the tail: in a peaked row the entropy depends on the tail alone.
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
REWARDOPS_ONCE void add_block(const T* x, int64_t n, typename AccOf<T>::type scale, Sums& sums,
                              typename AccOf<T>::type* buffer) {
  using Acc = typename AccOf<T>::type;
  if (n == kLogitsBlock && sums.shift > -infinity<double>() && add_quickly<kTerms>(x, n, scale, sums)) return;
  const int64_t padded = padded_to_lanes<Acc>(n);
  for (int64_t k = 0; k < n; ++k) buffer[k] = widen(x[k]);
  for (int64_t k = n; k < padded; ++k) buffer[k] = -infinity<Acc>();
  const double top = largest_of(buffer, padded);
  if (top > sums.shift) sums.move_shift(top, scale);
  if (kTerms & kTermMean)
    for (int64_t k = 0; k < n; ++k) sums.distance += static_cast<double>(buffer[k]) - sums.origin;
  if (sums.empty()) {
    // All logits so far are -inf, without mass; a NaN among them must still reach the sums.
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
    const int64_t count = columns_of_block(in, start);
    if constexpr (kLoads<T>) {
      if (!(in.softcap > 0)) {
        add_block<kTerms, T>(row + start, count, scale, sums, buffer);
        continue;
      }
    }
    add_block<kTerms, Acc>(load_block(row + start, count, in.softcap, cap_buffer), count, scale, sums, buffer);
  }
  return sums;
}

// ---- with a reference: both rows together -------------------------------------------------------------------

template <int kTerms, typename T, typename Acc>
REWARDOPS_ONCE bool add_pair_quickly(const T* z, const T* x, int64_t n, Acc scale, Sums& sums) {
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
      // Differences are taken before scaling, each from its own shift: exact near the largest logits.
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

// Adds a block of both rows, from the buffers.
template <int kTerms, typename Acc>
REWARDOPS_ONCE void add_pair_block(Acc* z, Acc* x, int64_t n, Acc scale, Sums& sums) {
  constexpr Acc kNone = -infinity<Acc>();
  const int64_t padded = padded_to_lanes<Acc>(n);
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
  const bool direct = kLoads<T> && in.logits.dtype == in.ref_logits.dtype && !(in.softcap > 0);
  Sums sums;
  for (int64_t start = 0; start < in.vocab; start += kLogitsBlock) {
    const int64_t count = columns_of_block(in, start);
    const bool begun = sums.shift > -infinity<double>() && sums.ref_shift > -infinity<double>();
    const bool quick = count == kLogitsBlock && begun;
    bool added = false;
    if constexpr (kLoads<T>) {
      if (direct && quick)
        added = add_pair_quickly<kTerms>(logits_row<T>(in.logits, n) + start, logits_row<T>(in.ref_logits, n) + start,
                                         count, scale, sums);
    }
    if (!added) {
      const Acc* zs = load_block(in.logits, n, start, count, in.softcap, z);
      const Acc* xs = load_block(in.ref_logits, n, start, count, in.softcap, x);
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

// The sums of a row for a set of terms. Each common combination has its own loops; all others share one.
template <typename T>
inline Sums sums_of(const LogitsArgs& in, int64_t n, int terms, double temperature) {
  if (in.ref_logits.data) {
    if (!(terms & ~kTermKl)) return pair_sums<kTermKl, T>(in, n, temperature);
    if (!(terms & ~(kTermKl | kTermEntropy))) return pair_sums<kTermKl | kTermEntropy, T>(in, n, temperature);
    return pair_sums<kAllTerms, T>(in, n, temperature);
  }
  if (!terms) return row_sums<0, T>(in, n, temperature);
  if (terms == kTermEntropy) return row_sums<kTermEntropy, T>(in, n, temperature);
  return row_sums<kPolicyTerms, T>(in, n, temperature);
}

}  // namespace
}  // namespace REWARDOPS_ISA
}  // namespace rewardops::cpu
