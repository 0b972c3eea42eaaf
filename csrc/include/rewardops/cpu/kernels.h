// The kernels that exist once per instruction set: their arguments, and the table that holds them.
//
// Raw pointers and sizes only. A kernel works on the items [begin, end) of its outermost loop and keeps no
// state, so that the launcher may split the items over threads and the result does not depend on how.
#pragma once

#include <cstdint>

#include "rewardops/logits.h"
#include "rewardops/returns.h"
#include "rewardops/rows.h"

namespace rewardops::cpu {

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

// A few long rows are scanned in chunks: so many tokens each, whatever the number of threads.
constexpr int64_t kScanChunk = 1 << 15;

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
