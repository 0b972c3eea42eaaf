// Group-relative advantages on the GPU.
#pragma once

#include "rewardops/advantages.h"

namespace rewardops::cuda {

template <typename T>
void group_advantages(const AdvantagesArgs<T>& a, void* stream);

template <typename T>
void group_advantages_backward(const AdvantagesArgs<T>& a, void* stream);

}  // namespace rewardops::cuda
