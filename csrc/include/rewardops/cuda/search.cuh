// Searches by a warp or a block: the first element with a property, from the left or from the right; and the place of a
// key among sorted ones.
#pragma once

#include <cstring>

#include "rewardops/cuda/block.cuh"

namespace rewardops::cuda {

// ---- teams -------------------------------------------------------------------------------------------------

// Threads that search together. least(x, none): the smallest x of all threads; `none` is larger than any result.
struct ByWarp {
  __device__ static int rank() { return lane(); }
  static constexpr int kSize = kWarp;
  __device__ static unsigned least(unsigned x, unsigned) { return __reduce_min_sync(kAll, x); }
};
// A block of kThreads. Most steps of a search have no hit: a vote with a single barrier comes first, so this is not a
// reduction of block.cuh.
struct ByBlock {
  __device__ static int rank() { return static_cast<int>(threadIdx.x); }
  static constexpr int kSize = kThreads;
  __device__ static unsigned least(unsigned x, unsigned none) {
    __shared__ unsigned warps[kWarps];
    if (!__syncthreads_or(x < none)) return none;
    x = __reduce_min_sync(kAll, x);
    if (lane() == 0) warps[warp()] = x;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kWarps; ++w) x = warps[w] < x ? warps[w] : x;
    return x;
  }
};

// ---- sources -----------------------------------------------------------------------------------------------

// The distance from the 16-byte boundary below an address, in elements.
template <typename T>
__device__ int off_boundary(const T* address) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(address) % 16 / sizeof(T));
}

// The elements of 16 bytes, by __ldg: the compiler splits other loads of a Pack here.
template <typename T>
__device__ Pack<T, 16 / sizeof(T)> load_pack(const T* address) {
  const uint4 bits = __ldg(reinterpret_cast<const uint4*>(address));
  Pack<T, 16 / sizeof(T)> pack;
  memcpy(&pack, &bits, sizeof pack);
  return pack;
}

// A source: one(t) is true if element t is a hit; pack(t) has bit i for element t + i, by loads of 16 bytes, and needs
// a boundary at t; off(t) is the number of elements between t and the last boundary up to it, -1 where there is none.

// The elements that pass a test. kBackwards: element t is data[-1 - t].
template <typename T, typename Test, bool kBackwards = false>
struct Where {
  static constexpr int kEach = 16 / sizeof(T);
  const T* data;
  Test test;

  __device__ int off(int64_t t) const {
    return kBackwards ? (kEach - off_boundary(data - t)) % kEach : off_boundary(data + t);
  }
  __device__ bool one(int64_t t) const { return test(kBackwards ? data[-1 - t] : data[t]); }
  __device__ unsigned pack(int64_t t) const {
    const auto all = load_pack(kBackwards ? data - t - kEach : data + t);
    unsigned hits = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) hits |= (test(all.at[kBackwards ? kEach - 1 - i : i]) ? 1u : 0u) << i;
    return hits;
  }
};

// The places at which two rows differ.
template <typename Token>
struct Differ {
  static constexpr int kEach = 16 / sizeof(Token);
  const Token *x, *y;

  __device__ int off(int64_t t) const { return off_boundary(x + t) == off_boundary(y + t) ? off_boundary(x + t) : -1; }
  __device__ bool one(int64_t t) const { return x[t] != y[t]; }
  __device__ unsigned pack(int64_t t) const {
    const auto a = load_pack(x + t), b = load_pack(y + t);
    unsigned hits = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) hits |= (a.at[i] != b.at[i] ? 1u : 0u) << i;
    return hits;
  }
};

struct IsSet {
  __device__ bool operator()(uint8_t byte) const { return byte != 0; }
};

// ---- searches ----------------------------------------------------------------------------------------------

// The first hit among the elements [from, limit), or limit. Called by all threads of the team, which all get it.
template <typename Team, typename Source>
__device__ int64_t first_hit(const Source& source, int64_t from, int64_t limit) {
  constexpr int kEach = Source::kEach, kStep = Team::kSize * kEach;
  const int rank = Team::rank();
  const int off = from < limit ? source.off(from) : 0;
  for (int64_t at = off > 0 ? from - off : from; at < limit; at += kStep) {
    unsigned first = kStep;
    if (off >= 0 && at >= from && at + kStep <= limit) {
      const unsigned hits = source.pack(at + rank * kEach);
      if (hits) first = rank * kEach + __ffs(static_cast<int>(hits)) - 1;
    } else {
#pragma unroll
      for (int i = kEach - 1; i >= 0; --i) {
        const int64_t t = at + i * Team::kSize + rank;
        if (t >= from && t < limit && source.one(t)) first = i * Team::kSize + rank;
      }
    }
    first = Team::least(first, kStep);
    if (first < kStep) return at + first;
  }
  return limit;
}

// True if any byte of [begin, end) is not 0; by a warp. first_hit would determine the place of the hit too: with it
// group_advantages_kernel has 126 registers instead of 74, and a multiprocessor two blocks instead of three.
__device__ inline bool any_set(const uint8_t* begin, const uint8_t* end) {
  using Bytes = Pack<uint64_t, 2>;
  if (__any_sync(kAll, lane() < end - begin && begin[lane()])) return true;
  // The last 16-byte boundary up to here lies among those bytes.
  begin += kWarp;
  for (begin -= reinterpret_cast<uintptr_t>(begin) % sizeof(Bytes); begin < end; begin += kWarp * sizeof(Bytes)) {
    const uint8_t* at = begin + lane() * sizeof(Bytes);
    bool hit = false;
    if (end - at >= static_cast<int64_t>(sizeof(Bytes))) {
      const auto bytes = *reinterpret_cast<const Bytes*>(at);
      hit = bytes.at[0] | bytes.at[1];
    } else {
      for (; at < end; ++at) hit |= *at != 0;
    }
    if (__any_sync(kAll, hit)) return true;
  }
  return false;
}

// first_hit for a block of any size, one element per thread: for scans, whose registers do not suffice for packs.
template <typename Source>
__device__ int64_t first_hit_by_ones(const Source& source, int64_t limit) {
  __shared__ unsigned votes[kWarps];
  for (int64_t at = 0; at < limit; at += threads()) {
    const int64_t t = at + threadIdx.x;
    const unsigned vote = __ballot_sync(kAll, t < limit && source.one(t));
    if (lane() == 0) votes[warp()] = vote;
    __syncthreads();
    int64_t hit = -1;
    for (int w = threads() / kWarp - 1; w >= 0; --w)
      if (votes[w]) hit = at + w * kWarp + __ffs(static_cast<int>(votes[w])) - 1;
    __syncthreads();
    if (hit >= 0) return hit;
  }
  return limit;
}

// The first valid one of the tokens [low, high), or high. A mask may be null.
__device__ inline int64_t first_valid(const uint8_t* mask, int64_t low, int64_t high) {
  return mask ? low + first_hit_by_ones(Where<uint8_t, IsSet>{mask + low, {}}, high - low) : low;
}

// One past the last valid one of the tokens [0, size), or 0.
__device__ inline int64_t end_of_valid(const uint8_t* mask, int64_t size) {
  return mask ? size - first_hit_by_ones(Where<uint8_t, IsSet, true>{mask + size, {}}, size) : size;
}

// By one thread: the first place among `size` ascending numbers whose number is not below `key`; size where there is
// none.
template <typename Index>
__device__ Index lower_bound(const int64_t* numbers, Index size, int64_t key) {
  Index low = 0, high = size;
  while (low < high) {
    const Index middle = (low + high) / 2;
    if (numbers[middle] < key) low = middle + 1;
    else high = middle;
  }
  return low;
}

// ---- for another lane --------------------------------------------------------------------------------------

template <typename T>
__device__ T from_lane(T value, int source) {
  return __shfl_sync(kAll, value, source);
}
template <typename T>
__device__ T* from_lane(T* address, int source) {
  return reinterpret_cast<T*>(__shfl_sync(kAll, reinterpret_cast<unsigned long long>(address), source));
}

}  // namespace rewardops::cuda
