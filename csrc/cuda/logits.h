// Logits on the GPU: statistics and the gradient of a known loss, together.
#pragma once

#include "rewardops/logits.h"

namespace rewardops::cuda {

// The number of blocks that share a row of `vocab` elements of `element` bytes: the fewest that need at most
// `comfortable` bytes of shared memory each. If even the largest cluster needs more: its number of blocks, or 0 where
// the device has less shared memory than they need.
int blocks_of_a_row(int64_t element, int64_t vocab, int64_t comfortable);

void token_stats_and_grad(const TokenStatsAndGradArgs& a, int blocks, void* stream);

}  // namespace rewardops::cuda
