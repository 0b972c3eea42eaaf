#include "rewardops/cpu/segments.h"

namespace rewardops::cpu::REWARDOPS_ISA {
REWARDOPS_SEGMENTS_KERNELS(REWARDOPS_INSTANTIATE)
}
