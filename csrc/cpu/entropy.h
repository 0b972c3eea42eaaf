// GTPO's token rewards over groups and blocks of positions.
#pragma once

#include "rewardops/entropy.h"

namespace rewardops::cpu {

// `labels` are the group labels [B], from which `a.groups` is filled; `longest` is the length of the longest row, or an
// upper bound of it. Backward where `a.grad` is not null.
template <typename T>
void launch_gtpo(GtpoArgs<T> a, const int64_t* labels, int64_t longest, int threads);

}  // namespace rewardops::cpu
