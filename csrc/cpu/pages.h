// Large outputs: huge pages for them, and stores past the caches.
#pragma once

#include <cstdint>

namespace rewardops::cpu {

// Advises the system to back memory that is not yet written to with huge pages. A large tensor is new memory every
// time, and a page fault for each 4 KiB of it takes several times as long as the kernel that writes it.
void prefer_huge_pages(void* begin, int64_t size);

// True if an output of so many bytes is faster to write past the caches.
inline bool too_large_for_caches(int64_t size) { return size >= int64_t{8} << 20; }

}  // namespace rewardops::cpu
