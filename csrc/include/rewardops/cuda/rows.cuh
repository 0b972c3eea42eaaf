// Division of the tokens of a row among threads. Where arrays are aligned, a pack is one load or store.
//
// RowTiles    tiles of a block, kItems tokens a thread; scans and trees
// RowChunks   chunks of a warp, several packs of each lane in flight, for rows that are dealt out to all warps of
//             several blocks; advantages
// for_packs   the columns of a slice, by all threads of a block; logits
//
// They stay separate because the assignment of tokens to threads, and their order, decide the bits of a sum. They also
// have different purposes. A scan needs tiles in the order of time. Independent tokens need many loads in flight
// instead, and no barrier. for_packs works on shared memory too, and its packs depend on the type.
#pragma once

#include <type_traits>

#include "rewardops/cuda/block.cuh"

namespace rewardops::cuda {

constexpr int kItems = 4;  // tokens per thread at once: 16 bytes of float

// ---- tiles of a block --------------------------------------------------------------------------------------

// The thread's tokens [first, first + kItems) of a tile; those outside [low, high) do not exist.
struct Tile {
  int64_t low, high, first;
  bool packs;  // all tokens exist, and are aligned in every array

  __device__ bool inside(int i) const { return first + i >= low && first + i < high; }
};

// The tokens [low, high) of a row, in tiles of `full` places that begin where every array is aligned: the first tile
// begins at `start`, up to kItems - 1 places in front of `low`. Places are counted in the direction of the walk. In
// reverse, for whole rows only, place 0 is the row's last token.
// Index: int where the family's rows are shorter than 2^31, for fewer registers.
template <typename Index, bool kReverse = false>
struct RowTiles {
  Index low, high, start, full;
  bool packs;  // all arrays are aligned at a common place

  // aligned_at(t): true if every array can be read by packs from token t on.
  template <typename Aligned>
  __device__ static RowTiles of(Index low, Index high, Index full, Aligned aligned_at) {
    Index at = 0;
    while (at < kItems && !aligned_at(low + at)) ++at;
    const bool packs = at < kItems;
    const Index lead = !packs ? 0 : kReverse ? (high - at + kItems) % kItems : at;  // tokens in front of the first pack
    return {low, high, lead ? low + lead - kItems : low, full, packs};
  }
  __device__ Index tiles() const { return high > low ? (high - start + full - 1) / full : 0; }
  __device__ Index tile_start(Index k) const { return start + k * full; }

  // The tokens from `first` on, within the row.
  __device__ Tile items(Index first) const {
    return {low, high, first, packs && first >= low && first + kItems <= high};
  }
  // Tile k.
  __device__ Tile tile(Index k) const { return items(tile_start(k) + static_cast<Index>(threadIdx.x) * kItems); }
  // Tile k of a scan, with the same tokens. Threads of the first tile, though, count from the row's first token, and
  // read packs only if that is aligned: a token on another thread would change the bits of the sums.
  __device__ Tile scan_tile(Index k) const {
    const Index from = k ? tile_start(k) : low, end = tile_start(k + 1), to = end < high ? end : high;
    const Index own = static_cast<Index>(threadIdx.x) * kItems;
    Tile t;
    t.low = kReverse ? high - to : from;
    t.high = kReverse ? high - from : to;
    t.first = kReverse ? t.high - own - kItems : t.low + own;
    t.packs = packs && (k > 0 || start == low) && t.first >= t.low && t.first + kItems <= t.high;
    return t;
  }
};

// True if a row and its mask, which may be null, are aligned at token t.
template <typename T>
__device__ bool aligned_with(const T* row, const uint8_t* mask, int t) {
  return aligned<kItems>(row + t) && (!mask || aligned<kItems>(mask + t));
}

// ---- tokens of a thread ------------------------------------------------------------------------------------

// Bits of the thread's tokens: bit i is 1 if token i is valid.
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

// The thread's tokens of an array; `other` where the bit of `wanted` is 0.
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

// Writes the thread's tokens; 0 where the bit of `valid` is 0.
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

// ---- chunks of a warp --------------------------------------------------------------------------------------

// A row: `lead` tokens up to where `data` is aligned, packs, and less than a pack. The mask may be aligned elsewhere.
template <typename T>
struct RowChunks {
  static constexpr int kInFlight = 4;               // packs per lane
  static constexpr int kPacks = kWarp * kInFlight;  // packs per chunk
  static constexpr int kTokens = kPacks * kItems;   // tokens per chunk
  static constexpr int kStride = kWarp * kItems;    // tokens between a lane's packs

  T* data;
  const uint8_t* mask;  // null: every token is valid
  int64_t size, lead, packs;
  bool mask_packs;  // the mask of a pack can be read at once

  __device__ RowChunks(T* data, const uint8_t* mask, int64_t size) : data(data), mask(mask), size(size) {
    constexpr int kAligned = alignof(Pack<T, kItems>);
    const auto off = static_cast<int64_t>(reinterpret_cast<uintptr_t>(data) % kAligned);
    lead = min(size, (kAligned - off) % kAligned / static_cast<int64_t>(sizeof(T)));
    packs = (size - lead) / kItems;
    mask_packs = mask && aligned<kItems>(mask + lead);
  }
  __device__ bool valid(int64_t t) const { return !mask || mask[t]; }
  __device__ Pack<uint8_t, kItems> flags(int64_t t) const {
    if (mask_packs) return *reinterpret_cast<const Pack<uint8_t, kItems>*>(mask + t);
    Pack<uint8_t, kItems> each;
#pragma unroll
    for (int i = 0; i < kItems; ++i) each.at[i] = valid(t + i);
    return each;
  }
  __device__ auto* pack(int64_t t) const {
    using Plain = Pack<std::remove_const_t<T>, kItems>;
    return reinterpret_cast<std::conditional_t<std::is_const_v<T>, const Plain, Plain>*>(data + t);
  }
  // Visits the chunks `chunk`, `chunk + step`, ... with the lanes of a warp: on_token(t) for a single token,
  // on_packs(t, std::integral_constant N) for the packs at t, t + kStride, ..., N of them. Single tokens are in chunk
  // 0.
  template <typename OnToken, typename OnPacks>
  __device__ void visit(int64_t chunk, int64_t step, OnToken on_token, OnPacks on_packs) const {
    for (; chunk == 0 || chunk * kPacks < packs; chunk += step) {
      if (chunk == 0) {
        if (lane() < lead) on_token(lane());
        const int64_t t = lead + packs * kItems + lane();
        if (t < size) on_token(t);
      }
      int64_t p = chunk * kPacks + lane();
      if ((chunk + 1) * kPacks <= packs) {
        on_packs(lead + p * kItems, std::integral_constant<int, kInFlight>());
      } else {
        for (; p < packs; p += kWarp) on_packs(lead + p * kItems, std::integral_constant<int, 1>());
      }
    }
  }
};

// ---- columns of a slice ------------------------------------------------------------------------------------

// Distributes `count` columns over the block's threads: packs of kPack from column `lead` on, and singly the columns in
// front of them, fewer than kPack, and behind them. Without a lead, a column's thread depends on its number alone.
template <int kPack, typename OnPack, typename OnOne>
__device__ void for_packs(int count, int lead, OnPack on_pack, OnOne on_one) {
  const int packs = (count - lead) / kPack, own = static_cast<int>(threadIdx.x);
  for (int at = own; at < packs; at += threads()) on_pack(lead + at * kPack);
  // Fewer than 2 kPack single columns, for at least kWarp threads.
  const int one = own < lead ? own : own + packs * kPack;
  if (one < count) on_one(one);
}

}  // namespace rewardops::cuda
