// Reverse scans over the step rewards of a row.
#pragma once

#include "rewardops/cpu/kernels.h"
#include "rewardops/cpu/math.h"

namespace rewardops::cpu {
namespace REWARDOPS_ISA {
namespace {

// The tokens of one row, walked from the right: which are valid, and which end a step.
template <typename T>
struct StepRow {
  const uint8_t *mask, *flags;
  const int64_t* ids;
  int64_t following = -1;  // the id of the next valid token

  StepRow(const ReturnsArgs<T>& a, int64_t b)
      : mask(a.mask.row(a.rows, b)),
        flags(a.kind == Steps::flags ? a.flags.row(a.rows, b) : nullptr),
        ids(a.kind == Steps::ids ? a.ids.row(a.rows, b) : nullptr) {}

  bool valid(int64_t t) const { return !mask || mask[t]; }

  // To be asked for every t of the row, in decreasing order.
  bool ends_step(int64_t t) {
    if (!valid(t)) return false;
    if (flags) return flags[t];
    if (!ids) return true;
    const bool end = ids[t] >= 0 && ids[t] != following;
    following = ids[t];
    return end;
  }
};

template <typename T>
void min_returns(const ReturnsArgs<T>& a, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    StepRow<T> steps(a, b);
    const T* rewards = a.rewards.row(a.rows, b);
    T* out = a.out.row(a.rows, b);
    int32_t* argmin = a.argmin.row(a.rows, b);
    T best = 0;
    int32_t where = -1;
    for (int64_t t = a.rows.size(b) - 1; t >= 0; --t) {
      // <= and not <: of equal rewards the earliest is taken. A NaN, once met, stays.
      if (steps.ends_step(t) && (where < 0 || rewards[t] <= best || rewards[t] != rewards[t])) {
        best = rewards[t];
        where = static_cast<int32_t>(t);
      }
      const bool valid = steps.valid(t);
      out[t] = valid ? best : T{0};
      argmin[t] = valid ? where : -1;
    }
  }
}

// The tokens whose arg-min is j are neighbours and j is the last of them: a running sum, emptied at each j.
template <typename T>
void min_returns_backward(const ReturnsArgs<T>& a, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const T* grad = a.grad.row(a.rows, b);
    const int32_t* where = a.where.row(a.rows, b);
    T* out = a.out.row(a.rows, b);
    const int64_t n = a.rows.size(b);
    double sum = 0;
    for (int64_t t = 0; t < n; ++t) {
      out[t] = 0;
      if (where[t] < 0) continue;
      sum += grad[t];
      if (where[t] == t) {
        out[t] = static_cast<T>(sum);
        sum = 0;
      }
    }
  }
}

template <typename T>
struct Softmin {
  double low = infinity<double>();
  double total = 0;
};

template <typename T>
inline double softmin_weight(const ReturnsArgs<T>& a, const Softmin<T>& s, T reward) {
  return std::exp((s.low - static_cast<double>(reward)) / a.temperature) / s.total;
}

template <typename T>
inline Softmin<T> softmin_row(const ReturnsArgs<T>& a, int64_t b, const T* rewards) {
  Softmin<T> s;
  const int64_t n = a.rows.size(b);
  StepRow<T> first(a, b);
  for (int64_t t = n - 1; t >= 0; --t)
    if (first.ends_step(t) && !(static_cast<double>(rewards[t]) >= s.low)) s.low = rewards[t];
  StepRow<T> second(a, b);
  for (int64_t t = n - 1; t >= 0; --t)
    if (second.ends_step(t)) s.total += std::exp((s.low - static_cast<double>(rewards[t])) / a.temperature);
  return s;
}

template <typename T>
void softmin(const ReturnsArgs<T>& a, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const T* rewards = a.rewards.row(a.rows, b);
    T* out = a.out.row(a.rows, b);
    const Softmin<T> s = softmin_row(a, b, rewards);
    StepRow<T> steps(a, b);
    for (int64_t t = a.rows.size(b) - 1; t >= 0; --t)
      out[t] = steps.ends_step(t) ? static_cast<T>(softmin_weight(a, s, rewards[t]) * rewards[t]) : T{0};
  }
}

template <typename T>
void softmin_backward(const ReturnsArgs<T>& a, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const T* rewards = a.rewards.row(a.rows, b);
    const T* grad = a.grad.row(a.rows, b);
    T* out = a.out.row(a.rows, b);
    const int64_t n = a.rows.size(b);
    const Softmin<T> s = softmin_row(a, b, rewards);
    double mean = 0;  // of grad * reward under the weights
    if (a.through_weights) {
      StepRow<T> steps(a, b);
      for (int64_t t = n - 1; t >= 0; --t)
        if (steps.ends_step(t))
          mean += softmin_weight(a, s, rewards[t]) * rewards[t] * static_cast<double>(grad[t]);
    }
    StepRow<T> steps(a, b);
    for (int64_t t = n - 1; t >= 0; --t) {
      out[t] = 0;
      if (!steps.ends_step(t)) continue;
      const double up = grad[t];
      const double through = a.through_weights ? (up * rewards[t] - mean) / a.temperature : 0.0;
      out[t] = static_cast<T>(softmin_weight(a, s, rewards[t]) * (up - through));
    }
  }
}

}  // namespace
}  // namespace REWARDOPS_ISA
}  // namespace rewardops::cpu
