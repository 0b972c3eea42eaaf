#include "rewardops/cpu/scopes.h"

namespace rewardops::cpu::REWARDOPS_ISA {
REWARDOPS_SCOPES_KERNELS(REWARDOPS_INSTANTIATE)
}
