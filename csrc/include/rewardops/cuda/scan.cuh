// Scans along rows: a row is walked tile by tile in one direction of time, from a carry, or its tiles are blocks of
// their own that look back for it. What is carried, the family says: a Map takes what came before to what comes after.
//
// A problem P of one row says:
//   P::Map                     the map of a stretch of tokens, POD; Map::identity(), Map::then(first, second)
//   P::State                   what is carried, POD; Map::apply(state, map)
//   P::kReverse                whether time is walked from the right
//   p.size                     its tokens
//   p.aligned_at(h)            whether every array of it can be read by fours from its token h on
//   p.load(tile)               reads the thread's tokens, and keeps them; returns their map
//   p.store(tile, before)      writes them, `before` being the state in front of the thread's tokens
//   p.start()                  the state in front of the row's first token; p.end(state): behind its last
#pragma once

#include <cuda/atomic>

#include "rewardops/cuda/block.cuh"

namespace rewardops::cuda {

constexpr int kItems = 4;          // tokens of a thread and tile: 16 bytes of float
constexpr int kMostWarps = 8;      // of a block
constexpr int64_t kSlotBytes = 128;  // of a tile that others look back to

// How a scan is spread over the device.
struct ScanGrid {
  int64_t batch;
  int64_t chunks;   // tiles of the longest row, each a block; 0: a block walks its row
  void* state;      // [1 + batch * chunks] slots of zeros where there are chunks
};

// ---- tokens of a tile --------------------------------------------------------------------------------------

// The tokens [low, high) of a row; a thread has [first, first + kItems) of them, those outside are not there.
struct Tile {
  int64_t low, high, first;
  bool packs;  // the thread's tokens are all there, and lie where they can be read at once

  __device__ bool inside(int i) const { return first + i >= low && first + i < high; }
};

// How a row is cut: all tiles but the first and the last are whole and start where packs do.
struct Cut {
  int64_t size, head, full;
  bool packs, reverse;

  template <typename P>
  __device__ static Cut of(const P& p) {
    Cut cut{p.size, 0, static_cast<int64_t>(blockDim.x) * kItems, false, P::kReverse};
    int64_t at = 0;
    while (at < kItems && !p.aligned_at(at)) ++at;
    cut.packs = at < kItems;
    if (cut.packs) {
      const int64_t off = P::kReverse ? (p.size - at + kItems) % kItems : at;
      cut.head = off ? cut.full - kItems + off : cut.full;
    } else {
      cut.head = cut.full;
    }
    return cut;
  }
  __device__ int64_t tiles() const { return size <= head ? size > 0 : 1 + (size - head + full - 1) / full; }
  __device__ Tile tile(int64_t k) const {
    const int64_t from = k ? head + (k - 1) * full : 0, to = head + k * full < size ? head + k * full : size;
    const int64_t own = static_cast<int64_t>(threadIdx.x) * kItems;
    Tile t;
    t.low = reverse ? size - to : from;
    t.high = reverse ? size - from : to;
    t.first = reverse ? t.high - own - kItems : t.low + own;
    // The first tile starts where the row does, which packs need not.
    t.packs = packs && (k > 0 || head == full) && t.first >= t.low && t.first + kItems <= t.high;
    return t;
  }
};

// Bits of the thread's tokens that count.
__device__ inline unsigned load_valid(const uint8_t* mask, const Tile& tile) {
  unsigned valid = 0;
  if (tile.packs && !mask) return (1u << kItems) - 1;
  if (tile.packs) {
    const auto four = *reinterpret_cast<const Pack<uint8_t, kItems>*>(mask + tile.first);
#pragma unroll
    for (int i = 0; i < kItems; ++i) valid |= (four.at[i] != 0) << i;
  } else {
#pragma unroll
    for (int i = 0; i < kItems; ++i) valid |= (tile.inside(i) && (!mask || mask[tile.first + i])) << i;
  }
  return valid;
}

// The thread's tokens of an array, `other` where they are not wanted.
template <typename V, typename T>
__device__ void load_items(const T* row, const Tile& tile, unsigned wanted, V other, V (&out)[kItems]) {
  if (tile.packs) {
    const auto four = *reinterpret_cast<const Pack<T, kItems>*>(row + tile.first);
#pragma unroll
    for (int i = 0; i < kItems; ++i) out[i] = wanted >> i & 1 ? static_cast<V>(four.at[i]) : other;
  } else {
#pragma unroll
    for (int i = 0; i < kItems; ++i) out[i] = wanted >> i & 1 ? static_cast<V>(row[tile.first + i]) : other;
  }
}

// Writes the thread's tokens, 0 where they are not valid.
template <typename T, typename V>
__device__ void store_items(T* row, const Tile& tile, unsigned valid, const V (&values)[kItems]) {
  if (tile.packs) {
    Pack<T, kItems> four;
#pragma unroll
    for (int i = 0; i < kItems; ++i) four.at[i] = valid >> i & 1 ? static_cast<T>(values[i]) : T{0};
    *reinterpret_cast<Pack<T, kItems>*>(row + tile.first) = four;
  } else {
#pragma unroll
    for (int i = 0; i < kItems; ++i)
      if (tile.inside(i)) row[tile.first + i] = valid >> i & 1 ? static_cast<T>(values[i]) : T{0};
  }
}

// ---- maps over threads -------------------------------------------------------------------------------------

// A map that another lane holds, by four bytes at a time.
template <typename Map, typename Shuffle>
__device__ Map shuffled(const Map& map, Shuffle shuffle) {
  static_assert(sizeof(Map) % 4 == 0, "");
  constexpr int kWords = sizeof(Map) / 4;
  struct Words {
    int at[kWords];
  } words;
  memcpy(&words, &map, sizeof(Map));
#pragma unroll
  for (int w = 0; w < kWords; ++w) words.at[w] = shuffle(words.at[w]);
  Map found;
  memcpy(&found, &words, sizeof(Map));
  return found;
}

// The map of what the threads before this one hold; `total` becomes that of the whole block. One barrier; `warps` must
// not be in use by an earlier call that a thread may still be in.
template <typename Map>
__device__ Map scan_block(const Map& mine, Map* warps, Map& total) {
  Map sum = mine;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const Map before = shuffled(sum, [&](int word) { return __shfl_up_sync(kAll, word, distance); });
    if (lane() >= distance) sum = Map::then(before, sum);
  }
  if (lane() == kWarp - 1) warps[warp()] = sum;
  Map before = shuffled(sum, [&](int word) { return __shfl_up_sync(kAll, word, 1); });
  if (lane() == 0) before = Map::identity();
  __syncthreads();
  const int count = static_cast<int>(blockDim.x) / kWarp;
  total = Map::identity();
  for (int w = 0; w < count; ++w) {
    if (w == warp()) before = Map::then(total, before);
    total = Map::then(total, warps[w]);
  }
  return before;
}

// ---- tiles that look back ----------------------------------------------------------------------------------

// A tile's map, and the state behind it, as far as `ready` says: 1, the first; 2, both.
template <typename Map, typename State>
struct Slot {
  int ready;
  Map own;
  State behind;
};

using Flag = ::cuda::atomic_ref<int, ::cuda::thread_scope_device>;

// Called by the first warp: the state in front of tile k of a row, whose slots are given. From the nearest tile that
// knows its own, the maps of those between are applied one after the other, as those tiles themselves do it: so the
// bits are the same whichever it is.
template <typename Map, typename State>
__device__ State look_back(Slot<Map, State>* slots, int64_t k) {
  const int64_t other = k - 1 - lane();
  while (true) {
    const int ready = other >= 0 ? Flag(slots[other].ready).load(::cuda::std::memory_order_acquire) : 0;
    const unsigned known = __ballot_sync(kAll, ready == 2), made = __ballot_sync(kAll, ready > 0);
    const int nearest = __ffs(static_cast<int>(known)) - 1;
    const unsigned between = nearest < 0 ? kAll : (1u << nearest) - 1;
    if (nearest < 0 || (made & between) != between) continue;
    Map own = Map::identity();
    State state{};
    if (lane() < nearest) own = slots[other].own;
    if (lane() == nearest) state = slots[other].behind;
    state = shuffled(state, [&](int word) { return __shfl_sync(kAll, word, nearest); });
    for (int from = nearest - 1; from >= 0; --from)
      state = Map::apply(state, shuffled(own, [&](int word) { return __shfl_sync(kAll, word, from); }));
    return state;
  }
}

// ---- the walk ----------------------------------------------------------------------------------------------

// One row, by the block that walks it.
template <typename P>
__device__ void walk(P& p) {
  using Map = typename P::Map;
  __shared__ Map warps[2][kMostWarps];  // of two tiles, so that one barrier a tile is enough
  const Cut cut = Cut::of(p);
  const int64_t tiles = cut.tiles();
  typename P::State carry = p.start();
  for (int64_t k = 0; k < tiles; ++k) {
    const Tile tile = cut.tile(k);
    Map total;
    const Map before = scan_block(p.load(tile), warps[k % 2], total);
    p.store(tile, Map::apply(carry, before));
    carry = Map::apply(carry, total);
  }
  p.end(carry);
}

// One tile of a row, by a block of its own.
template <typename P>
__device__ void look(P& p, int64_t k, const ScanGrid& grid, int64_t b) {
  using Map = typename P::Map;
  using State = typename P::State;
  using Slots = Slot<Map, State>;
  static_assert(sizeof(Slots) <= kSlotBytes, "");
  __shared__ Map warps[kMostWarps];
  __shared__ State earlier;
  const Cut cut = Cut::of(p);
  const int64_t tiles = cut.tiles();
  if (tiles == 0 && k == 0) p.end(p.start());
  if (k >= tiles) return;
  auto* slots = reinterpret_cast<Slots*>(static_cast<unsigned char*>(grid.state) + kSlotBytes) + b * grid.chunks;
  const Tile tile = cut.tile(k);
  Map total;
  const Map before = scan_block(p.load(tile), warps, total);
  Flag ready(slots[k].ready);
  if (k > 0 && threadIdx.x == 0) {
    slots[k].own = total;
    ready.store(1, ::cuda::std::memory_order_release);
  }
  if (threadIdx.x < kWarp) {
    const State found = k > 0 ? look_back(slots, k) : p.start();
    if (threadIdx.x == 0) {
      slots[k].behind = Map::apply(found, total);
      ready.store(2, ::cuda::std::memory_order_release);
      earlier = found;
    }
  }
  __syncthreads();
  p.store(tile, Map::apply(earlier, before));
  if (k == tiles - 1) p.end(Map::apply(earlier, total));
}

// Blocks take tiles by drawing tickets, those of all rows' first tiles first: whom a tile looks back to has started.
// Two blocks a multiprocessor at least where maps are small: without a number ptxas spills to make room for a third.
template <typename P, typename Args>
__global__ void __launch_bounds__(kWarp* kMostWarps, sizeof(typename P::Map) > 16 ? 1 : 2)
    scan_kernel(const __grid_constant__ Args args, const __grid_constant__ ScanGrid grid) {
  if (!grid.chunks) {
    P p(args, blockIdx.x);
    walk(p);
    return;
  }
  __shared__ unsigned long long drawn;
  if (threadIdx.x == 0) drawn = atomicAdd(static_cast<unsigned long long*>(grid.state), 1ull);
  __syncthreads();
  const auto ticket = static_cast<int64_t>(drawn);
  P p(args, ticket % grid.batch);
  look(p, ticket / grid.batch, grid, ticket % grid.batch);
}

// ---- searches, whose result all threads have ---------------------------------------------------------------

// The first of the tokens [low, high) with a valid token at it, or high.
__device__ inline int64_t first_valid(const uint8_t* mask, int64_t low, int64_t high) {
  if (!mask) return low < high ? low : high;
  __shared__ unsigned found[kMostWarps];
  const int count = static_cast<int>(blockDim.x) / kWarp;
  for (int64_t at = low; at < high; at += blockDim.x) {
    const int64_t t = at + threadIdx.x;
    const unsigned vote = __ballot_sync(kAll, t < high && mask[t]);
    if (lane() == 0) found[warp()] = vote;
    __syncthreads();
    int64_t hit = -1;
    for (int w = count - 1; w >= 0; --w)
      if (found[w]) hit = at + w * kWarp + __ffs(static_cast<int>(found[w])) - 1;
    __syncthreads();
    if (hit >= 0) return hit;
  }
  return high;
}

// One past the last of the tokens [0, size) that is valid, or 0.
__device__ inline int64_t live_tokens(const uint8_t* mask, int64_t size) {
  if (!mask) return size;
  __shared__ unsigned found[kMostWarps];
  const int count = static_cast<int>(blockDim.x) / kWarp;
  for (int64_t end = size; end > 0; end -= blockDim.x) {
    const int64_t t = end - 1 - threadIdx.x;
    const unsigned vote = __ballot_sync(kAll, t >= 0 && mask[t]);
    if (lane() == 0) found[warp()] = vote;
    __syncthreads();
    int64_t hit = -1;
    for (int w = count - 1; w >= 0; --w)
      if (found[w]) hit = end - (w * kWarp + __ffs(static_cast<int>(found[w])) - 1);
    __syncthreads();
    if (hit >= 0) return hit;
  }
  return 0;
}

}  // namespace rewardops::cuda
