// CUDA C++ kernels on a CPU, for tests: every CUDA thread of a block is a thread of the system.
//
// Include this before the kernel's header, in a file compiled as C++17 with -pthread, and call
//
//     cuda_on_host::launch(kernel<float>, {grid}, {block}, shared_bytes, arguments...);
//     cuda_on_host::launch_clusters(kernel<float>, blocks_of_a_cluster, {grid}, {block}, shared_bytes, arguments...);
//
// What a kernel may use: threadIdx, blockIdx, blockDim, gridDim; __shared__ arrays, and dynamic shared memory by
// cuda_on_host::shared(); __syncthreads and its _or, _and and _count; __syncwarp, shuffles, votes and __match_any
// under any mask; atomics on 4 and 8 bytes, and cuda::atomic_ref with its orders; vector types; of
// cooperative_groups, this_cluster(). Blocks run one after another, in the order of their indices, so a block may
// wait for earlier ones and not for later ones; those of a cluster run at once, and have dynamic shared memory only
// (a __shared__ array would be one for all of them).
//
// What it finds that a run on a GPU does not: compiled with -fsanitize=thread, every race on shared or global memory
// that the barriers do not order, whatever the timing; with -fsanitize=address, every access out of bounds; and by
// itself, a barrier or shuffle that a thread of it can no longer reach because it has left the kernel. Shared memory
// holds what the block before left there, or garbage at first, as on a GPU.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) double2 { double x, y; };
struct alignas(16) longlong2 { long long x, y; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_host {

constexpr unsigned kWarp = 32;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_on_host: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  std::abort();
}

// Where threads wait for one another. `members` are the bits of those that must come, of a warp by lane.
class Meeting {
 public:
  explicit Meeting(const char* what) : what_(what) {}

  // Returns when `expected` threads have called it for this round of these members; the last one runs `then` first.
  template <typename Then>
  void meet(uint64_t members, int round, unsigned expected, Then then) {
    std::unique_lock lock(mutex_);
    if (left_ & members) fail(what_);
    Round& here = rounds_[{members, round}];
    if (++here.arrived == expected) {
      then();
      here.arrived = 0;
      ++here.number;
      changed_.notify_all();
      return;
    }
    const uint64_t number = here.number;
    changed_.wait(lock, [&] { return here.number != number; });
  }

  // A thread leaves the kernel: nobody may be waiting for it, or wait for it later.
  void leave(uint64_t member) {
    const std::lock_guard lock(mutex_);
    for (const auto& [key, round] : rounds_)
      if (round.arrived && key.first & member) fail(what_);
    left_ |= member;
  }

 private:
  struct Round {
    unsigned arrived = 0;
    uint64_t number = 0;
  };
  const char* what_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<std::pair<uint64_t, int>, Round> rounds_;
  uint64_t left_ = 0;
};

struct Warp {
  Meeting meeting{"a thread left its warp at a shuffle, vote or __syncwarp"};
  uint64_t slots[kWarp] = {};
};

struct Block;

struct Cluster {
  Meeting meeting{"a thread left its cluster at a barrier of the cluster"};
  unsigned threads = 0;
  std::vector<std::unique_ptr<Block>> blocks;
};

struct Block {
  Block(Cluster& cluster, unsigned rank, unsigned threads, size_t bytes)
      : cluster(cluster), rank(rank), threads(threads), warps((threads + kWarp - 1) / kWarp), shared(bytes, 0xcd) {
    for (auto& warp : warps) warp = std::make_unique<Warp>();
  }
  Cluster& cluster;
  unsigned rank, threads;
  Meeting meeting{"a thread left its block at a __syncthreads"};
  std::atomic<unsigned> counted{0};
  unsigned result = 0;
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<unsigned char> shared;
};

inline thread_local Block* block = nullptr;
inline thread_local unsigned thread = 0;  // of the block, linear

inline unsigned lane() { return thread % kWarp; }
inline Warp& warp() { return *block->warps[thread / kWarp]; }

// The block's dynamic shared memory.
template <typename T>
T* shared() {
  return reinterpret_cast<T*>(block->shared.data());
}

inline unsigned sync_count(bool predicate) {
  Block& b = *block;
  b.counted += predicate;
  b.meeting.meet(1, 0, b.threads, [&] { b.result = b.counted.exchange(0); });
  const unsigned result = b.result;
  // Nobody starts the next count before all have read this one.
  b.meeting.meet(1, 1, b.threads, [] {});
  return result;
}

inline void sync_warp(unsigned mask) {
  if (!(mask >> lane() & 1)) fail("a lane is not in the mask that it calls with");
  warp().meeting.meet(mask, 0, static_cast<unsigned>(__builtin_popcount(mask)), [] {});
}

// Every lane's value, seen by all lanes of the mask at once.
template <typename T, typename Read>
auto exchange(unsigned mask, T value, Read read) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  Warp& w = warp();
  uint64_t raw = 0;
  std::memcpy(&raw, &value, sizeof value);
  w.slots[lane()] = raw;
  sync_warp(mask);
  const auto result = read([&](unsigned other) {
    T found;
    std::memcpy(&found, &w.slots[other], sizeof found);
    return found;
  });
  sync_warp(mask);
  return result;
}

inline void leave() {
  block->cluster.meeting.leave(1);
  block->meeting.leave(1);
  warp().meeting.leave(uint64_t{1} << lane());
}

// Runs a kernel on a grid whose neighbours along x are clusters; returns when all of its blocks have.
template <typename... Parameters, typename... Arguments>
void launch_clusters(void (*kernel)(Parameters...), unsigned of, dim3 grid, dim3 size, size_t shared_bytes,
                     Arguments... arguments) {
  const unsigned threads = size.x * size.y * size.z;
  if (of == 0 || grid.x % of) fail("the grid is no multiple of the cluster");
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; x += of) {
        Cluster cluster;
        cluster.threads = of * threads;
        for (unsigned rank = 0; rank < of; ++rank)
          cluster.blocks.push_back(std::make_unique<Block>(cluster, rank, threads, shared_bytes));
        std::vector<std::thread> team;
        for (unsigned t = 0; t < cluster.threads; ++t)
          team.emplace_back([&, t] {
            block = cluster.blocks[t / threads].get();
            thread = t % threads;
            threadIdx = {thread % size.x, thread / size.x % size.y, thread / (size.x * size.y)};
            blockIdx = {x + block->rank, y, z};
            blockDim = size;
            gridDim = grid;
            kernel(static_cast<Parameters>(arguments)...);
            leave();
          });
        for (auto& t : team) t.join();
      }
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 size, size_t shared_bytes, Arguments... arguments) {
  launch_clusters(kernel, 1, grid, size, shared_bytes, arguments...);
}

}  // namespace cuda_on_host

// ---- what CUDA C++ calls it --------------------------------------------------------------------------------

inline void __syncthreads() { cuda_on_host::sync_count(false); }
inline int __syncthreads_count(int p) { return static_cast<int>(cuda_on_host::sync_count(p != 0)); }
inline int __syncthreads_or(int p) { return __syncthreads_count(p) != 0; }
inline int __syncthreads_and(int p) { return __syncthreads_count(p == 0) == 0; }
inline void __syncwarp(unsigned mask = 0xffffffffu) { cuda_on_host::sync_warp(mask); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const unsigned me = cuda_on_host::lane(), first = me / width * width;
  return cuda_on_host::exchange(mask, value, [&](auto of) { return of(first + (source & (width - 1))); });
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const unsigned me = cuda_on_host::lane();
  return cuda_on_host::exchange(mask, value, [&](auto of) { return me % width < delta ? value : of(me - delta); });
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const unsigned me = cuda_on_host::lane();
  return cuda_on_host::exchange(mask, value,
                                [&](auto of) { return me % width + delta >= unsigned(width) ? value : of(me + delta); });
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const unsigned me = cuda_on_host::lane();
  return cuda_on_host::exchange(mask, value, [&](auto of) {
    const unsigned other = me ^ unsigned(bits);
    return other / width > me / width ? value : of(other);
  });
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return cuda_on_host::exchange(mask, predicate != 0, [&](auto of) {
    unsigned found = 0;
    for (unsigned k = 0; k < cuda_on_host::kWarp; ++k)
      if (mask >> k & 1 && of(k)) found |= 1u << k;
    return found;
  });
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
template <typename T>
unsigned __match_any_sync(unsigned mask, T value) {
  return cuda_on_host::exchange(mask, value, [&](auto of) {
    unsigned found = 0;
    for (unsigned k = 0; k < cuda_on_host::kWarp; ++k)
      if (mask >> k & 1 && of(k) == value) found |= 1u << k;
    return found;
  });
}

template <typename T>
T atomicAdd(T* at, T value) {
  if constexpr (std::is_integral_v<T>) {
    return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
  } else {
    T old;
    __atomic_load(at, &old, __ATOMIC_RELAXED);
    for (T next = old + value; !__atomic_compare_exchange(at, &old, &next, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED);)
      next = old + value;
    return old;
  }
}
template <typename T>
T atomicExch(T* at, T value) {
  return __atomic_exchange_n(at, value, __ATOMIC_RELAXED);
}
template <typename T>
T atomicCAS(T* at, T expected, T value) {
  __atomic_compare_exchange_n(at, &expected, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}
template <typename T>
T atomicMax(T* at, T value) {
  T old = __atomic_load_n(at, __ATOMIC_RELAXED);
  while (old < value && !__atomic_compare_exchange_n(at, &old, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}
template <typename T>
T atomicMin(T* at, T value) {
  T old = __atomic_load_n(at, __ATOMIC_RELAXED);
  while (value < old && !__atomic_compare_exchange_n(at, &old, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
template <typename T>
T __ldg(const T* at) {
  return *at;
}

// ---- atomics with an order, as libcu++ has them ------------------------------------------------------------

namespace cuda {

enum thread_scope { thread_scope_system, thread_scope_device, thread_scope_block };

namespace std {
enum memory_order : int {
  memory_order_relaxed = __ATOMIC_RELAXED,
  memory_order_acquire = __ATOMIC_ACQUIRE,
  memory_order_release = __ATOMIC_RELEASE,
  memory_order_acq_rel = __ATOMIC_ACQ_REL,
  memory_order_seq_cst = __ATOMIC_SEQ_CST,
};
}  // namespace std

template <typename T, thread_scope = thread_scope_system>
class atomic_ref {
 public:
  explicit atomic_ref(T& value) : at_(&value) {}
  T load(std::memory_order order = std::memory_order_seq_cst) const {
    T found;
    __atomic_load(at_, &found, order);
    return found;
  }
  void store(T value, std::memory_order order = std::memory_order_seq_cst) const { __atomic_store(at_, &value, order); }
  T fetch_add(T value, std::memory_order order = std::memory_order_seq_cst) const {
    return __atomic_fetch_add(at_, value, order);
  }

 private:
  T* at_;
};

}  // namespace cuda

// ---- clusters, as cooperative groups have them -------------------------------------------------------------

namespace cooperative_groups {

class cluster_group {
 public:
  static void sync() {
    auto& cluster = cuda_on_host::block->cluster;
    cluster.meeting.meet(1, 0, cluster.threads, [] {});
  }
  static unsigned block_rank() { return cuda_on_host::block->rank; }
  static unsigned num_blocks() { return static_cast<unsigned>(cuda_on_host::block->cluster.blocks.size()); }
  // The same place in the shared memory of another block of the cluster.
  template <typename T>
  static T* map_shared_rank(T* at, unsigned rank) {
    auto& own = cuda_on_host::block->shared;
    const auto offset = reinterpret_cast<unsigned char*>(at) - own.data();
    if (offset < 0 || offset >= static_cast<std::ptrdiff_t>(own.size()) || rank >= num_blocks())
      cuda_on_host::fail("map_shared_rank of what is not the block's dynamic shared memory, or of no block");
    return reinterpret_cast<T*>(cuda_on_host::block->cluster.blocks[rank]->shared.data() + offset);
  }
};

inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
