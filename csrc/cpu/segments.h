// Reductions of a row's tokens over its segments.
#pragma once

#include "rewardops/segments.h"

namespace rewardops::cpu {

template <typename T>
void segment_reduce(const SegmentsArgs<T>& a, int threads);
// Values of steps, or gradients through a reduction, to the tokens of the steps.
template <typename T>
void steps_to_tokens(const SegmentsArgs<T>& a, int threads);

}  // namespace rewardops::cpu
