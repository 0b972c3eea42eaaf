// Logits on the GPU: statistics and the gradient of a known loss, together.
#pragma once

#include "rewardops/logits.h"

namespace rewardops::cuda {

// How many blocks share a row of elements of so many bytes: as few as have it in `comfortable` bytes of shared memory
// each or, where none do, in what the current device has; 0 where it does not fit.
int blocks_of_a_row(int64_t element, int64_t vocab, int64_t comfortable);

void token_stats_and_grad(const TokenStatsAndGradArgs& a, int blocks, void* stream);

}  // namespace rewardops::cuda
