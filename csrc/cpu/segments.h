// Reductions of a row's tokens over its segments.
#pragma once

#include "rewardops/segments.h"

namespace rewardops::cpu {

template <typename T>
void segment_reduce(const SegmentsArgs<T>& a, int threads);
template <typename T>
void segment_reduce_backward(const SegmentsArgs<T>& a, int threads);

}  // namespace rewardops::cpu
