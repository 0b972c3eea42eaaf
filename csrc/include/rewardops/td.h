// Arguments of the scans of discounted sums and temporal differences, on every device.
#pragma once

#include <cstdint>

#include "rewardops/rows.h"

namespace rewardops {

// [tokens] stands for [B, T], or [N] for packed rows.
template <typename T>
struct TdArgs {
  Tokens<const T> rewards, values;         // [tokens]; values may be null
  const T* bootstrap;                      // [B], the value after a row; null for 0
  Tokens<const T> rho, trace;              // [tokens]; null for 1
  Tokens<const double> gammas, lambdas;    // [tokens]; null: not per token
  const double *row_gammas, *row_lambdas;  // [B]; null: not per row
  Tokens<const uint8_t> mask;              // [tokens]; null: every token is valid
  Rows rows;
  double gamma, lam;  // used where neither per-token nor per-row arrays exist
  bool decay;         // masked tokens are steps of reward and value 0
  bool backward;
  Tokens<T> out, returns;               // forward, [tokens]: y, and y + values; returns may be null
  Tokens<const T> grad, grad_returns;   // backward, [tokens]; either may be null
  Tokens<T> grad_rewards, grad_values;  // backward, [tokens]; grad_values may be null
  T* grad_bootstrap;                    // backward, [B]; may be null
  bool stream;                          // CPU: the outputs are too large for the caches
  int64_t chunks;                       // CPU: chunks of a row; 1 for whole rows
  double* state;                        // CPU: [B, chunks, 2], workspace; null for whole rows
};

}  // namespace rewardops
