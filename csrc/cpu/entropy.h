// GTPO's token rewards over groups and blocks of positions.
#pragma once

#include <cstdint>

#include "rewardops/cpu/kernels.h"

namespace rewardops::cpu {

// `labels` are the group labels [B], `longest` the length of the longest row (an upper bound will do). The
// backward where `a.grad` is given.
template <typename T>
void launch_gtpo(GtpoArgs<T> a, const int64_t* labels, int64_t longest, int threads);

}  // namespace rewardops::cpu
