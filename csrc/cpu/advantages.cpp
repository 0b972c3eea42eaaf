#include "advantages.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "groups.h"
#include "parallel.h"

namespace rewardops::cpu {
namespace {

constexpr int64_t kRowGrain = 16;

// Rows that are members of their group: those with a valid token, or all rows without tokens.
template <typename T>
std::vector<uint8_t> live_rows(const AdvantagesArgs<T>& a, int threads) {
  std::vector<uint8_t> live(a.rows.batch, 1);
  if (!a.tokens_given) return live;
  parallel_for(a.rows.batch, kRowGrain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t n = a.rows.size(b);
      const uint8_t* mask = a.mask.row(a.rows, b);
      live[b] = mask ? n > 0 && std::memchr(mask, 1, n) != nullptr : n > 0;
    }
  });
  return live;
}

// An order statistic of the rewards, and the earliest row that has it.
struct Pick {
  double value = 0;
  int64_t row = -1;
};

// A finite number to centre rewards on: the reward, or 0.
double origin(double reward) { return std::isfinite(reward) ? reward : 0; }

// Statistics of a group's rewards. Means are relative to the first reward, or by length to the lowest, so that rewards
// far from 0 keep the digits of their differences; infinite rewards make them infinite or NaN.
struct Statistics {
  int64_t count = 0;
  double first = 0, mean = 0, std = 0, inv_scale = 1, mean_abs = 0, total_length = 0, mean_by_length = 0;
  double centred(double r) const { return (r - origin(first)) - mean; }
  bool broken() const { return std::isnan(mean_abs); }  // a reward is NaN: there is no order and no mean
  bool differs = false;                                 // the rewards are not all equal, or not finite
  bool by_count = false;                                // all lengths are 0: rows count equally
  Pick low, high, below, above;  // the extremes, and the two rewards between which an order statistic lies
  double part = 0;               // (order statistic - below) / (above - below), in [0, 1)
};

template <typename T, typename Members>
Pick find(const AdvantagesArgs<T>& a, const Members& members, double value) {
  Pick pick{value, -1};
  members([&](int64_t b) {
    if (pick.row < 0 && static_cast<double>(a.rewards[b]) == value) pick.row = b;
  });
  return pick;
}

// Count, mean, std and extremes. Equal rewards are detected by comparison: their computed std is rounding error, not 0.
template <typename T, typename Members>
void moments_of(const AdvantagesArgs<T>& a, const Members& members, Statistics& s) {
  double sum = 0, magnitude = 0;
  members([&](int64_t b) {
    const double r = a.rewards[b];
    if (s.count++ == 0) {
      s.first = r;
      s.low = s.high = {r, b};
    }
    if (r < s.low.value) s.low = {r, b};
    if (r > s.high.value) s.high = {r, b};
    s.differs = s.differs || !(r - s.first == 0);
    sum += r - origin(s.first);
    magnitude += std::fabs(r);
  });
  if (s.count == 0) return;
  s.mean = sum / s.count;
  s.mean_abs = magnitude / s.count;
  if (s.broken()) s.low = s.high = {s.mean_abs, -1};
  // In units of a power of two of which neither squares nor their sum leave the range of double.
  const double spread = s.high.value - s.low.value;
  const double unit = spread > 0x1p400 ? 0x1p-600 : spread < 0x1p-400 ? 0x1p600 : 1;
  double square = 0;
  members([&](int64_t b) {
    const double centred = s.centred(a.rewards[b]) * unit;
    square += centred * centred;
  });
  const int64_t degrees = s.count - a.ddof;
  s.std = s.differs ? std::sqrt(square / (degrees > 1 ? degrees : 1)) / unit : 0.0;
}

// Statistics of the baseline beyond the moments: an order statistic, or the mean weighted by length.
template <typename T, typename Members>
void baseline_of(const AdvantagesArgs<T>& a, const Members& members, Statistics& s) {
  if (a.baseline == Baseline::length_weighted) {
    members([&](int64_t b) { s.total_length += a.lengths[b]; });
    s.by_count = s.total_length == 0;
    if (s.by_count) s.total_length = s.count;
    double sum = 0;
    members([&](int64_t b) { sum += (s.by_count ? 1.0 : a.lengths[b]) * (a.rewards[b] - origin(s.low.value)); });
    s.mean_by_length = sum / s.total_length;
    return;
  }
  int64_t rank;
  switch (a.baseline) {
    case Baseline::median: rank = (s.count - 1) / 2; break;
    case Baseline::max: rank = s.count - 1; break;
    case Baseline::second_max: rank = s.count > 1 ? s.count - 2 : 0; break;
    case Baseline::quantile: {
      // The rank is computed in the precision of the rewards, as on the other backends.
      const T at = static_cast<T>(a.quantile) * static_cast<T>(s.count - 1);
      rank = static_cast<int64_t>(std::floor(at));
      s.part = at - std::floor(at);
      break;
    }
    default: return;
  }
  s.below.value = s.above.value = s.mean_abs;
  if (s.broken()) return;
  std::vector<double> values;
  values.reserve(s.count);
  members([&](int64_t b) { values.push_back(a.rewards[b]); });
  std::sort(values.begin(), values.end());
  s.below = find(a, members, values[rank]);
  s.above = s.part > 0 ? find(a, members, values[rank + 1]) : s.below;
}

// The groups of a batch, and the baseline and scale that make advantages relative to them.
template <typename T>
class GroupStatistics {
 public:
  GroupStatistics(const AdvantagesArgs<T>& a, int threads)
      : a_(a), index_(a.groups, a.rows.batch), live_(live_rows(a, threads)) {
    if (a.scale == Scale::batch_std)
      moments_of(
          a,
          [&](auto&& visit) {
            for (int64_t b = 0; b < a.rows.batch; ++b)
              if (live_[b]) visit(b);
          },
          batch_);
  }

  int64_t count() const { return index_.view().count; }
  bool live(int64_t b) const { return live_[b]; }

  template <typename Visit>
  void rows(int64_t group, Visit visit) const {
    for (int64_t m = index_.offsets[group]; m < index_.offsets[group + 1]; ++m) visit(index_.members[m]);
  }

  Statistics statistics(int64_t group) const {
    Statistics s;
    const auto members = [&](auto&& visit) {
      rows(group, [&](int64_t b) {
        if (live_[b]) visit(b);
      });
    };
    moments_of(a_, members, s);
    if (s.count == 0) return s;
    baseline_of(a_, members, s);
    if (raw(s) || a_.scale == Scale::none) return s;
    const Statistics& of = a_.scale == Scale::batch_std ? batch_ : s;
    const double scale = a_.scale == Scale::mean_abs ? s.mean_abs
                         : a_.scale == Scale::range  ? s.high.value - s.low.value
                                                     : of.std;
    s.inv_scale = of.differs ? 1.0 / (scale + a_.eps) : 0.0;
    return s;
  }

  // True for a group of one whose advantage is the reward itself.
  bool raw(const Statistics& s) const { return a_.raw && s.count == 1; }

  // Factor of row b's numerator, which is gain * (reward - baseline).
  double gain(const Statistics& s, int64_t b) const {
    if (raw(s)) return 1.0;
    if (a_.baseline == Baseline::leave_one_out) return s.count > 1 ? double(s.count) / double(s.count - 1) : 0.0;
    if (a_.baseline == Baseline::second_max) return b == s.high.row ? 1.0 : 0.0;
    return 1.0;
  }

  double numerator(const Statistics& s, int64_t b) const {
    const double r = a_.rewards[b];
    if (a_.baseline == Baseline::none || raw(s)) return r;
    if (a_.baseline == Baseline::values) return r - a_.baseline_values[b];
    switch (a_.baseline) {
      case Baseline::mean:
      case Baseline::leave_one_out: return gain(s, b) * s.centred(r);
      case Baseline::length_weighted: return (r - origin(s.low.value)) - s.mean_by_length;
      case Baseline::second_max: return gain(s, b) * (r - s.below.value);
      default: return r - s.below.value - (s.part > 0 ? s.part * (s.above.value - s.below.value) : 0.0);
    }
  }

  // Derivative of row i's baseline in the reward of row b, times i's gain.
  double weight(const Statistics& s, int64_t i, int64_t b) const {
    if (raw(s)) return 0.0;
    switch (a_.baseline) {
      case Baseline::none:
      case Baseline::values: return 0.0;
      case Baseline::mean:
      case Baseline::leave_one_out: return gain(s, i) / s.count;
      case Baseline::length_weighted: return (s.by_count ? 1.0 : a_.lengths[b]) / s.total_length;
      default:
        if (s.broken()) return s.mean_abs;
        return gain(s, i) * ((b == s.below.row ? 1 - s.part : 0.0) + (b == s.above.row ? s.part : 0.0));
    }
  }

  // Derivative of the scale in the reward of row b.
  double d_scale(const Statistics& s, int64_t b) const {
    if (a_.scale == Scale::none || (raw(s) && a_.scale != Scale::batch_std)) return 0.0;
    const double r = a_.rewards[b];
    if (a_.scale == Scale::range) return (b == s.high.row) - (b == s.low.row);
    if (a_.scale == Scale::mean_abs) return ((r > 0) - (r < 0)) / double(s.count);
    const Statistics& of = a_.scale == Scale::batch_std ? batch_ : s;
    const int64_t degrees = of.count - a_.ddof;
    return of.std == 0 ? 0.0 : of.centred(r) / ((degrees > 1 ? degrees : 1) * of.std);
  }

 private:
  const AdvantagesArgs<T>& a_;
  GroupIndex index_;
  std::vector<uint8_t> live_;
  Statistics batch_;
};

}  // namespace

template <typename T>
void group_advantages(const AdvantagesArgs<T>& a, int threads) {
  const GroupStatistics<T> groups(a, threads);
  for (int64_t g = 0; g < groups.count(); ++g) {
    const Statistics s = groups.statistics(g);
    groups.rows(g, [&](int64_t b) {
      const bool live = groups.live(b);
      const double numerator = live ? groups.numerator(s, b) : 0.0, inv_scale = live ? s.inv_scale : 0.0;
      a.numerators[b] = static_cast<T>(numerator);
      a.inv_scale[b] = static_cast<T>(inv_scale);
      a.advantages[b] = static_cast<T>(numerator * inv_scale + 0.0);  // no negative zeros
    });
  }
}

template <typename T>
void group_advantages_backward(const AdvantagesArgs<T>& a, int threads) {
  const GroupStatistics<T> groups(a, threads);
  double* up = a.sums;
  std::fill_n(up, a.rows.batch, 0.0);
  if (a.grad.data) {
    parallel_for(a.rows.batch, kRowGrain, threads, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        if (!a.tokens_given) {
          up[b] = a.grad.data[b];
          continue;
        }
        const T* grad = a.grad.row(a.rows, b);
        const uint8_t* mask = a.mask.row(a.rows, b);
        const int64_t n = a.rows.size(b);
        for (int64_t t = 0; t < n; ++t)
          if (!mask || mask[t]) up[b] += grad[t];
      }
    });
  }
  const bool batch_wide = a.scale == Scale::batch_std;
  const auto of_scale = [&](const Statistics& s, int64_t b) {
    if (groups.raw(s)) return 0.0;
    const double on_inv_scale = up[b] * groups.numerator(s, b) + (a.grad_inv_scale ? a.grad_inv_scale[b] : T{0});
    return on_inv_scale * s.inv_scale * s.inv_scale;
  };
  double through_batch = 0;
  for (int64_t g = 0; batch_wide && g < groups.count(); ++g) {
    const Statistics s = groups.statistics(g);
    groups.rows(g, [&](int64_t b) { through_batch += groups.live(b) ? of_scale(s, b) : 0.0; });
  }
  for (int64_t g = 0; g < groups.count(); ++g) {
    const Statistics s = groups.statistics(g);
    double total = 0, through = 0;  // second_max: `total` of the best row alone
    groups.rows(g, [&](int64_t b) {
      if (!groups.live(b)) return;
      if (a.baseline != Baseline::second_max || b == s.high.row) total += up[b];
      through += of_scale(s, b);
    });
    if (batch_wide) through = through_batch;
    const int64_t any = a.baseline == Baseline::second_max ? s.high.row : -1;
    groups.rows(g, [&](int64_t b) {
      double grad = 0, on_baseline = 0;
      if (groups.live(b)) {
        grad = s.inv_scale * (groups.gain(s, b) * up[b] - groups.weight(s, any < 0 ? b : any, b) * total);
        if (a.scale != Scale::none) grad -= groups.d_scale(s, b) * through;
        if (!groups.raw(s)) on_baseline = -s.inv_scale * up[b];
      }
      a.grad_rewards[b] = static_cast<T>(grad);
      if (a.grad_baseline) a.grad_baseline[b] = static_cast<T>(on_baseline);
    });
  }
}

template void group_advantages<float>(const AdvantagesArgs<float>&, int);
template void group_advantages<double>(const AdvantagesArgs<double>&, int);
template void group_advantages_backward<float>(const AdvantagesArgs<float>&, int);
template void group_advantages_backward<double>(const AdvantagesArgs<double>&, int);

}  // namespace rewardops::cpu
