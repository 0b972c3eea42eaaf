// CUDA C++ kernels on a CPU, for tests: every CUDA thread of a block is a fiber, or a thread of the system (engine.h).
//
// Include this, or the headers in include/ that stand for CUDA's, in a file compiled as C++17, and call
//
//     cuda_on_host::launch(kernel<float>, {grid}, {block}, shared_bytes, arguments...);
//     cuda_on_host::launch_clusters(kernel<float>, blocks_of_a_cluster, {grid}, {block}, shared_bytes, arguments...);
//
// or cudaLaunchKernelEx. A launcher compiles as it is, where it launches by that and takes dynamic shared memory from
// cuda_on_host::shared() when CUDA_ON_HOST is defined:
//
//     g++ -std=c++17 -x c++ -Wno-unknown-pragmas -I tests/cuda_on_host/include ... launcher.cu
//
// What a kernel may use: threadIdx, blockIdx, blockDim, gridDim; __shared__ arrays, and dynamic shared memory;
// __syncthreads and its _or, _and and _count; __syncwarp, shuffles, votes, reductions and __match_any under any mask;
// atomics on 4 and 8 bytes; vector types, bfloat16 and half; cuda::atomic_ref with its orders; of cooperative_groups,
// this_cluster() and this_thread_block(); copies to shared memory that a thread waits for later, which take place then.
// Blocks run one after another, in the order of their indices, so a block may wait for earlier ones and not for later
// ones; those of a cluster run at once, and have dynamic shared memory only (a __shared__ array would be one for all of
// them). A thread that polls memory must do it by an atomic, or call __nanosleep, to let others go on. One kernel runs
// at a time in a process; a launch waits for the one before.
//
// What it finds that a run on a GPU does not: compiled with -fsanitize=thread, every race on shared or global memory
// that the barriers do not order, whatever the timing; with -fsanitize=address, every access out of bounds; and by
// itself, a barrier or shuffle that a thread of it can no longer reach because it has left the kernel, or because it
// waits elsewhere. Shared memory holds what the block before left there, or garbage at first, as on a GPU.
#pragma once

#include <math.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>

#include "engine.h"

#define CUDA_ON_HOST 1

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline
#define __noinline__  // nothing, as in the C++ library's headers it is the name of an attribute
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static

constexpr int warpSize = 32;

namespace cuda_on_host {

constexpr unsigned kWarp = 32;
constexpr size_t kSharedAlignment = 128;

// Where threads wait for one another, and leave values for one another. `members` are the bits of those that must
// come, of a warp by lane.
class Meeting {
 public:
  explicit Meeting(const char* what, uint64_t left = 0) : what_(what), left_(left) {}

  // Returns when `expected` threads have called it for these members, with the values that they put: put(values,
  // first) does, one thread at a time. The values stay until all have come to the second meeting after this one,
  // hence until all have read them.
  template <typename Put>
  const uint64_t* meet(uint64_t members, unsigned expected, Put put) {
    std::unique_lock lock(mutex_);
    if (left_ & members) fail(what_);
    Round& here = rounds_[members];
    const uint64_t number = here.number;
    uint64_t* values = here.values[number % 2];
    put(values, here.arrived == 0);
    if (++here.arrived == expected) {
      here.arrived = 0;
      ++here.number;
      here.waiters.wake();
    } else {
      here.waiters.wait(lock, [&] { return here.number != number; });
    }
    return values;
  }

  // A thread leaves the kernel: nobody may be waiting for it, or wait for it later.
  void leave(uint64_t member) {
    const std::lock_guard lock(mutex_);
    for (const auto& [members, round] : rounds_)
      if (round.arrived && members & member) fail(what_);
    left_ |= member;
  }

 private:
  struct Round {
    // A shuffle from a lane that is not in its mask finds this.
    Round() { std::memset(values, 0xcd, sizeof values); }
    unsigned arrived = 0;
    uint64_t number = 0;
    uint64_t values[2][kWarp];
    Waiters waiters;
  };
  const char* what_;
  Mutex mutex_;
  std::map<uint64_t, Round> rounds_;
  uint64_t left_;
};

// Garbage of just this size, so that the address sanitizer sees its end.
class SharedMemory {
 public:
  explicit SharedMemory(size_t bytes)
      : size_(bytes), data_(static_cast<unsigned char*>(::operator new(bytes, std::align_val_t{kSharedAlignment}))) {
    std::memset(data_.get(), 0xcd, bytes);
  }
  unsigned char* data() const { return data_.get(); }
  size_t size() const { return size_; }

 private:
  struct Delete {
    void operator()(unsigned char* data) const { ::operator delete(data, std::align_val_t{kSharedAlignment}); }
  };
  size_t size_;
  std::unique_ptr<unsigned char[], Delete> data_;
};

struct Cluster {
  Meeting meeting{"a thread left its cluster at a barrier of the cluster"};
  unsigned threads = 0;
  std::vector<std::unique_ptr<Block>> blocks;
};

struct Copy {
  void* to;
  const void* from;
  size_t size;
};

struct Block {
  Block(Cluster& cluster, unsigned rank, unsigned threads, size_t bytes)
      : cluster(cluster), rank(rank), threads(threads), shared(bytes), copies(threads) {
    for (unsigned first = 0; first < threads; first += kWarp) {
      const uint64_t missing = threads - first < kWarp ? ~uint64_t{0} << (threads - first) : 0;
      warps.push_back(std::make_unique<Meeting>("a thread left its warp at a shuffle, vote or __syncwarp", missing));
    }
  }
  Cluster& cluster;
  unsigned rank, threads;
  Meeting meeting{"a thread left its block at a __syncthreads"};
  std::vector<std::unique_ptr<Meeting>> warps;
  SharedMemory shared;
  std::vector<std::vector<Copy>> copies;  // of each thread, that it has not waited for
};

inline unsigned lane() { return thread % kWarp; }
inline Meeting& warp() { return *block->warps[thread / kWarp]; }

// The block's dynamic shared memory.
template <typename T>
T* shared() {
  return reinterpret_cast<T*>(block->shared.data());
}

inline unsigned sync_count(bool predicate) {
  return static_cast<unsigned>(*block->meeting.meet(
      1, block->threads, [=](uint64_t* count, bool first) { *count = (first ? 0 : *count) + predicate; }));
}

inline const uint64_t* meet_warp(unsigned mask, uint64_t value) {
  if (!(mask >> lane() & 1)) fail("a lane is not in the mask that it calls with");
  const auto expected = static_cast<unsigned>(__builtin_popcount(mask));
  return warp().meet(mask, expected, [=](uint64_t* values, bool) { values[lane()] = value; });
}

// Every lane's value, seen by all lanes of the mask at once.
template <typename T, typename Read>
auto exchange(unsigned mask, T value, Read read) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  uint64_t raw = 0;
  std::memcpy(&raw, &value, sizeof value);
  const uint64_t* values = meet_warp(mask, raw);
  return read([=](unsigned other) {
    T found;
    std::memcpy(static_cast<void*>(&found), &values[other], sizeof found);
    return found;
  });
}

template <typename T, typename Join>
T reduce(unsigned mask, T value, Join join) {
  return exchange(mask, value, [&](auto of) {
    T all = value;
    for (unsigned k = 0; k < kWarp; ++k)
      if (mask >> k & 1 && k != lane()) all = join(all, of(k));
    return all;
  });
}

inline void leave() {
  block->cluster.meeting.leave(1);
  block->meeting.leave(1);
  warp().leave(uint64_t{1} << lane());
}

// The state of the harness, and __shared__ arrays, are for one kernel. (Not hidden: it is the process's.)
inline std::mutex one_at_a_time;

// Runs a kernel on a grid whose neighbours along x are clusters; returns when all of its blocks have.
template <typename... Parameters, typename... Arguments>
void launch_clusters(void (*kernel)(Parameters...), unsigned of, dim3 grid, dim3 size, size_t shared_bytes,
                     Arguments... arguments) {
  const std::lock_guard only(one_at_a_time);
  const unsigned threads = size.x * size.y * size.z;
  if (of == 0 || grid.x % of) fail("the grid is no multiple of the cluster");
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; x += of) {
        Cluster cluster;
        cluster.threads = of * threads;
        for (unsigned rank = 0; rank < of; ++rank)
          cluster.blocks.push_back(std::make_unique<Block>(cluster, rank, threads, shared_bytes));
        run(cluster.threads, [&](unsigned t) {
          block = cluster.blocks[t / threads].get();
          thread = t % threads;
          threadIdx = {thread % size.x, thread / size.x % size.y, thread / (size.x * size.y)};
          blockIdx = {x + block->rank, y, z};
          blockDim = size;
          gridDim = grid;
          kernel(static_cast<Parameters>(arguments)...);
          leave();
        });
      }
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 size, size_t shared_bytes, Arguments... arguments) {
  launch_clusters(kernel, 1, grid, size, shared_bytes, arguments...);
}

}  // namespace cuda_on_host

#include "device_functions.h"
