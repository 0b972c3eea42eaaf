// Soft minima over the steps of a row: as returns, and as weights of the step rewards.
#pragma once

#include "rewardops/cpu/returns_steps.h"

namespace rewardops::cpu {
namespace REWARDOPS_ISA {

// ---- returns: the soft minimum of the steps still to come ---------------------------------------------------

// G = -T (log sum exp(-r / T) - log n), with n the number of steps for a mean, else 1.
template <typename T>
void softmin_returns(const ReturnsArgs<T>& a, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    StepRow<T> steps(a, b);
    const T* rewards = a.rewards.row(a.rows, b);
    T* out = a.out.row(a.rows, b);
    double* log_sums = a.log_sums.row(a.rows, b);
    double top = -infinity<double>(), total = 0, log_sum = 0, value = 0;
    int64_t count = 0;
    for (int64_t t = steps.size - 1; t >= 0; --t) {
      if (steps.ends_step(t)) {
        const double u = -static_cast<double>(rewards[t]) / a.temperature;
        // +inf and NaN propagate; -inf, which has no mass, must not be subtracted from itself.
        if (u > top || u != u) {
          total = count && top > -infinity<double>() ? total * std::exp(top - u) + 1 : 1;
          top = u;
        } else if (top > -infinity<double>()) {
          total += top == infinity<double>() ? u == top : std::exp(u - top);
        }
        ++count;
        log_sum = top == -infinity<double>() ? top : top + std::log(total);
        value = -a.temperature * (log_sum - (a.mean ? std::log(static_cast<double>(count)) : 0.0));
      }
      const bool valid = steps.valid(t);
      out[t] = valid ? static_cast<T>(value) : T{0};
      log_sums[t] = valid && count ? log_sum : 0;
    }
  }
}

// grad r[j] = sum over the tokens t up to step j of grad[t] exp(-r[j] / T - log_sum[t]), as a running sum from one
// step to the next, relative to that step's log_sum, which only falls.
template <typename T>
void softmin_returns_backward(const ReturnsArgs<T>& a, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    StepRow<T> steps(a, b);
    const T* rewards = a.rewards.row(a.rows, b);
    const T* grad = a.grad.row(a.rows, b);
    const double* log_sums = a.log_sums.row(a.rows, b);
    T* out = a.out.row(a.rows, b);
    // Step ends, from the right: marked by ones in the output, until its values replace them.
    for (int64_t t = steps.size - 1; t >= 0; --t) out[t] = steps.ends_step(t);
    double sum = 0, pending = 0, before = 0;
    bool first = true;
    for (int64_t t = 0; t < steps.size; ++t) {
      if (steps.valid(t)) pending += grad[t];
      if (out[t] == 0) continue;
      const double l = log_sums[t],
                   fall = std::isinf(before) || std::isinf(l) ? (l == before ? 0 : -infinity<double>()) : l - before;
      sum = (first ? 0 : times(std::exp(fall), sum)) + pending;
      const double u = -static_cast<double>(rewards[t]) / a.temperature;
      out[t] = static_cast<T>(std::isinf(l) ? 0 : sum * std::exp(u - l));
      before = l;
      pending = 0;
      first = false;
    }
  }
}

// ---- rewards: PURE's transform, each step's reward times its soft-min weight ---------------------------------

namespace {

// The normaliser of the weights exp(-r / T) of a row's steps.
struct Softmin {
  double low = infinity<double>();  // the smallest reward
  double total = 0;                 // sum of exp((low - r) / T)
};

// f(first token, tokens, positions of step ends among them, how many) for each block of a row, from the right.
template <typename T, typename F>
inline void each_step_block(const ReturnsArgs<T>& a, int64_t b, F f) {
  uint8_t ends[kScanBlock];
  int32_t places[kScanBlock + 1];
  StepRow<T> steps(a, b);
  for (int64_t stop = steps.size; stop > 0;) {
    const int64_t n = stop < kScanBlock ? stop : kScanBlock, at = stop - n;
    steps.ends_of(at, n, ends);
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) places[count] = static_cast<int32_t>(i), count += ends[i];
    f(at, n, places, count);
    stop = at;
  }
}

template <typename T>
inline double softmin_weight(const ReturnsArgs<T>& a, const Softmin& s, T reward) {
  return std::exp((s.low - static_cast<double>(reward)) / a.temperature) / s.total;
}

template <typename T>
REWARDOPS_ONCE Softmin softmin_row(const ReturnsArgs<T>& a, int64_t b, const T* rewards) {
  Softmin s;
  each_step_block(a, b, [&](int64_t at, int64_t, const int32_t* places, int64_t count) {
    for (int64_t k = 0; k < count; ++k) {
      const double r = rewards[at + places[k]];
      if (!(r >= s.low)) s.low = r;
    }
  });
  each_step_block(a, b, [&](int64_t at, int64_t, const int32_t* places, int64_t count) {
    for (int64_t k = 0; k < count; ++k)
      s.total += std::exp((s.low - static_cast<double>(rewards[at + places[k]])) / a.temperature);
  });
  return s;
}

}  // namespace

template <typename T>
void softmin_rewards(const ReturnsArgs<T>& a, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const T* rewards = a.rewards.row(a.rows, b);
    T* out = a.out.row(a.rows, b);
    const Softmin s = softmin_row(a, b, rewards);
    each_step_block(a, b, [&](int64_t at, int64_t n, const int32_t* places, int64_t count) {
      std::memset(out + at, 0, n * sizeof(T));
      for (int64_t k = 0; k < count; ++k) {
        const T r = rewards[at + places[k]];
        out[at + places[k]] = static_cast<T>(softmin_weight(a, s, r) * r);
      }
    });
  }
}

template <typename T>
void softmin_rewards_backward(const ReturnsArgs<T>& a, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const T* rewards = a.rewards.row(a.rows, b);
    const T* grad = a.grad.row(a.rows, b);
    T* out = a.out.row(a.rows, b);
    const Softmin s = softmin_row(a, b, rewards);
    double mean = 0;  // weighted mean of grad * reward
    if (a.through_weights)
      each_step_block(a, b, [&](int64_t at, int64_t, const int32_t* places, int64_t count) {
        for (int64_t k = 0; k < count; ++k) {
          const int64_t t = at + places[k];
          mean += softmin_weight(a, s, rewards[t]) * rewards[t] * static_cast<double>(grad[t]);
        }
      });
    each_step_block(a, b, [&](int64_t at, int64_t n, const int32_t* places, int64_t count) {
      std::memset(out + at, 0, n * sizeof(T));
      for (int64_t k = 0; k < count; ++k) {
        const int64_t t = at + places[k];
        const double up = grad[t];
        const double through = a.through_weights ? (up * rewards[t] - mean) / a.temperature : 0.0;
        out[t] = static_cast<T>(softmin_weight(a, s, rewards[t]) * (up - through));
      }
    });
  }
}

}  // namespace REWARDOPS_ISA
}  // namespace rewardops::cpu
