// Returns over the steps of a row: the smallest or largest step reward still to come. The soft minima are in
// returns_softmin.h, discounted returns in td.h.
#pragma once

#include "rewardops/cpu/returns_steps.h"

namespace rewardops::cpu {
namespace REWARDOPS_ISA {
namespace {

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
  // Numbers move to the left. The last ones stay: the extreme of a number and itself is that number.
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

// ---- forward ------------------------------------------------------------------------------------------------

// The extreme of the steps to the right of a token, if there are any.
template <typename T>
struct ExtremeCarry {
  T value = 0;
  bool begun = false;
};

// Tokens [begin, end) of row b, from the right. The carry comes from the steps after them, and becomes that for the
// tokens before them; without `store` nothing else is computed. A NaN stays in all returns before it.
template <bool kLargest, typename T>
REWARDOPS_ONCE void extremes_range(const ReturnsArgs<T>& a, int64_t b, int64_t begin, int64_t end, bool store,
                                   ExtremeCarry<T>& carry) {
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
    if (!every || !carry.begun) steps.ends_of(at, n, ends);
    T nans = 0;  // NaN if a reward is NaN, else 0
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
    if (!carry.begun) {
      carry.value = kNone;
      while (none < n && !ends[n - 1 - none]) ++none;
      carry.begun = none < n;
    }
    if (nans != nans || carry.value != carry.value) {
      for (int64_t i = n - 1; i >= 0; --i) {
        const T here = v[i], after = carry.value;
        v[i] = carry.value = after != after || here != here ? here + after : extreme<kLargest>(here, after);
      }
    } else {
      const int64_t padded = (n + kWidth - 1) / kWidth * kWidth;
      for (int64_t i = n; i < padded; ++i) v[i] = kNone;
      carry.value = scan_extremes<kLargest>(v, padded, carry.value);
    }
    if (!store) continue;
    for (int64_t i = n - none; i < n; ++i) v[i] = 0;
    if (!full)
      for (int64_t i = 0; i < n; ++i) v[i] = steps.mask[at + i] ? v[i] : T{0};
    store_out(a.out.row(a.rows, b) + at, v, n, a.stream);
  }
}

template <typename T>
inline void extremes_range(const ReturnsArgs<T>& a, int64_t b, int64_t begin, int64_t end, bool store,
                           ExtremeCarry<T>& carry) {
  if (a.largest) extremes_range<true>(a, b, begin, end, store, carry);
  else extremes_range<false>(a, b, begin, end, store, carry);
}

}  // namespace

template <typename T>
void extremes_rows(const ReturnsArgs<T>& a, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    ExtremeCarry<T> carry;
    extremes_range(a, b, 0, a.rows.size(b), true, carry);
  }
}

template <typename T>
void extremes_aggregates(const ReturnsArgs<T>& a, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const Chunk c(a, item);
    ExtremeCarry<T> carry;
    extremes_range(a, c.row, c.begin, c.end, false, carry);
    a.state[2 * item] = static_cast<double>(carry.value);
    a.state[2 * item + 1] = carry.begun;
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
    ExtremeCarry<T> carry{static_cast<T>(a.state[2 * item]), a.state[2 * item + 1] != 0};
    extremes_range(a, c.row, c.begin, c.end, true, carry);
  }
}

// ---- backward -----------------------------------------------------------------------------------------------

namespace {

// The gradient at a step end that attains the extreme, so that its reward is the return there, is the sum of upstream
// gradients since the previous such end; ties go to the earliest. Returns the sum that remains; `taken` becomes true if
// any step end attains the extreme.
template <typename T>
REWARDOPS_ONCE double extremes_backward_range(const ReturnsArgs<T>& a, int64_t b, int64_t begin, int64_t end,
                                              double sum, bool store, bool* taken) {
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

}  // namespace

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

}  // namespace REWARDOPS_ISA
}  // namespace rewardops::cpu
