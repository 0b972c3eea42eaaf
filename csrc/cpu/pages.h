// Large outputs in large pages.
#pragma once

#include <cstdint>

namespace rewardops::cpu {

// Advises the system to back this memory, not yet written to, by huge pages: a large tensor is fresh memory every time,
// and a fault for each 4 KiB of it takes several times as long as the kernel that writes it. Advice only.
void prefer_huge_pages(void* begin, int64_t size);

// Whether an output is better written past the caches.
inline bool too_large_for_caches(int64_t size) { return size >= int64_t{8} << 20; }

}  // namespace rewardops::cpu
