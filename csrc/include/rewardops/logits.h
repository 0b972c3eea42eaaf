// Arguments of the logits kernels, on every device.
#pragma once

#include <cstdint>

#include "rewardops/rows.h"

namespace rewardops {

constexpr int64_t kIgnored = -100;  // a token of this id counts as masked

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

// Rows of logits: row n is (n / inner, n % inner), strides in elements; columns are adjacent.
struct LogitsRows {
  const void* data;  // null where absent
  DType dtype;
  int64_t inner, stride_outer, stride_inner;

  REWARDOPS_BOTH int64_t offset(int64_t n) const { return n / inner * stride_outer + n % inner * stride_inner; }
};

// N rows of logits and the tokens sampled from them.
struct LogitsArgs {
  LogitsRows logits;           // [N, V]
  const int64_t* tokens;       // [N]
  LogitsRows ref_logits;       // [N, V]; may be null
  const uint8_t* mask;         // [N]; null: every token is valid
  const double* temperatures;  // [N]; may be null
  double temperature;          // temperature of all rows, where temperatures is null
  double softcap;              // 0 for none
  int64_t first;               // the id of column 0, in a shard of the vocabulary
  int64_t vocab;               // columns of the vocabulary; the rest of V is padding
  double beta;                 // weight of the reference in the mixture of the Jensen-Shannon divergence

  REWARDOPS_BOTH bool masked(int64_t n) const { return (mask && !mask[n]) || tokens[n] == kIgnored; }
  REWARDOPS_BOTH double temperature_of(int64_t n) const { return temperatures ? temperatures[n] : temperature; }
};

// Outputs of a row, in the order of rewardops.logits.OUTPUTS.
enum Output : int {
  kLogprob,
  kEntropy,
  kLogsumexp,
  kSumSq,
  kSumSqLogprob,
  kMeanLogit,
  kIsTop1,
  kRefLogprob,
  kKl,
  kReverseKl,
  kJsd,
  kOutputs
};

// Statistics of a row that the backward pass reads, in the order of rewardops.reference.logits.SAVED.
enum Saved : int {
  kShift,
  kTotal,
  kSavedEntropy,
  kSavedSumSq,
  kSavedSumSqLogprob,
  kRefShift,
  kRefTotal,
  kSavedKl,
  kSavedReverseKl,
  kMixedKl,
  kRefMixedKl,
  kSaved
};

// Partial statistics of a row, in the order of rewardops.reference.logits.RECORD.
enum Field : int {
  kFieldShift,
  kFieldTotal,
  kFieldWeighted,
  kFieldSquares,
  kFieldDistance,
  kFieldColumns,
  kFieldToken,
  kFieldFound,
  kFieldRefShift,
  kFieldRefTotal,
  kFieldRefToken,
  kFieldKl,
  kFieldReverse,
  kFieldSquaresWeighted,
  kFields
};

// Outputs, or partial statistics where there is a record.
struct TokenStatsArgs {
  LogitsArgs in;
  int64_t count;            // N
  void* outputs[kOutputs];  // [N] each: float, double for double logits, bytes for is_top1; each may be null
  double* saved;            // [kSaved, N], or its first five rows without a reference
  double* record;           // partial statistics: [N, kFields]; null otherwise
  int terms;                // partial statistics: the sums to take, bits of Term (cpu/logits_sums.h)
};

struct TokenStatsBackwardArgs {
  LogitsArgs in;
  int64_t count;                       // N
  const void* grads[kOutputs];         // [N] each, in the type of the outputs; each may be null
  const double* saved;                 // saved by the forward pass
  const double *grad_record, *record;  // partial statistics: [N, kFields], instead of grads and saved
  int64_t width;                       // columns of the gradients; those beyond vocab become 0
  LogitsRows grad_logits, grad_ref;    // [N, width]; either may be null, or be the logits themselves
};

constexpr int kPolicyOutputs = kRefLogprob;  // the outputs of one model come first

// Statistics and the gradient of a loss that is linear in them, without a reference.
struct TokenStatsAndGradArgs {
  LogitsArgs in;
  int64_t count;                              // N
  float* outputs[kPolicyOutputs];             // [N] each; each may be null; is_top1 is 0 or 1
  const float* coefficients[kPolicyOutputs];  // [N] each, coefficients of the loss; each may be null
  int64_t width;                              // columns of the gradient; those beyond vocab become 0
  LogitsRows grad;                            // [N, width]; may be the logits themselves
};

}  // namespace rewardops
