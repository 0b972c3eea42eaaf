// Returns over the steps of a row: the smallest or largest step reward still to come, and soft minima.
#pragma once

#include "rewardops/cpu/kernels.h"
#include "rewardops/cpu/scan.h"

namespace rewardops::cpu {
namespace REWARDOPS_ISA {
namespace {

// The tokens of one row, walked from the right: which are valid, and which end a step.
template <typename T>
struct StepRow {
  const uint8_t *mask, *flags;
  const int64_t* ids;
  int64_t size;
  int64_t following = -1;  // the id of the next valid token

  StepRow(const ReturnsArgs<T>& a, int64_t b)
      : mask(a.mask.row(a.rows, b)),
        flags(a.kind == Steps::flags ? a.flags.row(a.rows, b) : nullptr),
        ids(a.kind == Steps::ids ? a.ids.row(a.rows, b) : nullptr), size(a.rows.size(b)) {}

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

  // Starts the walk at `end`, wherever that is.
  void start(int64_t end) {
    following = -1;
    if (!ids) return;
    while (end < size && !valid(end)) ++end;
    if (end < size) following = ids[end];
  }
  // Those of [begin, begin + n), a block further to the left than the last one.
  void ends_of(int64_t begin, int64_t n, uint8_t* ends) {
    if (flags || !ids) {  // bytes of 0 and 1
      if (flags) std::memcpy(ends, flags + begin, n);
      else std::memset(ends, 1, n);
      if (mask) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) ends[i] &= mask[begin + i];
      }
    } else if (!mask) {
      for (int64_t i = 0; i + 1 < n; ++i) ends[i] = (ids[begin + i] >= 0) & (ids[begin + i] != ids[begin + i + 1]);
      if (n) ends[n - 1] = ends_step(begin + n - 1);
      if (n) following = ids[begin];
    } else {
      for (int64_t i = n - 1; i >= 0; --i) ends[i] = ends_step(begin + i);
    }
  }
};

// ---- the smallest, or largest, step reward still to come ------------------------------------------------------

template <typename T>
struct Sixteen;  // a register of AVX-512
template <>
struct Sixteen<float> {
  typedef float V __attribute__((vector_size(64)));
  typedef int32_t I __attribute__((vector_size(64)));
  static constexpr int64_t kWidth = 16;
#if defined(__clang__)
#define REWARDOPS_PICK16(v, ...) __builtin_shufflevector(v, v, __VA_ARGS__)
#else
#define REWARDOPS_PICK16(v, ...) __builtin_shuffle(v, v, I{__VA_ARGS__})
#endif
  // Moved to the left; the last numbers stay, as the extreme of a number and itself is that number.
  static V moved1(V v) { return REWARDOPS_PICK16(v, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 15); }
  static V moved2(V v) { return REWARDOPS_PICK16(v, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 15, 15); }
  static V moved4(V v) { return REWARDOPS_PICK16(v, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 15, 15, 15, 15); }
  static V moved8(V v) { return REWARDOPS_PICK16(v, 8, 9, 10, 11, 12, 13, 14, 15, 15, 15, 15, 15, 15, 15, 15, 15); }
  static V first(V v) { return REWARDOPS_PICK16(v, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0); }
};
template <>
struct Sixteen<double> {
  typedef Eight V;
  static constexpr int64_t kWidth = 8;
  static V moved1(V v) { return REWARDOPS_PICK(v, v, 1, 2, 3, 4, 5, 6, 7, 7); }
  static V moved2(V v) { return REWARDOPS_PICK(v, v, 2, 3, 4, 5, 6, 7, 7, 7); }
  static V moved4(V v) { return REWARDOPS_PICK(v, v, 4, 5, 6, 7, 7, 7, 7, 7); }
  static V moved8(V v) { return v; }
  static V first(V v) { return REWARDOPS_PICK(v, v, 0, 0, 0, 0, 0, 0, 0, 0); }
};

template <bool kLargest, typename V>
inline V extreme(V a, V b) {
  return kLargest ? (a > b ? a : b) : (a < b ? a : b);
}

// v[i] = the extreme of v[i], v[i + 1], ... and the carry, over whole registers; no NaN among them.
template <bool kLargest, typename T>
inline T scan_extremes(T* x, int64_t padded, T carry) {
  using W = Sixteen<T>;
  typename W::V c = carry - typename W::V{};
  for (int64_t at = padded - W::kWidth; at >= 0; at -= W::kWidth) {
    typename W::V v;
    std::memcpy(&v, x + at, sizeof(v));
    v = extreme<kLargest>(v, W::moved1(v));
    v = extreme<kLargest>(v, W::moved2(v));
    v = extreme<kLargest>(v, W::moved4(v));
    v = extreme<kLargest>(v, W::moved8(v));
    v = extreme<kLargest>(v, c);
    std::memcpy(x + at, &v, sizeof(v));
    c = W::first(v);
  }
  return c[0];
}

// Tokens [begin, end) of row b, from the right. `carry` is the extreme of the steps to the right, if there are any:
// `begun`. Without `store` only those two are wanted. A NaN, once met, stays.
template <bool kLargest, typename T>
inline void extremes_range(const ReturnsArgs<T>& a, int64_t b, int64_t begin, int64_t end, bool store, T& carry,
                           bool& begun) {
  constexpr int64_t kWidth = Sixteen<T>::kWidth;
  constexpr T kNone = kLargest ? -std::numeric_limits<T>::infinity() : std::numeric_limits<T>::infinity();
  alignas(64) T v[kScanBlock];
  uint8_t ends[kScanBlock];
  StepRow<T> steps(a, b);
  steps.start(end);
  const T* rewards = a.rewards.row(a.rows, b);
  const int64_t live = begin + live_tokens(steps.mask ? steps.mask + begin : nullptr, end - begin);
  if (store && live < end) std::memset(a.out.row(a.rows, b) + live, 0, (end - live) * sizeof(T));
  for (int64_t stop = live; stop > begin;) {
    const int64_t left = stop - begin, n = left % kScanBlock ? left % kScanBlock : kScanBlock, at = stop - n;
    stop = at;
    prefetch_before(rewards + at);
    prefetch_before(steps.mask ? steps.mask + at : nullptr);
    const T* r = rewards + at;
    const bool full = all_valid(steps.mask ? steps.mask + at : nullptr, n), every = full && !steps.ids && !steps.flags;
    if (!every || !begun) steps.ends_of(at, n, ends);
    T nans = 0;  // 0, or NaN where there is one
    if (every) {
#pragma omp simd reduction(+ : nans)
      for (int64_t i = 0; i < n; ++i) {
        v[i] = r[i];
        nans += r[i] == r[i] ? T{0} : r[i];
      }
    } else {
#pragma omp simd reduction(+ : nans)
      for (int64_t i = 0; i < n; ++i) {
        const T reward = r[i], chosen = ends[i] ? reward : kNone;
        v[i] = chosen;
        nans += chosen == chosen ? T{0} : chosen;
      }
    }
    int64_t none = 0;  // tokens at the end of the block with no step left
    if (!begun) {
      carry = kNone;
      while (none < n && !ends[n - 1 - none]) ++none;
      begun = none < n;
    }
    if (nans != nans || carry != carry) {
      for (int64_t i = n - 1; i >= 0; --i) v[i] = carry = carry != carry || v[i] != v[i] ? v[i] + carry : extreme<kLargest>(v[i], carry);
    } else {
      const int64_t padded = (n + kWidth - 1) / kWidth * kWidth;
      for (int64_t i = n; i < padded; ++i) v[i] = kNone;
      carry = scan_extremes<kLargest>(v, padded, carry);
    }
    if (!store) continue;
    for (int64_t i = n - none; i < n; ++i) v[i] = 0;
    if (!full)
      for (int64_t i = 0; i < n; ++i) v[i] = steps.mask[at + i] ? v[i] : T{0};
    store_out(a.out.row(a.rows, b) + at, v, n, a.stream);
  }
}

template <typename T>
inline void extremes_range(const ReturnsArgs<T>& a, int64_t b, int64_t begin, int64_t end, bool store, T& carry,
                           bool& begun) {
  if (a.largest) extremes_range<true>(a, b, begin, end, store, carry, begun);
  else extremes_range<false>(a, b, begin, end, store, carry, begun);
}

template <typename T>
void extremes_rows(const ReturnsArgs<T>& a, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    T carry = 0;
    bool begun = false;
    extremes_range(a, b, 0, a.rows.size(b), true, carry, begun);
  }
}

template <typename T>
void extremes_aggregates(const ReturnsArgs<T>& a, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const Chunk c(a, item);
    T carry = 0;
    bool begun = false;
    extremes_range(a, c.row, c.begin, c.end, false, carry, begun);
    a.state[2 * item] = static_cast<double>(carry);
    a.state[2 * item + 1] = begun;
  }
}

template <typename T>
void extremes_carries(const ReturnsArgs<T>& a, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    double carry = 0;
    bool begun = false;
    for (int64_t c = a.chunks - 1; c >= 0; --c) {
      double* state = a.state + 2 * (b * a.chunks + c);
      const double value = state[0];
      const bool any = state[1] != 0;
      state[0] = carry;
      state[1] = begun;
      if (!any) continue;
      if (!begun) carry = value;
      else if (carry != carry || value != value) carry = carry + value;
      else carry = a.largest ? extreme<true>(value, carry) : extreme<false>(value, carry);
      begun = true;
    }
  }
}

template <typename T>
void extremes_chunks(const ReturnsArgs<T>& a, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const Chunk c(a, item);
    T carry = static_cast<T>(a.state[2 * item]);
    bool begun = a.state[2 * item + 1] != 0;
    extremes_range(a, c.row, c.begin, c.end, true, carry, begun);
  }
}

// A step end whose reward is the return there takes the gradient of all tokens since the last such one: it is the
// earliest of their equals. Returns the sum that is left, and whether any was taken.
template <typename T>
inline double extremes_backward_range(const ReturnsArgs<T>& a, int64_t b, int64_t begin, int64_t end, double sum,
                                      bool store, bool* taken) {
  uint8_t ends[kScanBlock];
  alignas(64) T out[kScanBlock];
  const T* grad = a.grad.row(a.rows, b);
  const T* rewards = a.rewards.row(a.rows, b);
  const T* returns = a.returns.row(a.rows, b);
  StepRow<T> steps(a, b);
  for (int64_t at = begin; at < end;) {
    const int64_t n = end - at < kScanBlock ? end - at : kScanBlock;
    steps.start(at + n);
    steps.ends_of(at, n, ends);
    for (int64_t i = 0; i < n; ++i) {
      const T r = ends[i] ? rewards[at + i] : T{0}, g = returns[at + i];
      const bool takes = ends[i] && (r == g || (r != r && g != g));
      if (steps.valid(at + i)) sum += grad[at + i];
      out[i] = takes ? static_cast<T>(sum) : T{0};
      if (takes) sum = 0;
      *taken |= takes;
    }
    if (store) store_out(a.out.row(a.rows, b) + at, out, n, a.stream);
    at += n;
  }
  return sum;
}

template <typename T>
void extremes_backward_rows(const ReturnsArgs<T>& a, int64_t begin, int64_t end) {
  bool taken = false;
  for (int64_t b = begin; b < end; ++b) extremes_backward_range(a, b, 0, a.rows.size(b), 0.0, true, &taken);
}

template <typename T>
void extremes_backward_aggregates(const ReturnsArgs<T>& a, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const Chunk c(a, item);
    bool taken = false;
    a.state[2 * item] = extremes_backward_range(a, c.row, c.begin, c.end, 0.0, false, &taken);
    a.state[2 * item + 1] = !taken;
  }
}

template <typename T>
void extremes_backward_carries(const ReturnsArgs<T>& a, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) linear_carries(a.state + 2 * b * a.chunks, a.chunks, false);
}

template <typename T>
void extremes_backward_chunks(const ReturnsArgs<T>& a, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const Chunk c(a, item);
    bool taken = false;
    extremes_backward_range(a, c.row, c.begin, c.end, a.state[2 * item], true, &taken);
  }
}

// ---- the soft minimum of the steps still to come -------------------------------------------------------------

// G = -T (log sum exp(-r / T) - log n), n the number of steps, or 1.
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
        // +inf and NaN pass through; -inf, which has no mass, must not be subtracted from itself.
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

// grad r[j] = sum over the tokens t up to step j of grad[t] exp(-r[j] / T - log_sum[t]), as a sum that is carried from
// one step to the next, relative to that step's log_sum, which only falls.
template <typename T>
void softmin_returns_backward(const ReturnsArgs<T>& a, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    StepRow<T> steps(a, b);
    const T* rewards = a.rewards.row(a.rows, b);
    const T* grad = a.grad.row(a.rows, b);
    const double* log_sums = a.log_sums.row(a.rows, b);
    T* out = a.out.row(a.rows, b);
    // The step ends are found from the right, and kept in the output.
    for (int64_t t = steps.size - 1; t >= 0; --t) out[t] = steps.ends_step(t);
    double sum = 0, pending = 0, before = 0;
    bool first = true;
    for (int64_t t = 0; t < steps.size; ++t) {
      if (steps.valid(t)) pending += grad[t];
      if (out[t] == 0) continue;
      const double l = log_sums[t], fall = std::isinf(before) || std::isinf(l) ? (l == before ? 0 : -infinity<double>())
                                                                              : l - before;
      sum = (first ? 0 : times(std::exp(fall), sum)) + pending;
      const double u = -static_cast<double>(rewards[t]) / a.temperature;
      out[t] = static_cast<T>(std::isinf(l) ? 0 : sum * std::exp(u - l));
      before = l;
      pending = 0;
      first = false;
    }
  }
}

// ---- PURE's transform ---------------------------------------------------------------------------------------

struct Softmin {
  double low = infinity<double>();
  double total = 0;
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
inline Softmin softmin_row(const ReturnsArgs<T>& a, int64_t b, const T* rewards) {
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

template <typename T>
void softmin(const ReturnsArgs<T>& a, int64_t begin, int64_t end) {
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
void softmin_backward(const ReturnsArgs<T>& a, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const T* rewards = a.rewards.row(a.rows, b);
    const T* grad = a.grad.row(a.rows, b);
    T* out = a.out.row(a.rows, b);
    const Softmin s = softmin_row(a, b, rewards);
    double mean = 0;  // of grad * reward under the weights
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

}  // namespace
}  // namespace REWARDOPS_ISA
}  // namespace rewardops::cpu
