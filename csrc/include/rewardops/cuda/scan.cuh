// Scans along rows. A block walks a row tile by tile, in one direction of time, with a carried state; or each tile is a
// separate block, and looks back for the state in front of it. A family defines state and map: the map of adjacent
// tokens takes the state in front of them to the state behind them.
//
// A problem P is one row:
//   P::Map                     a map, POD; Map::identity(), Map::then(first, second)
//   P::State                   a state, POD; Map::apply(state, map)
//   P::kReverse                true if the walk goes from the right to the left
//   p.size                     the number of tokens
//   p.aligned_at(t)            true if every array can be read by packs of kItems from token t on
//   p.load(tile)               reads the thread's tokens into p; returns their map
//   p.store(tile, before)      writes their results; `before` is the state in front of them
//   p.start()                  the state in front of the row's first token
//   p.end(state)               called with the state behind its last
#pragma once

#include <cuda/atomic>

#include "rewardops/cuda/rows.cuh"

namespace rewardops::cuda {

constexpr int64_t kSlotBytes = 128;  // bytes of the slot of a tile, to which later tiles look back

// Distribution of a scan over the device.
struct ScanGrid {
  int64_t batch;
  int64_t chunks;  // tiles of the longest row, each a block; 0: one block walks a whole row
  void* state;     // [1 + batch * chunks] slots, zeros at first; slot 0 counts tickets. Null without chunks
};

// ---- maps over threads -------------------------------------------------------------------------------------

// Another lane's map or state: shuffle(word) fetches four bytes of it.
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
  Map result;
  memcpy(&result, &words, sizeof(Map));
  return result;
}

// The map of the tokens of all threads before this one; `total` becomes that of the whole block. Has one barrier only:
// the next call needs other `warps`, or a barrier in between.
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
  const int count = threads() / kWarp;
  total = Map::identity();
  for (int w = 0; w < count; ++w) {
    if (w == warp()) before = Map::then(total, before);
    total = Map::then(total, warps[w]);
  }
  return before;
}

// ---- tiles that look back ----------------------------------------------------------------------------------

// State that a tile publishes for the tiles behind it.
template <typename Map, typename State>
struct Slot {
  int ready;     // published so far: 0: nothing; 1: map; 2: map and behind
  Map map;       // map of the tile's tokens
  State behind;  // the state behind the tile
};

using Flag = ::cuda::atomic_ref<int, ::cuda::thread_scope_device>;

// The state in front of tile k of a row with these slots; called by the first warp. It is the state behind the nearest
// tile that has published one, with the maps of the tiles in between applied to it in sequence. Those tiles apply them
// in the same order, so the bits do not depend on which tile is the nearest.
template <typename Map, typename State>
__device__ State look_back(Slot<Map, State>* slots, int64_t k) {
  const int64_t other = k - 1 - lane();
  while (true) {
    const int ready = other >= 0 ? Flag(slots[other].ready).load(::cuda::std::memory_order_acquire) : 0;
    const unsigned known = __ballot_sync(kAll, ready == 2), mapped = __ballot_sync(kAll, ready > 0);
    const int nearest = __ffs(static_cast<int>(known)) - 1;
    const unsigned between = nearest < 0 ? kAll : (1u << nearest) - 1;
    if (nearest < 0 || (mapped & between) != between) continue;
    Map map = Map::identity();
    State state{};
    if (lane() < nearest) map = slots[other].map;
    if (lane() == nearest) state = slots[other].behind;
    state = shuffled(state, [&](int word) { return __shfl_sync(kAll, word, nearest); });
    for (int from = nearest - 1; from >= 0; --from)
      state = Map::apply(state, shuffled(map, [&](int word) { return __shfl_sync(kAll, word, from); }));
    return state;
  }
}

// ---- the walk ----------------------------------------------------------------------------------------------

// The tiles of a problem's row.
template <typename P>
__device__ RowTiles<int64_t, P::kReverse> tiles_of(const P& p) {
  return RowTiles<int64_t, P::kReverse>::of(0, p.size, static_cast<int64_t>(threads()) * kItems,
                                            [&](int64_t t) { return p.aligned_at(t); });
}

// Scans a whole row by one block.
template <typename P>
__device__ void walk(P& p) {
  using Map = typename P::Map;
  __shared__ Map warps[2][kWarps];  // two tiles in turn: one barrier a tile suffices
  const auto row = tiles_of(p);
  const int64_t tiles = row.tiles();
  typename P::State carry = p.start();
  for (int64_t k = 0; k < tiles; ++k) {
    const Tile tile = row.scan_tile(k);
    Map total;
    const Map before = scan_block(p.load(tile), warps[k % 2], total);
    p.store(tile, Map::apply(carry, before));
    carry = Map::apply(carry, total);
  }
  p.end(carry);
}

// Scans tile k of row b by a separate block.
template <typename P>
__device__ void look(P& p, int64_t k, const ScanGrid& grid, int64_t b) {
  using Map = typename P::Map;
  using State = typename P::State;
  using Slots = Slot<Map, State>;
  static_assert(sizeof(Slots) <= kSlotBytes, "");
  __shared__ Map warps[kWarps];
  __shared__ State earlier;
  const auto row = tiles_of(p);
  const int64_t tiles = row.tiles();
  if (tiles == 0 && k == 0) p.end(p.start());
  if (k >= tiles) return;
  auto* slots = reinterpret_cast<Slots*>(static_cast<unsigned char*>(grid.state) + kSlotBytes) + b * grid.chunks;
  const Tile tile = row.scan_tile(k);
  Map total;
  const Map before = scan_block(p.load(tile), warps, total);
  Flag ready(slots[k].ready);
  if (k > 0 && threadIdx.x == 0) {
    slots[k].map = total;
    ready.store(1, ::cuda::std::memory_order_release);
  }
  if (threadIdx.x < kWarp) {
    const State state = k > 0 ? look_back(slots, k) : p.start();
    if (threadIdx.x == 0) {
      slots[k].behind = Map::apply(state, total);
      ready.store(2, ::cuda::std::memory_order_release);
      earlier = state;
    }
  }
  __syncthreads();
  p.store(tile, Map::apply(earlier, before));
  if (k == tiles - 1) p.end(Map::apply(earlier, total));
}

// A block draws a ticket for its tile, in order: the first tiles of all rows, then the second ones. So every tile to
// which it looks back has been started, and waiting for that tile cannot deadlock.
// At least two blocks per multiprocessor where maps are small: without this bound ptxas spills to fit a third one.
template <typename P, typename Args>
__global__ void __launch_bounds__(kThreads, sizeof(typename P::Map) > 16 ? 1 : 2)
    scan_kernel(const __grid_constant__ Args args, const __grid_constant__ ScanGrid grid) {
  if (!grid.chunks) {
    P p(args, blockIdx.x);
    walk(p);
    return;
  }
  __shared__ unsigned long long next;
  if (threadIdx.x == 0) next = atomicAdd(static_cast<unsigned long long*>(grid.state), 1ull);
  __syncthreads();
  const auto ticket = static_cast<int64_t>(next);
  P p(args, ticket % grid.batch);
  look(p, ticket / grid.batch, grid, ticket % grid.batch);
}

}  // namespace rewardops::cuda
