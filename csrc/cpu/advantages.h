// Group-relative advantages: statistics of the groups, then a row at a time.
#pragma once

#include <cstdint>

#include "rewardops/cpu/kernels.h"

namespace rewardops::cpu {

enum class Baseline : int { none = 0, mean = 1, leave_one_out = 2 };
enum class Scale : int { none = 0, std = 1 };

template <typename T>
struct AdvantagesArgs {
  Rows rows;                    // batch; the rest only where rows_given
  bool tokens_given;            // the rewards belong to rows of tokens: empty ones are not members
  Tokens<const uint8_t> mask;
  const T* rewards;             // [B]
  const int64_t* groups;        // [B]
  Baseline baseline;
  Scale scale;
  double eps;
  int ddof;
  T* advantages;                // forward: [B]
  T* inv_scale;                 // forward: [B]
  Tokens<const T> grad;         // backward: tokens, or [B] where none are given; may be null
  const T* grad_inv_scale;      // backward: [B]; may be null
  T* grad_rewards;              // backward: [B]
};

template <typename T>
void group_advantages(const AdvantagesArgs<T>& a, int threads);
template <typename T>
void group_advantages_backward(const AdvantagesArgs<T>& a, int threads);

}  // namespace rewardops::cpu
