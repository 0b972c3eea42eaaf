// Tokens relative to the batch, to groups of rows or to their classes.
#pragma once

#include "rewardops/scopes.h"

namespace rewardops::cpu {

// Makes the scratch memory.
template <typename T>
void launch_scopes(ScopesArgs<T> a, int threads);

}  // namespace rewardops::cpu
