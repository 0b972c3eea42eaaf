// Threads for loops whose items are independent.
#pragma once

#include <cstdint>
#include <functional>

namespace rewardops::cpu {

// Calls body(begin, end) on disjoint ranges that cover [0, items), on up to `threads` threads of which the
// caller is one; ranges have at least `grain` items. Results must not depend on how the items were split.
void parallel_for(int64_t items, int64_t grain, int threads, const std::function<void(int64_t, int64_t)>& body);

// libgomp's GOMP_parallel, or what is compatible with it.
using Team = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

// From now on run loops on the threads of this OpenMP runtime, torch's own: its workers spin for a while after
// every region, and a second set of threads would wait for the cores until they sleep. Null for our own pool.
void use_team(Team team);

}  // namespace rewardops::cpu
