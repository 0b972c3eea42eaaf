#include "rewardops/cpu/td.h"

namespace rewardops::cpu::REWARDOPS_ISA {
REWARDOPS_TD_KERNELS(REWARDOPS_INSTANTIATE)
}
