// Arguments of the per-token KL kernels.
#pragma once

#include <cstdint>

namespace rewardops {

// Estimators, in the order of rewardops.reference.kl.ESTIMATORS.
enum class KlEstimator : int {
  k1 = 0,
  abs = 1,
  k2 = 2,
  k3 = 3,
  k1_plus = 4,
  k3_plus = 5,
  binary_kl = 6,
  binary_tv = 7
};

// Arrays of N tokens each. The estimate is clamped, weighted by exp(logprob - old_logprob) (the ratio) and scaled.
template <typename T>
struct TokenKlArgs {
  const T *logprob, *ref_logprob;
  const uint8_t* mask;   // null: every token is valid
  const T* old_logprob;  // log-probabilities of the sampling policy, NaN where unknown; null: no ratio
  const T* rewards;      // forward: added to the estimate; may be null
  KlEstimator estimator;
  T largest_d, largest_value;  // clamps of |logprob - ref_logprob| and |logprob - old_logprob|, and of |estimate|
  T scale;
  bool ratio_grad;   // the ratio has a gradient
  T ratio_cap;       // the largest ratio; infinite for none
  const T* grad;     // backward: the upstream gradient; null in the forward pass
  bool stream;       // the outputs are too large for the caches
  T *out, *out_ref;  // forward: the result, and null; backward: the gradients in both, either may be null
};

}  // namespace rewardops
