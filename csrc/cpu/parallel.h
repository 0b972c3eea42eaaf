// Threads for loops whose items are independent.
#pragma once

#include <cstdint>
#include <functional>

namespace rewardops::cpu {

// Calls body(begin, end) on disjoint ranges that cover [0, items), on up to `threads` threads, the calling one
// included. Ranges have at least `grain` items. Results must not depend on how the items are split.
void parallel_for(int64_t items, int64_t grain, int threads, const std::function<void(int64_t, int64_t)>& body);

// GOMP_parallel of libgomp, or a function compatible with it.
using Team = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

// Runs all further loops on the threads of this OpenMP runtime, which is torch's own; null for the pool of this module.
// The runtime's workers spin for a while after every region, and keep the cores from other threads until they stop.
void use_team(Team team);

}  // namespace rewardops::cpu
