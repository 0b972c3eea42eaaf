// Arguments of the kernels that turn entropies into token rewards.
#pragma once

#include "rewardops/rows.h"

namespace rewardops {

// [tokens] stands for [B, T], or [N] for packed rows.
template <typename T>
struct GtpoArgs {
  const T* rewards;         // [B]
  Tokens<const T> entropy;  // [tokens]
  Groups groups;
  int64_t blocks;              // of positions, which a kernel takes one at a time
  Tokens<const uint8_t> mask;  // [tokens]; null: every token is valid
  Rows rows;
  double alpha1, alpha2;  // weights of the reward, and of the entropy's share
  double threshold;       // rows with a reward above it are right
  double floor;           // lower bound of a wrong row's entropy
  Tokens<const T> grad;   // [tokens]; null in the forward pass
  Tokens<T> out;          // [tokens]: the shaped rewards, or the gradient in the entropy
};

}  // namespace rewardops
