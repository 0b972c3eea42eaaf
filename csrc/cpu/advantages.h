// Group-relative advantages: statistics of the groups, then a row at a time.
#pragma once

#include "rewardops/advantages.h"

namespace rewardops::cpu {

template <typename T>
void group_advantages(const AdvantagesArgs<T>& a, int threads);
template <typename T>
void group_advantages_backward(const AdvantagesArgs<T>& a, int threads);

}  // namespace rewardops::cpu
