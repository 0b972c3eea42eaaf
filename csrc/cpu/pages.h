// Large outputs: huge pages, and stores that bypass the caches.
#pragma once

#include <cstdint>

namespace rewardops::cpu {

// Advises the system to back memory that is not yet written to with huge pages. Every large tensor is new memory: its
// page faults, one for each 4 KiB, take several times as long as the kernel that writes it.
void prefer_huge_pages(void* begin, int64_t size);

// True if an output of this many bytes is written faster past the caches.
inline bool too_large_for_caches(int64_t size) { return size >= int64_t{8} << 20; }

}  // namespace rewardops::cpu
