#include "rewardops/cpu/kl.h"

namespace rewardops::cpu::REWARDOPS_ISA {
REWARDOPS_KL_KERNELS(REWARDOPS_INSTANTIATE)
}
