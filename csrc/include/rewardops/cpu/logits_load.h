// Rows of logits, loaded a block of columns at a time in the accumulation type: float, or double for double logits.
#pragma once

#include "rewardops/cpu/kernels.h"
#include "rewardops/cpu/math.h"
#include "rewardops/cpu/simd.h"

namespace rewardops::cpu {
namespace REWARDOPS_ISA {
namespace {

constexpr int64_t kLogitsBlock = 1024;

template <typename T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};

// n rounded up to full lanes.
template <typename Acc>
inline int64_t padded_to_lanes(int64_t n) {
  return (n + Lanes<Acc>::kWidth - 1) / Lanes<Acc>::kWidth * Lanes<Acc>::kWidth;
}

// Columns of the block that begins at column `start`; the last block of a row may be short.
inline int64_t columns_of_block(const LogitsArgs& in, int64_t start) {
  return in.vocab - start < kLogitsBlock ? in.vocab - start : kLogitsBlock;
}

// The column of a row's token; `found` is true if the token is in this shard.
struct TokenColumn {
  int64_t column;
  bool found;

  TokenColumn(const LogitsArgs& in, int64_t n)
      : column(in.tokens[n] - in.first), found(column >= 0 && column < in.vocab) {}
};

template <typename T>
inline T* logits_row(const LogitsRows& rows, int64_t n) {
  return static_cast<T*>(const_cast<void*>(rows.data)) + rows.offset(n);
}

template <typename Acc>
inline Acc capped(Acc x, Acc cap, Acc inverse_cap) {
  return cap * tanh_any(x * inverse_cap);
}

template <typename T, typename Acc>
REWARDOPS_ONCE void fill_block(const T* x, int64_t n, double softcap, Acc* buffer) {
  if (softcap > 0) {
    const Acc cap = static_cast<Acc>(softcap), inverse = static_cast<Acc>(1.0 / softcap);
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) buffer[k] = capped(static_cast<Acc>(widen(x[k])), cap, inverse);
  } else {
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) buffer[k] = widen(x[k]);
  }
}

// Columns of a row in the accumulation type, after the softcap. Returns the row itself where it needs no conversion,
// else the buffer.
template <typename T, typename Acc>
inline const Acc* load_block(const T* x, int64_t n, double softcap, Acc* buffer) {
  if constexpr (sizeof(T) == sizeof(Acc)) {
    if (!(softcap > 0)) return x;
  }
  fill_block(x, n, softcap, buffer);
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

// One logit, after the softcap.
template <typename Acc>
inline Acc logit_at(const LogitsRows& rows, int64_t n, int64_t column, double softcap) {
  Acc buffer;
  return *load_block(rows, n, column, 1, softcap, &buffer);
}

}  // namespace
}  // namespace REWARDOPS_ISA
}  // namespace rewardops::cpu
