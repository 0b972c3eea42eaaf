// Reductions of a row's tokens over its segments.
#pragma once

#include <cstdint>

#include "rewardops/rows.h"

namespace rewardops::cpu {

enum class Reduce : int { sum = 0, mean = 1, min = 2, max = 3, prod = 4, first = 5, last = 6, any = 7 };

template <typename T>
struct SegmentArgs {
  Rows rows;
  Tokens<const uint8_t> mask;
  Tokens<const int64_t> ids;  // below 0, or from `segments` on: of no segment
  Tokens<const T> values;
  int64_t segments;
  Reduce op;
  T* out;         // [B, segments]; 0 for a segment without a token
  double* kept;   // [B, segments]: the count, the position, or the product of what is not 0, for the backward
  const T* grad;  // backward: [B, segments]
  Tokens<T> grad_values;
};

template <typename T>
void segment_reduce(const SegmentArgs<T>& a, int threads);
template <typename T>
void segment_reduce_backward(const SegmentArgs<T>& a, int threads);

}  // namespace rewardops::cpu
