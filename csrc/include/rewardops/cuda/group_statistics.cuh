// Statistics of the rewards of a group, and the advantage of a member with its derivatives.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "rewardops/cuda/group_members.cuh"

namespace rewardops::cuda::advantages {

// ---- rewards of a set --------------------------------------------------------------------------------------

// A finite number to centre rewards on: the reward, or 0.
__device__ inline double origin(double reward) { return fabs(reward) < kInfinity ? reward : 0; }

// Summarizes the rewards of a set, the std only if `squares`. Rewards are centred on the smallest one first, so that
// rewards near 1000 keep the digits of their differences. Equal rewards are detected by comparison: their computed std
// is rounding error, not 0. Infinite rewards make moments infinite or NaN, whatever their place.
template <typename T, bool kBackward>
__device__ void summarize(const Members<T, kBackward>& members, int ddof, bool squares, RewardSummary& result) {
  using M = const Member<T>&;
  double ends[2] = {kInfinity, kInfinity};
  members.each([&](M m) {
    if (m.row < 0) return;
    ends[0] = MinOrNan()(ends[0], m.reward);
    ends[1] = MinOrNan()(ends[1], -m.reward);
  });
  members.reduce(ends, MinOrNan());
  RewardSummary s{0, ends[0], -ends[1], 0, 0, 0, false};
  double sums[3] = {};
  members.each([&](M m) {
    if (m.row < 0) return;
    sums[0] += m.reward - origin(s.low);
    sums[1] += fabs(static_cast<double>(m.reward));
    sums[2] += 1;
  });
  members.reduce(sums, Add());
  s.n = sums[2];
  s.differs = s.n > 0 && !(s.low == s.high && fabs(s.low) < kInfinity);
  s.mean_above = sums[0] / max(s.n, 1.0);
  s.mean_abs = sums[1] / max(s.n, 1.0);
  if (squares && s.differs) {
    // In units of a power of two of which neither squares nor their sum leave the range of double.
    const double spread = s.high - s.low, unit = spread > 0x1p400 ? 0x1p-600 : spread < 0x1p-400 ? 0x1p600 : 1;
    double square[1] = {};
    members.each([&](M m) {
      const double centred = (m.reward - origin(s.low) - s.mean_above) * unit;
      if (m.row >= 0) square[0] += centred * centred;
    });
    members.reduce(square, Add());
    s.std = sqrt(square[0] / max(s.n - ddof, 1.0)) / unit;
  }
  if (threadIdx.x == 0) result = s;
  __syncthreads();
}

// ---- order statistics --------------------------------------------------------------------------------------

// An integer in the order of the floating-point numbers; both zeros have the same one.
template <typename T>
struct Key {
  using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  static constexpr Bits kLowest = std::numeric_limits<Bits>::min(), kHighest = std::numeric_limits<Bits>::max();

  __device__ static Bits of(T number) {
    number += T{0};
    Bits bits;
    memcpy(&bits, &number, sizeof bits);
    return bits < 0 ? bits ^ kHighest : bits;
  }
  __device__ static T number(Bits key) {
    const Bits bits = key < 0 ? key ^ kHighest : key;
    T number;
    memcpy(&number, &bits, sizeof number);
    return number;
  }
};

// The rewards of rank `rank` (0: the smallest) and, if `next`, of the rank after it, by bisection over all numbers.
// Otherwise both are the first.
template <typename T, bool kBackward>
__device__ void find_ranked(const Members<T, kBackward>& members, int rank, bool next, double& below, double& above) {
  auto lower = Key<T>::kLowest, upper = Key<T>::kHighest;
  int at_most = rank + 2;  // members up to `upper`
  while (lower < upper) {
    const auto middle = (lower & upper) + ((lower ^ upper) >> 1);
    const int reached = members.count([&](T r) { return Key<T>::of(r) <= middle; });
    if (reached > rank) {
      upper = middle;
      at_most = reached;
    } else {
      lower = middle + 1;
    }
  }
  above = below = Key<T>::number(upper);
  if (next && at_most < rank + 2)
    above = members.smallest([&](T r) { return Key<T>::of(r) > upper ? static_cast<double>(r) : kInfinity; });
}

// ---- statistics of a group ---------------------------------------------------------------------------------

// The rewards that receive gradients of ranked baselines and ranges: the group's extremes, and the two that an order
// statistic lies between.
enum Ranked { kHighest, kLowest, kBelow, kAbove };

// The advantages of a group: inv_scale * numerator, where the numerator, reward minus baseline, is
// gain * (reward - low - baseline) unless the group is `alone`.
struct GroupStatistics {
  double inv_scale = 1;                // 1 / (scale + eps); 0 where all rewards that the scale depends on are equal
  double gain = 1;                     // n / (n - 1) for the mean of the others, else 1
  double low = 0;                      // the number that rewards are centred on first: origin(smallest), or kBelow
  double baseline = 0;                 // baseline minus `low`
  bool alone = false;                  // a group of one whose numerator is its reward
  double share = 0;                    // d baseline / d reward, times gain; of weighted baselines per unit of length
  bool by_length = false;              // the baseline is weighted by lengths, not all of them 0
  double part = 0;                     // position of the order statistic between kBelow and kAbove, in [0, 1)
  int earliest[4] = {-1, -1, -1, -1};  // the earliest row of each Ranked reward; -1 for none, or not requested
};

template <typename T>
__device__ bool is_ranked(const AdvantagesArgs<T>& a) {
  return a.baseline == Baseline::median || a.baseline == Baseline::quantile || a.baseline == Baseline::max ||
         a.baseline == Baseline::second_max;
}

// The two rewards around an order statistic, and its position between `below` and `above`, in [0, 1).
template <typename T, bool kBackward>
__device__ void find_ranks(const AdvantagesArgs<T>& a, const Members<T, kBackward>& members, double& below,
                           double& above, double& part) {
  const RewardSummary& group = members.shared.summaries[0];
  below = above = group.high;
  if (a.baseline == Baseline::second_max && group.n > 1 && members.count([&](T r) { return r == group.high; }) == 1)
    below = above = -members.smallest([&](T r) { return r < group.high ? -static_cast<double>(r) : kInfinity; });
  if (group.high != group.high) return;  // a NaN has no rank
  if (a.baseline != Baseline::median && a.baseline != Baseline::quantile) return;
  const double last = max(group.n - 1, 0.0);
  double at = floor(last / 2);
  if (a.baseline == Baseline::quantile) {
    // The rank is computed in the precision of the rewards, as in torch.quantile.
    at = static_cast<T>(a.quantile) * static_cast<T>(last);
    part = max(at - floor(at), 0.0);
  }
  find_ranked(members, static_cast<int>(at), part > 0, below, above);
}

// The earliest rows of the first N of these rewards; -1 for none.
template <int N, typename T, bool kBackward>
__device__ void find_earliest(const Members<T, kBackward>& members, const double (&rewards)[4], int (&earliest)[4]) {
  double rows[N];
#pragma unroll
  for (auto& row : rows) row = kInfinity;
  members.each([&](const Member<T>& m) {
#pragma unroll
    for (int k = 0; k < N; ++k)
      if (m.row >= 0 && m.reward == rewards[k]) rows[k] = min(rows[k], static_cast<double>(m.row));
  });
  members.reduce(rows, MinOrNan());
#pragma unroll
  for (int k = 0; k < N; ++k) earliest[k] = rows[k] < kInfinity ? static_cast<int>(rows[k]) : -1;
}

template <typename T, bool kBackward>
__device__ GroupStatistics statistics_of(const AdvantagesArgs<T>& a, const Members<T, kBackward>& members) {
  const RewardSummary& group = members.shared.summaries[0];
  const RewardSummary& scaled = members.shared.summaries[a.scale == Scale::batch_std];
  GroupStatistics s;
  s.low = origin(group.low), s.baseline = group.mean_above;
  s.share = 1 / max(group.n, 1.0);
  if (a.baseline == Baseline::leave_one_out) s.gain = group.n > 1 ? group.n / (group.n - 1) : 0;
  s.share *= s.gain;
  if (a.baseline == Baseline::length_weighted) {
    double sums[2] = {};
    members.each([&](const Member<T>& m) {
      if (m.row < 0) return;
      const double length = a.lengths[m.row];
      sums[0] += length;
      sums[1] += length * (m.reward - s.low);
    });
    members.reduce(sums, Add());
    s.by_length = sums[0] != 0;  // lengths of 0 alone weigh rows equally
    if (s.by_length) s.share = 1 / sums[0], s.baseline = sums[1] / sums[0];
  }
  double below = 0, above = 0;
  if (is_ranked(a)) {
    find_ranks(a, members, below, above, s.part);
    s.low = below, s.baseline = s.part > 0 ? s.part * (above - below) : 0;
  }
  if (kBackward ? is_ranked(a) || a.scale == Scale::range : a.baseline == Baseline::second_max)
    find_earliest<kBackward ? 4 : 1>(members, {group.high, group.low, below, above}, s.earliest);
  s.alone = a.raw && group.n == 1;
  if (a.scale != Scale::none && !s.alone) {
    const double size = a.scale == Scale::mean_abs ? group.mean_abs
                        : a.scale == Scale::range  ? group.high - group.low
                                                   : scaled.std;
    s.inv_scale = scaled.differs ? 1 / (size + a.eps) : 0;
  }
  return s;
}

// ---- a member's advantage, and its derivatives -------------------------------------------------------------

// Reward minus baseline.
template <typename T>
__device__ double numerator(const AdvantagesArgs<T>& a, const GroupStatistics& s, const Member<T>& m) {
  if (s.alone || a.baseline == Baseline::none) return m.reward;
  if (a.baseline == Baseline::values) return static_cast<double>(m.reward) - a.baseline_values[m.row];
  const double gain = a.baseline == Baseline::second_max ? m.row == s.earliest[kHighest] : s.gain;
  return gain * (m.reward - s.low - s.baseline);
}

// d baseline / d reward of the row.
template <typename T>
__device__ double baseline_slope(const AdvantagesArgs<T>& a, const GroupStatistics& s, int row) {
  if (a.baseline == Baseline::none || a.baseline == Baseline::values) return 0;
  if (s.by_length) return s.share * a.lengths[row];
  if (!is_ranked(a)) return s.share;
  if (s.low != s.low) return s.low;  // a NaN has no rank
  return (row == s.earliest[kBelow] ? 1 - s.part : 0) + (row == s.earliest[kAbove] ? s.part : 0);
}

// d scale / d reward of the row; `of`: the summary of the rewards that the scale depends on.
template <typename T>
__device__ double scale_slope(const AdvantagesArgs<T>& a, const GroupStatistics& s, const RewardSummary& of,
                              const Member<T>& m) {
  if (a.scale == Scale::none) return 0;
  if (a.scale == Scale::range) return (m.row == s.earliest[kHighest]) - (m.row == s.earliest[kLowest]);
  if (a.scale == Scale::mean_abs) return ((m.reward > 0) - (m.reward < 0)) / max(of.n, 1.0);
  const double centred = m.reward - origin(of.low) - of.mean_above;
  return of.std == 0 ? 0 : centred / (max(of.n - a.ddof, 1.0) * of.std);
}

// Upstream gradient of a row: its partial sums, added in order.
template <typename T>
__device__ double upstream(const AdvantagesArgs<T>& a, int row) {
  if (!a.grad.data) return 0;
  if (!a.tokens_given) return a.grad.data[row];
  double sum = 0;
#pragma unroll 4
  for (int64_t part = 0; part < a.parts; ++part) sum += a.sums[row * a.parts + part];
  return sum;
}

// Sums over all members: the upstream gradient of the advantage, and that of the inverse scale.
template <typename T>
__device__ void sum_upstream(const AdvantagesArgs<T>& a, const Members<T, true>& members, double (&result)[2]) {
  double sums[2] = {};
  members.each([&](const Member<T>& m) {
    if (m.row < 0) return;
    const double up = upstream(a, m.row);
    sums[0] += up;
    sums[1] += up * a.numerators[m.row] + (a.grad_inv_scale ? static_cast<double>(a.grad_inv_scale[m.row]) : 0.0);
  });
  members.reduce(sums, Add());
  if (threadIdx.x == 0) result[0] = sums[0], result[1] = sums[1];
  __syncthreads();
}

}  // namespace rewardops::cuda::advantages
