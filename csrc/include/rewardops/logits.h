// Arguments of the logits kernels, on every device.
#pragma once

#include <cstdint>

#include "rewardops/rows.h"

namespace rewardops {

constexpr int64_t kIgnored = -100;  // a token of this id counts as masked

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

// Rows of logits: row n is (n / inner, n % inner), strides in elements.
struct LogitsRows {
  const void* data;  // null where not given
  DType dtype;
  int64_t inner, stride_outer, stride_inner;

  REWARDOPS_BOTH int64_t offset(int64_t n) const { return n / inner * stride_outer + n % inner * stride_inner; }
};

struct LogitsArgs {
  LogitsRows logits, ref;
  int64_t vocab;         // columns that exist; the tensor may have more
  int64_t first;         // the id of column 0
  const int64_t* tokens;
  const uint8_t* mask;   // may be null
  double temperature;
  const double* temperatures;  // one per row, or null
  double softcap;        // 0 for none
  double beta;           // of the Jensen-Shannon divergence

  REWARDOPS_BOTH bool masked(int64_t n) const { return (mask && !mask[n]) || tokens[n] == kIgnored; }
  REWARDOPS_BOTH double temperature_of(int64_t n) const { return temperatures ? temperatures[n] : temperature; }
};

// What can be asked for, in the order of rewardops.logits.OUTPUTS; each array may be null.
enum Output : int { kLogprob, kEntropy, kLogsumexp, kSumSq, kSumSqLogprob, kMeanLogit, kIsTop1, kRefLogprob,
                    kKl, kReverseKl, kJsd, kOutputs };

// What the backward pass needs to know of a row, in the order of rewardops.reference.logits.SAVED.
enum Saved : int { kShift, kTotal, kSavedEntropy, kSavedSumSq, kSavedSumSqLogprob, kRefShift, kRefTotal,
                   kSavedKl, kSavedReverseKl, kMixedKl, kRefMixedKl, kSaved };

// Partial statistics of a row, in the order of rewardops.reference.logits.RECORD.
enum Field : int { kFieldShift, kFieldTotal, kFieldWeighted, kFieldSquares, kFieldDistance, kFieldColumns, kFieldToken,
                   kFieldFound, kFieldRefShift, kFieldRefTotal, kFieldRefToken, kFieldKl, kFieldReverse,
                   kFieldSquaresWeighted, kFields };

// Outputs are float, or double for double logits; is_top1 is bytes; what is saved and records are double.
struct TokenStatsArgs {
  LogitsArgs in;
  int64_t count;
  void* outputs[kOutputs];
  double* saved;   // [kSaved, count], or its first five rows where there is no reference
  double* record;  // [count, kFields]: partial statistics instead of outputs; null otherwise
  int terms;       // partial statistics: which sums (bits of Term)
};

struct TokenStatsBackwardArgs {
  LogitsArgs in;
  int64_t count;
  const void* grads[kOutputs];  // each may be null
  const double* saved;
  const double *grad_record, *record;  // partial statistics: instead of grads and saved
  int64_t width;                       // columns of the gradient; those beyond vocab are 0
  LogitsRows grad_logits, grad_ref;    // either may be null, and be the logits themselves
};

constexpr int kPolicyOutputs = kRefLogprob;  // those of one model come first

// Statistics and the gradient of a loss that is linear in them, without a reference.
struct TokenStatsAndGradArgs {
  LogitsArgs in;
  int64_t count;
  float* outputs[kPolicyOutputs];             // each may be null; is_top1 is 0 or 1
  const float* coefficients[kPolicyOutputs];  // each may be null
  int64_t width;                              // as above
  LogitsRows grad;                            // may be the logits themselves
};

}  // namespace rewardops
