// The table of kernels of one instruction set: this file is compiled once for each, with REWARDOPS_ISA as its name.
//
// All of it has internal linkage and instantiates no template of the standard library: the linker would keep one copy of
// such code, possibly of an instruction set that this machine does not have.
#include "rewardops/cpu/kernels.h"

#include "rewardops/cpu/advantages.h"
#include "rewardops/cpu/entropy.h"
#include "rewardops/cpu/kl.h"
#include "rewardops/cpu/logits.h"
#include "rewardops/cpu/logits_backward.h"
#include "rewardops/cpu/prefix_tree.h"
#include "rewardops/cpu/returns.h"
#include "rewardops/cpu/returns_softmin.h"
#include "rewardops/cpu/segments.h"
#include "rewardops/cpu/td.h"

#define REWARDOPS_TEXT_(x) #x
#define REWARDOPS_TEXT(x) REWARDOPS_TEXT_(x)

namespace rewardops::cpu {
namespace REWARDOPS_ISA {
namespace {

template <typename T>
constexpr TypedKernels<T> typed() {
#define REWARDOPS_KERNEL(name, Args) name<T>,
  return {REWARDOPS_TYPED_KERNELS(REWARDOPS_KERNEL)
          gtpo<T>,
          gtpo_backward<T>,
          {td_rows<T>, td_aggregates<T>, td_carries<T>, td_chunks<T>, td_joins<T>},
          {extremes_rows<T>, extremes_aggregates<T>, extremes_carries<T>, extremes_chunks<T>, nullptr},
          {extremes_backward_rows<T>, extremes_backward_aggregates<T>, extremes_backward_carries<T>,
           extremes_backward_chunks<T>, nullptr}};
#undef REWARDOPS_KERNEL
}

}  // namespace

extern const Kernels table;
const Kernels table = {REWARDOPS_TEXT(REWARDOPS_ISA), token_stats,           token_stats_backward,
                       common_prefix<int32_t>,        common_prefix<int64_t>, typed<float>(),
                       typed<double>()};

}  // namespace REWARDOPS_ISA
}  // namespace rewardops::cpu
