// Arguments of the advantages kernels, on every device.
#pragma once

#include <cstdint>

#include "rewardops/rows.h"

namespace rewardops {

// Baselines, in the order of rewardops.reference.advantages.BASELINES.
enum class Baseline : int {
  mean = 0,
  leave_one_out = 1,
  median = 2,
  quantile = 3,
  max = 4,
  second_max = 5,
  length_weighted = 6,
  values = 7,
  none = 8
};
// Scales, in the order of rewardops.reference.advantages.SCALES.
enum class Scale : int { std = 0, batch_std = 1, mean_abs = 2, range = 3, none = 4 };

// Group-relative advantages of B rows. Where rewards belong to rows of tokens, advantages are also written to the
// tokens; [tokens] stands for [B, T], or [N] for packed rows.
template <typename T>
struct AdvantagesArgs {
  const T* rewards;            // [B]
  const int64_t* groups;       // [B], labels
  const T* baseline_values;    // [B], the baseline of Baseline::values; null otherwise
  const T* lengths;            // [B], the weights of Baseline::length_weighted; null otherwise
  Tokens<const uint8_t> mask;  // [tokens]; null: every token is valid
  Rows rows;                   // without tokens_given only the batch is set
  bool tokens_given;           // the rewards belong to rows of tokens: empty rows are not members of their group
  Baseline baseline;
  double quantile;  // rank of Baseline::quantile, in [0, 1]
  Scale scale;
  double eps;               // added to the scale
  int ddof;                 // the std divides by n - ddof
  bool raw;                 // in a group of one the advantage is the reward
  T* advantages;            // forward: [B]
  T* inv_scale;             // [B], 1 / (scale + eps), or 0 for equal rewards; forward out, backward in
  T* numerators;            // [B], reward minus baseline; forward out, backward in
  Tokens<T> out;            // forward: [tokens], the advantage of the row; null without tokens
  Tokens<const T> grad;     // backward: [tokens], or [B] without tokens; may be null
  const T* grad_inv_scale;  // backward: [B]; may be null
  double* sums;             // backward: [B, parts], workspace: sums of the gradients of a row's tokens
  int64_t parts;
  T* grad_rewards;   // backward: [B]
  T* grad_baseline;  // backward: [B]; may be null
};

// A value of each row, written to its valid tokens; 0 elsewhere.
template <typename T>
struct RowsToTokensArgs {
  const T* values;             // [B]
  Tokens<const uint8_t> mask;  // [tokens]; null: every token is valid
  Rows rows;
  Tokens<T> out;  // [tokens]
};

}  // namespace rewardops
