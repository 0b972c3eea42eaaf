// Clusters and blocks, as cooperative groups have them.
#pragma once

#include "../cuda_on_host.h"

namespace cooperative_groups {

class thread_block {
 public:
  static void sync() { __syncthreads(); }
  static unsigned thread_rank() { return cuda_on_host::thread; }
  static unsigned num_threads() { return cuda_on_host::block->threads; }
  static unsigned size() { return num_threads(); }
};

class cluster_group {
 public:
  static void sync() {
    auto& cluster = cuda_on_host::block->cluster;
    cluster.meeting.meet(1, cluster.threads, [](uint64_t*, bool) {});
  }
  static unsigned block_rank() { return cuda_on_host::block->rank; }
  static unsigned num_blocks() { return static_cast<unsigned>(cuda_on_host::block->cluster.blocks.size()); }
  static unsigned thread_rank() { return block_rank() * cuda_on_host::block->threads + cuda_on_host::thread; }
  static unsigned num_threads() { return cuda_on_host::block->cluster.threads; }
  // The same place in the shared memory of another block of the cluster.
  template <typename T>
  static T* map_shared_rank(T* at, unsigned rank) {
    const auto& own = cuda_on_host::block->shared;
    const auto offset = reinterpret_cast<unsigned char*>(at) - own.data();
    if (offset < 0 || offset >= static_cast<std::ptrdiff_t>(own.size()) || rank >= num_blocks())
      cuda_on_host::fail("map_shared_rank of what is not the block's dynamic shared memory, or of no block");
    return reinterpret_cast<T*>(cuda_on_host::block->cluster.blocks[rank]->shared.data() + offset);
  }
};

inline thread_block this_thread_block() { return {}; }
inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
