#include "rewardops/cpu/prefix_tree.h"

namespace rewardops::cpu::REWARDOPS_ISA {
template int64_t common_prefix(const int32_t*, const int32_t*, int64_t);
template int64_t common_prefix(const int64_t*, const int64_t*, int64_t);
}  // namespace rewardops::cpu::REWARDOPS_ISA
