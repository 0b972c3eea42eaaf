// The kernels that exist once per instruction set: their arguments, and the table that holds them.
//
// Raw pointers and sizes only. A kernel works on the items [begin, end) of its outermost loop and keeps no
// state, so that the launcher may split the items over threads and the result does not depend on how.
#pragma once

#include <cstdint>

#include "rewardops/cpu/rows.h"

namespace rewardops::cpu {

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

// Rows of logits: row n is (n / inner, n % inner), strides in elements.
struct LogitsRows {
  const void* data;  // null where not given
  DType dtype;
  int64_t inner, stride_outer, stride_inner;
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
};

constexpr int64_t kIgnored = -100;  // a token of this id counts as masked

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

enum class KlEstimator : int { k1 = 0, abs = 1, k2 = 2, k3 = 3, k1_plus = 4, k3_plus = 5, binary_kl = 6, binary_tv = 7 };

template <typename T>
struct TokenKlArgs {
  const T *grad, *logprob, *ref_logprob;  // grad: backward only
  const T* behavior;                      // log-probabilities of the sampling policy; may be null
  const T* rewards;                       // forward: added; may be null
  const uint8_t* mask;
  KlEstimator estimator;
  T largest_d, largest_value;  // beyond these both are clamped
  T scale;
  bool live;     // the importance ratio has a gradient
  bool stream;   // outputs are too large for the caches
  T *out, *out_ref;  // backward: either may be null
};

// Rows grouped: members[offsets[g]:offsets[g + 1]] are the rows of group g, ascending.
struct Groups {
  int64_t count;
  const int64_t *members, *offsets;
};

template <typename T>
struct SpreadArgs {
  Rows rows;
  Tokens<const uint8_t> mask;
  const T* values;  // [B]
  Tokens<T> out;
};

template <typename T>
struct RowSumsArgs {
  Rows rows;
  Tokens<const uint8_t> mask;
  Tokens<const T> values;  // null: the valid tokens are counted
  T* out;                  // [B]
};

template <typename T>
struct GtpoArgs {
  Rows rows;
  Groups groups;
  Tokens<const uint8_t> mask;
  const T* rewards;  // [B]
  Tokens<const T> entropy;
  double alpha1, alpha2, threshold, floor;
  Tokens<const T> grad;  // backward only
  Tokens<T> out;         // the shaped rewards, or the gradient in entropy
};

enum class Steps : int { every_token = 0, flags = 1, ids = 2 };

// A few long rows are scanned in chunks: so many tokens each, whatever the number of threads.
constexpr int64_t kScanChunk = 1 << 15;

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

// A scan over whole rows, or over chunks of them: their aggregates, the carries between them, the chunks themselves,
// and, where `joins`, what one hands to the next.
template <typename Args>
struct Scan {
  void (*rows)(const Args&, int64_t begin, int64_t end);
  void (*aggregates)(const Args&, int64_t begin, int64_t end);  // items: rows x chunks
  void (*carries)(const Args&, int64_t begin, int64_t end);     // items: rows
  void (*chunks)(const Args&, int64_t begin, int64_t end);      // items: rows x chunks
  void (*joins)(const Args&, int64_t begin, int64_t end);       // items: rows; may be null
};

template <typename T>
struct TypedKernels {
  void (*token_kl)(const TokenKlArgs<T>&, int64_t begin, int64_t end);           // items: tokens
  void (*spread)(const SpreadArgs<T>&, int64_t begin, int64_t end);              // items: rows
  void (*row_sums)(const RowSumsArgs<T>&, int64_t begin, int64_t end);           // items: rows
  // Items: groups x blocks of kGtpoBlock positions.
  void (*gtpo)(const GtpoArgs<T>&, int64_t blocks, int64_t begin, int64_t end);
  void (*gtpo_backward)(const GtpoArgs<T>&, int64_t blocks, int64_t begin, int64_t end);
  Scan<ReturnsArgs<T>> extremes, extremes_backward;
  Scan<TdArgs<T>> td;
  void (*softmin)(const ReturnsArgs<T>&, int64_t begin, int64_t end);            // items: rows
  void (*softmin_backward)(const ReturnsArgs<T>&, int64_t begin, int64_t end);
  void (*softmin_returns)(const ReturnsArgs<T>&, int64_t begin, int64_t end);
  void (*softmin_returns_backward)(const ReturnsArgs<T>&, int64_t begin, int64_t end);
};

constexpr int64_t kGtpoBlock = 512;

struct Kernels {
  const char* name;
  void (*token_stats)(const TokenStatsArgs&, int64_t begin, int64_t end);                   // items: rows
  void (*token_stats_backward)(const TokenStatsBackwardArgs&, int64_t begin, int64_t end);  // items: rows
  // Equal leading tokens of two rows of n tokens of 4 or 8 bytes.
  int64_t (*common_prefix4)(const int32_t* a, const int32_t* b, int64_t n);
  int64_t (*common_prefix8)(const int64_t* a, const int64_t* b, int64_t n);
  TypedKernels<float> f32;
  TypedKernels<double> f64;

  template <typename T>
  const TypedKernels<T>& of() const;
};

template <>
inline const TypedKernels<float>& Kernels::of<float>() const { return f32; }
template <>
inline const TypedKernels<double>& Kernels::of<double>() const { return f64; }

// The table of the best instruction set of this machine; REWARDOPS_ISA names a lesser one.
const Kernels& kernels();

}  // namespace rewardops::cpu
