// Arguments of the returns kernels, on every device.
#pragma once

#include <cstdint>

#include "rewardops/rows.h"
#include "rewardops/td.h"  // for the CUDA launchers, which have both families in one file

namespace rewardops {

// The tokens that end a step: every valid token, those with a flag, or the last one of each id.
enum class Steps : int { every_token = 0, flags = 1, ids = 2 };

// [tokens] stands for [B, T], or [N] for packed rows.
template <typename T>
struct ReturnsArgs {
  Tokens<const T> rewards;     // [tokens]
  Tokens<const uint8_t> mask;  // [tokens]; null: every token is valid
  Rows rows;
  Steps kind;
  Tokens<const uint8_t> flags;  // [tokens], 1 at step ends; only with Steps::flags
  Tokens<const int64_t> ids;    // [tokens], a step's id, below 0 outside steps; only with Steps::ids
  Tokens<const T> grad;         // backward: [tokens]
  Tokens<const T> returns;      // backward of the extremes: [tokens]
  bool largest;                 // extremes: the largest, not the smallest
  double temperature;           // soft minimum
  bool through_weights;         // soft-min rewards: the weights have a gradient
  bool mean;                    // soft-min returns: the mean over the remaining steps, not the sum
  Tokens<double> log_sums;      // soft-min returns: [tokens], over the remaining steps; forward out, backward in
  Tokens<T> out;                // [tokens]: the returns or rewards, or the gradient in the rewards
  bool stream;                  // CPU: the outputs are too large for the caches
  int64_t chunks;               // CPU: chunks of a row; 1 for whole rows
  double* state;                // CPU: [B, chunks, 2], workspace; null for whole rows
};

}  // namespace rewardops
