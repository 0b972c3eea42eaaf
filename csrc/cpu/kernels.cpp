// One instruction set's table of kernels: this file is compiled once for each, with REWARDOPS_ISA its name.
//
// Everything in it has internal linkage, and no template of the standard library is instantiated here: the
// linker keeps one copy of such code, and it could be the one that this machine cannot run.
#include "rewardops/cpu/kernels.h"

#include "rewardops/cpu/advantages.h"
#include "rewardops/cpu/entropy.h"
#include "rewardops/cpu/kl.h"
#include "rewardops/cpu/logits.h"
#include "rewardops/cpu/logits_backward.h"
#include "rewardops/cpu/prefix_tree.h"
#include "rewardops/cpu/returns.h"
#include "rewardops/cpu/segments.h"
#include "rewardops/cpu/td.h"

#define REWARDOPS_TEXT_(x) #x
#define REWARDOPS_TEXT(x) REWARDOPS_TEXT_(x)

namespace rewardops::cpu {
namespace REWARDOPS_ISA {
namespace {

template <typename T>
constexpr TypedKernels<T> typed() {
  return {token_kl<T>,
          spread<T>,
          row_sums<T>,
          gtpo<T>,
          gtpo_backward<T>,
          {extremes_rows<T>, extremes_aggregates<T>, extremes_carries<T>, extremes_chunks<T>, nullptr},
          {extremes_backward_rows<T>, extremes_backward_aggregates<T>, extremes_backward_carries<T>,
           extremes_backward_chunks<T>, nullptr},
          {td_rows<T>, td_aggregates<T>, td_carries<T>, td_chunks<T>, td_joins<T>},
          softmin<T>,
          softmin_backward<T>,
          softmin_returns<T>,
          softmin_returns_backward<T>};
}

}  // namespace

extern const Kernels table;
const Kernels table = {REWARDOPS_TEXT(REWARDOPS_ISA), token_stats,           token_stats_backward,
                       common_prefix<int32_t>,        common_prefix<int64_t>, typed<float>(),
                       typed<double>()};

}  // namespace REWARDOPS_ISA
}  // namespace rewardops::cpu
