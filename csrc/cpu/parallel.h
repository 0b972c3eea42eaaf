// Threads for loops whose items are independent.
#pragma once

#include <cstdint>
#include <functional>

namespace rewardops::cpu {

// Calls body(begin, end) on disjoint ranges that cover [0, items), on up to `threads` threads of which the
// caller is one; ranges have at least `grain` items. Results must not depend on how the items were split.
void parallel_for(int64_t items, int64_t grain, int threads, const std::function<void(int64_t, int64_t)>& body);

}  // namespace rewardops::cpu
