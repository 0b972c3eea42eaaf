// The table of the kernels that exist once per instruction set.
//
// Raw pointers and sizes only. A kernel works on the items [begin, end) of its outermost loop and keeps no state: the
// launcher may split the items over threads in any way, with the same result.
#pragma once

#include <cstdint>

#include "rewardops/advantages.h"
#include "rewardops/entropy.h"
#include "rewardops/kl.h"
#include "rewardops/logits.h"
#include "rewardops/returns.h"
#include "rewardops/rows.h"
#include "rewardops/scopes.h"
#include "rewardops/segments.h"
#include "rewardops/td.h"

namespace rewardops::cpu {

// Tokens per chunk, where a few long rows are scanned in chunks; independent of the number of threads.
constexpr int64_t kScanChunk = 1 << 15;
// Tokens per part of a row in the sums of a scope.
constexpr int64_t kScopeBlock = 4096;
// Positions per item of gtpo.
constexpr int64_t kGtpoBlock = 512;

// A scan over whole rows, or over chunks of them: the aggregate of each chunk, the carries between chunks, the results
// within each, and, where `joins` is not null, the gradients across their borders.
template <typename Args>
struct Scan {
  void (*rows)(const Args&, int64_t begin, int64_t end);
  void (*aggregates)(const Args&, int64_t begin, int64_t end);  // items: rows x chunks
  void (*carries)(const Args&, int64_t begin, int64_t end);     // items: rows
  void (*chunks)(const Args&, int64_t begin, int64_t end);      // items: rows x chunks
  void (*joins)(const Args&, int64_t begin, int64_t end);       // items: rows; may be null
};

// The kernels that exist for float and double, by family: X(name, arguments). A new kernel is added here.
// clang-format off
#define REWARDOPS_KL_KERNELS(X) X(token_kl, TokenKlArgs)                 /* items: tokens */
#define REWARDOPS_ADVANTAGES_KERNELS(X) X(rows_to_tokens, RowsToTokensArgs)  /* items: rows, where nothing is said */
#define REWARDOPS_SEGMENTS_KERNELS(X) X(row_sums, RowSumsArgs)
#define REWARDOPS_ENTROPY_KERNELS(X)  /* items: groups x blocks of kGtpoBlock positions */ \
  X(gtpo, GtpoArgs) X(gtpo_backward, GtpoArgs)
#define REWARDOPS_SCOPES_KERNELS(X) X(scope_parts, ScopesArgs) X(scope_map, ScopesArgs)  /* items: parts of rows */
#define REWARDOPS_TD_KERNELS(X)  /* the parts of a scan */ \
  X(td_rows, TdArgs) X(td_aggregates, TdArgs) X(td_carries, TdArgs) X(td_chunks, TdArgs) X(td_joins, TdArgs)
#define REWARDOPS_RETURNS_KERNELS(X)  /* the parts of two scans, then rows */                                       \
  X(extremes_rows, ReturnsArgs) X(extremes_aggregates, ReturnsArgs)                                                 \
  X(extremes_carries, ReturnsArgs) X(extremes_chunks, ReturnsArgs)                                                  \
  X(extremes_backward_rows, ReturnsArgs) X(extremes_backward_aggregates, ReturnsArgs)                               \
  X(extremes_backward_carries, ReturnsArgs) X(extremes_backward_chunks, ReturnsArgs)                                \
  X(softmin_returns, ReturnsArgs) X(softmin_returns_backward, ReturnsArgs)                                          \
  X(softmin_rewards, ReturnsArgs) X(softmin_rewards_backward, ReturnsArgs)
#define REWARDOPS_TYPED_KERNELS(X)                                                                                  \
  REWARDOPS_KL_KERNELS(X) REWARDOPS_ADVANTAGES_KERNELS(X) REWARDOPS_SEGMENTS_KERNELS(X) REWARDOPS_ENTROPY_KERNELS(X) \
  REWARDOPS_SCOPES_KERNELS(X) REWARDOPS_TD_KERNELS(X) REWARDOPS_RETURNS_KERNELS(X)
// clang-format on

// The kernels of one precision.
template <typename T>
struct TypedKernels {
#define REWARDOPS_DECLARE(name, Args) void (*name)(const Args<T>&, int64_t begin, int64_t end);
  REWARDOPS_TYPED_KERNELS(REWARDOPS_DECLARE)
#undef REWARDOPS_DECLARE
};

// The kernels of one instruction set.
struct Kernels {
  const char* name;
  // logits; items: rows
  void (*token_stats)(const TokenStatsArgs&, int64_t begin, int64_t end);
  void (*token_stats_backward)(const TokenStatsBackwardArgs&, int64_t begin, int64_t end);
  // prefix_tree: the number of equal leading tokens of two rows of n tokens, of 4 or 8 bytes each
  int64_t (*common_prefix4)(const int32_t* a, const int32_t* b, int64_t n);
  int64_t (*common_prefix8)(const int64_t* a, const int64_t* b, int64_t n);
  TypedKernels<float> f32;
  TypedKernels<double> f64;

  template <typename T>
  const TypedKernels<T>& of() const;
};

template <>
inline const TypedKernels<float>& Kernels::of<float>() const {
  return f32;
}
template <>
inline const TypedKernels<double>& Kernels::of<double>() const {
  return f64;
}

// The table of the best instruction set of this machine, or of the one that the environment's REWARDOPS_ISA names.
const Kernels& kernels();

#ifdef REWARDOPS_ISA
// In a file that is compiled once per instruction set: its kernels, which csrc/cpu/isa/<family>.cpp define.
//
// Their names, and those of all helpers, are in the namespace of the instruction set, and they instantiate no template
// of the standard library: the linker would keep one copy of such code, possibly of an instruction set that this
// machine does not have.
namespace REWARDOPS_ISA {

// Compiled once, not once per caller: for what works on a block or a row, whose call costs nothing.
#define REWARDOPS_ONCE [[gnu::noinline, gnu::noclone]]

#define REWARDOPS_DECLARE(name, Args) \
  template <typename T>               \
  void name(const Args<T>&, int64_t begin, int64_t end);
REWARDOPS_TYPED_KERNELS(REWARDOPS_DECLARE)
#undef REWARDOPS_DECLARE
#define REWARDOPS_INSTANTIATE(name, Args)                          \
  template void name<float>(const Args<float>&, int64_t, int64_t); \
  template void name<double>(const Args<double>&, int64_t, int64_t);

void token_stats(const TokenStatsArgs&, int64_t begin, int64_t end);
void token_stats_backward(const TokenStatsBackwardArgs&, int64_t begin, int64_t end);
template <typename Token>
int64_t common_prefix(const Token* a, const Token* b, int64_t n);

}  // namespace REWARDOPS_ISA
#endif

}  // namespace rewardops::cpu
