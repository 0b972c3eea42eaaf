// Arguments of the advantages kernels, on every device.
#pragma once

#include <cstdint>

#include "rewardops/rows.h"

namespace rewardops {

enum class Baseline : int {
  mean = 0, leave_one_out = 1, median = 2, quantile = 3, max = 4, second_max = 5, length_weighted = 6, given = 7, none = 8
};
enum class Scale : int { std = 0, batch_std = 1, mean_abs = 2, range = 3, none = 4 };

template <typename T>
struct AdvantagesArgs {
  Rows rows;                    // batch; the rest only where tokens_given
  bool tokens_given;            // the rewards belong to rows of tokens: empty ones are not members
  Tokens<const uint8_t> mask;
  const T* rewards;             // [B]
  const int64_t* groups;        // [B]
  const T* given;               // [B]; may be null
  const T* lengths;             // [B]; may be null
  Baseline baseline;
  double quantile;
  Scale scale;
  double eps;
  int ddof;
  bool raw_singletons;
  T* advantages;                // forward: [B]
  Tokens<T> out;                // forward: the same written to the tokens, where they are given
  T* inv_scale;                 // [B]; forward out, backward in
  T* numerators;                // [B], reward less baseline; forward out, backward in
  Tokens<const T> grad;         // backward: tokens, or [B] where none are given; may be null
  const T* grad_inv_scale;      // backward: [B]; may be null
  double* sums;                 // backward: [B, parts], memory for sums of the gradients of a row's tokens
  int64_t parts;
  T* grad_rewards;              // backward: [B]
  T* grad_given;                // backward: [B]; may be null
};

}  // namespace rewardops
