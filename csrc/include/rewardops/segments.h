// Arguments of the reductions over rows and their segments.
#pragma once

#include "rewardops/rows.h"

namespace rewardops {

// [tokens] stands for [B, T], or [N] for packed rows.
template <typename T>
struct RowSumsArgs {
  Tokens<const T> values;      // [tokens]; null: the sums are counts of valid tokens, and there is a mask
  Tokens<const uint8_t> mask;  // [tokens]; null: every token is valid
  Rows rows;
  T* out;  // [B]
};

// In the order of rewardops.reference.segments.REDUCTIONS.
enum class Reduce : int { sum = 0, mean = 1, min = 2, max = 3, prod = 4, first = 5, last = 6, any = 7 };

template <typename T>
struct SegmentsArgs {
  Tokens<const T> values;      // [tokens]
  Tokens<const int64_t> ids;   // [tokens]; below 0 or not below `num_steps`: in no segment
  Tokens<const uint8_t> mask;  // [tokens]; null: every token is valid
  Rows rows;
  int64_t num_steps;  // per row
  Reduce op;
  T* out;                 // [B, num_steps]; 0 for a segment without a token; forward out, backward in
  double* kept;           // [B, num_steps]; forward out, backward in: a mean's count, an extreme's position, or
                          // the product of the values other than a single zero
  const T* grad;          // backward: [B, num_steps]
  Tokens<T> grad_values;  // [tokens]; null in the forward pass
};

}  // namespace rewardops
