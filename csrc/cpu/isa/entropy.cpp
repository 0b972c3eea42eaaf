#include "rewardops/cpu/entropy.h"

namespace rewardops::cpu::REWARDOPS_ISA {
REWARDOPS_ENTROPY_KERNELS(REWARDOPS_INSTANTIATE)
}
