// Arguments of the returns kernels, on every device.
#pragma once

#include <cstdint>

#include "rewardops/rows.h"

namespace rewardops {

enum class Steps : int { every_token = 0, flags = 1, ids = 2 };

template <typename T>
struct ReturnsArgs {
  Rows rows;
  Tokens<const uint8_t> mask;
  Tokens<const T> rewards;
  Steps kind;
  Tokens<const uint8_t> flags;
  Tokens<const int64_t> ids;
  Tokens<const T> grad;            // backward only
  Tokens<const T> returns;         // extremes, backward only
  bool largest;                    // extremes: the largest, and not the smallest
  double temperature;              // soft-min
  bool through_weights;            // soft-min rewards
  bool mean;                       // soft-min returns: of the steps that are left, and not their sum
  Tokens<double> log_sums;         // soft-min returns: of the steps that are left; forward out, backward in
  Tokens<T> out;
  bool stream;                     // the outputs are too large for the caches
  int64_t chunks;                  // of a row; 1 for whole rows
  double* state;                   // [rows, chunks, 2]
};

template <typename T>
struct TdArgs {
  Rows rows;
  Tokens<const uint8_t> mask;
  Tokens<const T> rewards, values, rho, trace;  // all but the first may be null
  Tokens<const double> gammas, lambdas;         // per token; may be null
  const double *row_gammas, *row_lambdas;       // [B]; may be null
  double gamma, lambda;                         // where neither is given
  const T* bootstrap;                           // [B], the value after a row; may be null
  bool decay;                                   // masked tokens are steps of reward and value 0
  bool backward;
  Tokens<T> out, returns;                       // forward; the second may be null
  Tokens<const T> grad, grad_returns;           // backward; either may be null
  Tokens<T> grad_rewards, grad_values;          // backward; the second may be null
  T* grad_bootstrap;                            // backward; may be null
  bool stream;
  int64_t chunks;
  double* state;
};

}  // namespace rewardops
