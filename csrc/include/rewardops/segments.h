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
  Tokens<const T> values;       // [tokens]; null where they are not read
  Tokens<const uint8_t> flags;  // [tokens], 1 at the ends of steps; after a row's last one tokens are of no step
  Tokens<const int64_t> ids;    // [tokens], where there are no flags: below 0 in no step; null: a row is one step
  Tokens<const uint8_t> mask;   // [tokens]; null: every token is valid
  Rows rows;
  int64_t num_steps;  // per row; steps from here on are left out
  Reduce op;
  T* out;         // [B, num_steps]; 0 for a step without a token; forward out, backward in
  double* kept;   // [B, num_steps]; forward out, backward in: a mean's count, an extreme's position, or the product of
                  // the values other than a single zero; not for sums and `any`
  const T* grad;  // to tokens: [B, num_steps], gradients, or values of steps, as the gradient of a sum is
  Tokens<T> on_tokens;   // [tokens]; null in a reduction
  Tokens<uint8_t> ends;  // [tokens]; not null: on_tokens is 0 but at the ends of steps, and flags of these are written
};

}  // namespace rewardops
