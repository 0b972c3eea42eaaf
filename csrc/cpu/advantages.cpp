#include "advantages.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "groups.h"
#include "parallel.h"

namespace rewardops::cpu {
namespace {

constexpr int64_t kRowGrain = 16;

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

struct Statistics {
  int64_t count = 0;
  double mean = 0, std = 0, inv_scale = 1;
  bool differs = false;
};

// Equal rewards are told by comparison: their computed std is of rounding size and not 0.
template <typename T>
Statistics statistics(const AdvantagesArgs<T>& a, const GroupIndex& index, const std::vector<uint8_t>& live,
                      int64_t group) {
  Statistics s;
  double first = 0, sum = 0;
  const auto members = [&](auto&& visit) {
    for (int64_t m = index.offsets[group]; m < index.offsets[group + 1]; ++m)
      if (live[index.members[m]]) visit(static_cast<double>(a.rewards[index.members[m]]));
  };
  members([&](double r) {
    if (s.count++ == 0) first = r;
    s.differs = s.differs || r != first;
    sum += r - first;
  });
  if (s.count == 0) return s;
  s.mean = first + sum / s.count;
  double square = 0;
  members([&](double r) { square += (r - s.mean) * (r - s.mean); });
  const int64_t degrees = s.count - a.ddof;
  s.std = s.differs ? std::sqrt(square / (degrees > 1 ? degrees : 1)) : 0.0;
  if (a.scale == Scale::std) s.inv_scale = s.differs ? 1.0 / (s.std + a.eps) : 0.0;
  return s;
}

template <typename T>
double gain(const AdvantagesArgs<T>& a, const Statistics& s) {
  if (a.baseline == Baseline::leave_one_out) return s.count > 1 ? double(s.count) / double(s.count - 1) : 0.0;
  return a.baseline == Baseline::mean ? 1.0 : 0.0;
}

template <typename T>
double numerator(const AdvantagesArgs<T>& a, const Statistics& s, double reward) {
  if (a.baseline == Baseline::none) return reward;
  return s.differs ? gain(a, s) * (reward - s.mean) : 0.0;
}

}  // namespace

template <typename T>
void group_advantages(const AdvantagesArgs<T>& a, int threads) {
  const GroupIndex index(a.groups, a.rows.batch);
  const std::vector<uint8_t> live = live_rows(a, threads);
  for (int64_t g = 0; g < index.view().count; ++g) {
    const Statistics s = statistics(a, index, live, g);
    for (int64_t m = index.offsets[g]; m < index.offsets[g + 1]; ++m) {
      const int64_t b = index.members[m];
      const bool counts = live[b] && s.inv_scale != 0;
      a.inv_scale[b] = static_cast<T>(counts ? s.inv_scale : 0.0);
      a.advantages[b] = static_cast<T>(counts ? numerator(a, s, a.rewards[b]) * s.inv_scale : 0.0);
    }
  }
}

template <typename T>
void group_advantages_backward(const AdvantagesArgs<T>& a, int threads) {
  const GroupIndex index(a.groups, a.rows.batch);
  const std::vector<uint8_t> live = live_rows(a, threads);
  std::vector<double> up(a.rows.batch, 0.0);
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
  for (int64_t g = 0; g < index.view().count; ++g) {
    const Statistics s = statistics(a, index, live, g);
    double mean_up = 0, through = 0;
    for (int64_t m = index.offsets[g]; m < index.offsets[g + 1]; ++m) {
      const int64_t b = index.members[m];
      if (!live[b] || s.inv_scale == 0) continue;
      mean_up += up[b] / s.count;
      through += up[b] * numerator(a, s, a.rewards[b]) + (a.grad_inv_scale ? a.grad_inv_scale[b] : T{0});
    }
    const int64_t degrees = s.count - a.ddof;
    for (int64_t m = index.offsets[g]; m < index.offsets[g + 1]; ++m) {
      const int64_t b = index.members[m];
      if (!live[b] || s.inv_scale == 0) {
        a.grad_rewards[b] = 0;
        continue;
      }
      double grad = s.inv_scale * (a.baseline == Baseline::none ? up[b] : gain(a, s) * (up[b] - mean_up));
      if (a.scale == Scale::std && s.std > 0) {
        // d std / d r = centred / ((n - ddof) std)
        const double d_std = (a.rewards[b] - s.mean) / ((degrees > 1 ? degrees : 1) * s.std);
        grad -= d_std * s.inv_scale * s.inv_scale * through;
      }
      a.grad_rewards[b] = static_cast<T>(grad);
    }
  }
}

template void group_advantages<float>(const AdvantagesArgs<float>&, int);
template void group_advantages<double>(const AdvantagesArgs<double>&, int);
template void group_advantages_backward<float>(const AdvantagesArgs<float>&, int);
template void group_advantages_backward<double>(const AdvantagesArgs<double>&, int);

}  // namespace rewardops::cpu
