#include "rewardops/cpu/returns.h"
#include "rewardops/cpu/returns_softmin.h"

namespace rewardops::cpu::REWARDOPS_ISA {
REWARDOPS_RETURNS_KERNELS(REWARDOPS_INSTANTIATE)
}
