#include "rewardops/cpu/advantages.h"

namespace rewardops::cpu::REWARDOPS_ISA {
REWARDOPS_ADVANTAGES_KERNELS(REWARDOPS_INSTANTIATE)
}
