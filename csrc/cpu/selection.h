// Exactly k of the largest values of a scope: a row, a group of rows, or all rows.
#pragma once

#include "rewardops/selection.h"

namespace rewardops::cpu {

template <typename T>
void largest(const LargestArgs<T>& a, int threads);

}  // namespace rewardops::cpu
