// The table of the kernels of one instruction set. The files of this folder are compiled once for each, with
// REWARDOPS_ISA as its name.
#include "rewardops/cpu/kernels.h"

#define REWARDOPS_TEXT_(x) #x
#define REWARDOPS_TEXT(x) REWARDOPS_TEXT_(x)
#define REWARDOPS_KERNEL(name, Args) name<T>,

namespace rewardops::cpu::REWARDOPS_ISA {

template <typename T>
constexpr TypedKernels<T> typed = {REWARDOPS_TYPED_KERNELS(REWARDOPS_KERNEL)};

extern const Kernels table;
const Kernels table = {REWARDOPS_TEXT(REWARDOPS_ISA), token_stats,  token_stats_backward, common_prefix<int32_t>,
                       common_prefix<int64_t>,        typed<float>, typed<double>};

}  // namespace rewardops::cpu::REWARDOPS_ISA
