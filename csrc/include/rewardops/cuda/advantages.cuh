// Group-relative advantages: from rewards and labels per row to advantages of rows or of all their tokens; and back.
//
// group_advantages_kernel: a block serves a few neighbouring rows, or a part of the tokens of one. It reads the labels
//   of all rows once, lists the members of its rows' groups in shared memory, joins each of those groups once, and
//   writes the rows' tokens. Bits depend on a group's members (of more than kListed, on their rows too), not on how the
//   rows are dealt out.
// row_sums_kernel, group_advantages_backward_kernel: the gradients of tokens, summed by row; then the same joins.
//
// Moved, for 512 rows of 8192 tokens in float32: 4.2 MB of mask and 16.8 MB of tokens, 21 MB or 4.9 us at 4.3 TB/s, in
// either direction. For 8192 rows of 1024: 42 MB or 9.8 us. On top, from the L2 cache: the labels, 8 bytes for each
// row and block, 2 MB and 27 MB in all, and a sector of mask for each member; all of it ahead of the first store, so
// that it costs latency: about 3 us. Per row alone the latency is all there is.
//
// Why not Triton: a program has no list of what it found. It reads labels and masks again for each pass over a group (3
// for a std, 35 for a median, 67 in float64) and each row of it, and all labels for every row: 537 MB from L2 for the
// 8192 rows.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "rewardops/advantages.h"
#include "rewardops/cuda/block.cuh"

namespace rewardops::cuda::advantages {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kBlocks = 2;       // of a multiprocessor, at least
constexpr int kRows = 64;        // of a block, at most
constexpr int64_t kMostRows = int64_t{1} << 30;  // of a batch: rows are 32-bit numbers, places of tokens 64-bit ones
constexpr int kListed = 2048;    // members at once; larger groups are found again for each pass over them
constexpr int kAhead = 4;        // loads of a thread in flight
constexpr int kLook = 8;         // tokens that decide for nearly every row whether it has a valid one
constexpr int kVector = 4;       // tokens of a thread at once: 16 bytes of float32
constexpr int kChunk = kWarp * kVector * kAhead;  // tokens of a warp at once
constexpr int kJoined = 4;       // numbers joined over a block at once
static_assert(kRows <= kThreads);
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Of the rewards of a set of rows.
struct Spread {
  double n, low, high, mean_above, std, mean_abs;  // mean_above: of what is above the lowest
  bool differs;
};

template <typename T>
struct Shared {
  int64_t labels[kRows], unsorted[kRows];
  int counts[kWarps][kRows], places[kWarps][kRows];  // of a group's members among what a warp looks through
  int sizes[kRows], starts[kRows];                   // of the groups, in the list
  bool first[kRows];
  int spans[kWarps][2], behind;                      // where a warp found members; behind the last of all
  int rows[kListed];                                 // the list; -1 for rows without a valid token
  T rewards[kListed];
  double joined[kWarps][kJoined];
  // Of the group, and of all rows where the scale is made of them: in shared memory, for want of registers.
  Spread spreads[2];
  double upstream[2][2];
  T results[3][kRows];                               // of the block's rows
};

// ---- over a block ------------------------------------------------------------------------------------------

struct Add {
  __device__ double operator()(double a, double b) const { return a + b; }
};
// A NaN, where there is one.
struct Least {
  __device__ double operator()(double a, double b) const { return b < a || b != b ? b : a; }
};

// Joined over every kLanes lanes.
template <int kLanes, typename Join>
__device__ double over_lanes(double x, Join join) {
#pragma unroll
  for (int step = kLanes / 2; step; step /= 2) x = join(x, __shfl_xor_sync(kAll, x, step));
  return x;
}

// The numbers of all threads joined, in one order, for all threads.
template <int N, typename T, typename Join>
__device__ void join(double (&x)[N], Shared<T>& shared, Join join) {
  static_assert(N <= kJoined);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    x[k] = over_lanes<kWarp>(x[k], join);
    if (lane() == 0) shared.joined[warp()][k] = x[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < N; ++k) x[k] = over_lanes<kWarps>(shared.joined[lane() % kWarps][k], join);
  __syncthreads();
}

// ---- tokens of a row ---------------------------------------------------------------------------------------

// A row of tokens as warps take it: `lead` of them up to where vectors of `data` lie aligned, vectors, the rest.
template <typename T>
struct Line {
  T* data;
  const uint8_t* mask;  // null: all are valid
  int64_t size, lead, vectors;
  bool packs;           // the mask of a vector can be read at once

  __device__ Line(T* data, const uint8_t* mask, int64_t size) : data(data), mask(mask), size(size) {
    constexpr int kAligned = alignof(Pack<T, kVector>);
    const auto off = static_cast<int64_t>(reinterpret_cast<uintptr_t>(data) % kAligned);
    lead = min(size, (kAligned - off) % kAligned / static_cast<int64_t>(sizeof(T)));
    vectors = (size - lead) / kVector;
    packs = mask && aligned<kVector>(mask + lead);
  }
  __device__ bool valid(int64_t t) const { return !mask || mask[t]; }
  __device__ Pack<uint8_t, kVector> flags(int64_t t) const {
    if (packs) return *reinterpret_cast<const Pack<uint8_t, kVector>*>(mask + t);
    Pack<uint8_t, kVector> each;
#pragma unroll
    for (int i = 0; i < kVector; ++i) each.at[i] = valid(t + i);
    return each;
  }
  __device__ auto* vector(int64_t t) const {
    using Plain = Pack<std::remove_const_t<T>, kVector>;
    using Vector = std::conditional_t<std::is_const_v<T>, const Plain, Plain>;
    return reinterpret_cast<Vector*>(data + t);
  }
  // The chunks `chunk`, `chunk + step`, ... by the lanes of a warp: one(t) for a token, some(t, N) for N vectors, the
  // lane's of every kWarp. The first chunk has what is no vector.
  template <typename One, typename Some>
  __device__ void chunks(int64_t chunk, int64_t step, One one, Some some) const {
    constexpr int kOfChunk = kChunk / kVector;
    for (; chunk == 0 || chunk * kOfChunk < vectors; chunk += step) {
      if (chunk == 0) {
        if (lane() < lead) one(lane());
        const int64_t t = lead + vectors * kVector + lane();
        if (t < size) one(t);
      }
      int64_t v = chunk * kOfChunk + lane();
      if ((chunk + 1) * kOfChunk <= vectors) {
        some(lead + v * kVector, std::integral_constant<int, kAhead>());
      } else {
        for (; v < vectors; v += kWarp) some(lead + v * kVector, std::integral_constant<int, 1>());
      }
    }
  }
};

template <typename T>
__device__ void write_tokens(const AdvantagesArgs<T>& a, const T* values, int first, int rows) {
  const auto parts = static_cast<int>(gridDim.y), part = static_cast<int>(blockIdx.y);
  const int warps = kWarps * parts, own = part * kWarps + warp();
  for (int k = 0; k < rows; ++k) {
    const int row = first + k;
    const T value = values[k];
    // Zeros need no mask: those of groups of equal rewards.
    const uint8_t* mask = value == 0 ? nullptr : a.mask.row(a.rows, row);
    const Line<T> line(a.out.row(a.rows, row), mask, a.rows.size(row));
    // Short rows are dealt out to the warps in turn.
    const int chunk = (own + warps - k % warps) % warps;
    line.chunks(
        chunk, warps, [&](int64_t t) { line.data[t] = value != 0 && line.valid(t) ? value : T{0}; },
        [&](int64_t t, auto n) {
          constexpr int count = decltype(n)::value;
          Pack<uint8_t, kVector> flags[count];
#pragma unroll
          for (int v = 0; v < count; ++v) flags[v] = line.flags(t + v * kWarp * kVector);
#pragma unroll
          for (int v = 0; v < count; ++v) {
            Pack<T, kVector> out;
#pragma unroll
            for (int i = 0; i < kVector; ++i) out.at[i] = value != 0 && flags[v].at[i] ? value : T{0};
            *line.vector(t + v * kWarp * kVector) = out;
          }
        });
  }
}

// Block (b, k): the gradients of the valid tokens of row b, summed over the chunks of part k.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks) row_sums_kernel(const __grid_constant__ AdvantagesArgs<T> a) {
  __shared__ double sums[kWarps];
  const int64_t row = blockIdx.x;
  const auto parts = static_cast<int>(gridDim.y), part = static_cast<int>(blockIdx.y);
  const Line<const T> line(a.grad.row(a.rows, row), a.mask.row(a.rows, row), a.rows.size(row));
  double lanes[kVector] = {};
  line.chunks(
      part * kWarps + warp(), kWarps * parts,
      [&](int64_t t) { if (line.valid(t)) lanes[0] += line.data[t]; },
      [&](int64_t t, auto n) {
        constexpr int count = decltype(n)::value;
        Pack<uint8_t, kVector> flags[count];
        Pack<T, kVector> grads[count];
#pragma unroll
        for (int v = 0; v < count; ++v) {
          flags[v] = line.flags(t + v * kWarp * kVector);
          grads[v] = *line.vector(t + v * kWarp * kVector);
        }
#pragma unroll
        for (int v = 0; v < count; ++v)
#pragma unroll
          for (int i = 0; i < kVector; ++i) lanes[i] += flags[v].at[i] ? static_cast<double>(grads[v].at[i]) : 0.0;
      });
  double sum = over_lanes<kWarp>((lanes[0] + lanes[1]) + (lanes[2] + lanes[3]), Add());
  if (lane() == 0) sums[warp()] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kWarps; ++w) sum += sums[w];
  a.sums[row * parts + part] = sum;
}

// ---- which rows are members --------------------------------------------------------------------------------

// Whether any byte of [begin, end) is not 0; by a warp.
__device__ inline bool any_set(const uint8_t* begin, const uint8_t* end) {
  using Bytes = Pack<uint64_t, 2>;
  if (__any_sync(kAll, lane() < end - begin && begin[lane()])) return true;
  // What is aligned from here on starts among those bytes.
  begin += kWarp;
  for (begin -= reinterpret_cast<uintptr_t>(begin) % sizeof(Bytes); begin < end; begin += kWarp * sizeof(Bytes)) {
    const uint8_t* own = begin + lane() * sizeof(Bytes);
    bool hit = false;
    if (end - own >= static_cast<int64_t>(sizeof(Bytes))) {
      const auto bytes = *reinterpret_cast<const Bytes*>(own);
      hit = bytes.at[0] | bytes.at[1];
    } else {
      for (; own < end; ++own) hit |= *own != 0;
    }
    if (__any_sync(kAll, hit)) return true;
  }
  return false;
}

// Whether the row of each lane has a valid token, where it is `chosen`. A lane looks at the first tokens of its row;
// what they do not decide is searched by the warp.
template <typename T>
__device__ bool has_token(const AdvantagesArgs<T>& a, int row, bool chosen) {
  if (!a.tokens_given) return chosen;
  if (!a.mask.data) return chosen && a.rows.size(row) > 0;
  const uint8_t *mask = nullptr, *end = nullptr;
  if (chosen) {
    mask = a.mask.row(a.rows, row);
    end = mask + a.rows.size(row);
  }
  bool found = false;
#pragma unroll
  for (int t = 0; t < kLook; ++t) found |= t < end - mask && mask[t];
  for (unsigned open = __ballot_sync(kAll, !found && end - mask > kLook); open; open &= open - 1) {
    const int source = __ffs(static_cast<int>(open)) - 1;
    const auto of = [&](const uint8_t* p) {
      return reinterpret_cast<const uint8_t*>(__shfl_sync(kAll, reinterpret_cast<unsigned long long>(p), source));
    };
    const bool hit = any_set(of(mask) + kLook, of(end));
    if (lane() == source) found = hit;
  }
  return found;
}

// In the backward pass what counts is known: a row without a valid token, and one whose group has no spread to divide
// by, has no inverse scale.
template <bool kBackward, typename T>
__device__ bool counts(const AdvantagesArgs<T>& a, int row, bool chosen) {
  if constexpr (kBackward) return chosen && a.inv_scale[row] != 0;
  else return has_token(a, row, chosen);
}

// Puts rows that count into the list, with their rewards: of the candidates that it holds already, or, from row `from`
// on, of all rows or those of a group. (Not inlined: every pass over a large set calls it.)
template <bool kBackward, typename T>
__noinline__ __device__ void fill_list(const AdvantagesArgs<T>& a, Shared<T>& shared, int size, int from, int group) {
  __syncthreads();
#pragma unroll 1
  for (int start = 0; start < size; start += kThreads) {
    const int at = start + static_cast<int>(threadIdx.x);
    const bool inside = at < size;
    int row = from + at;
    if (from < 0 && inside) row = shared.rows[at];
    const bool chosen = inside && (group < 0 || a.groups[row] == shared.labels[group]);
    const T reward = chosen ? a.rewards[row] : T{0};
    const bool member = counts<kBackward>(a, row, chosen);
    if (inside) {
      shared.rows[at] = member ? row : -1;
      shared.rewards[at] = member ? reward : T{0};
    }
  }
  __syncthreads();
}

template <typename T>
struct Member {
  int row;  // -1: none
  T reward;
};

// A stretch of the list; or, of sets that it cannot hold, the `large` first rows of the batch, or a group's among them,
// which every pass puts into the list one window after the other.
template <typename T, bool kBackward>
struct Members {
  const AdvantagesArgs<T>& a;
  Shared<T>& shared;
  int begin, end, large;
  int group;  // -1: all rows

  // Called by all threads of the block, as often each, with a member or none.
  template <typename Visit>
  __device__ void each(Visit visit) const {
    int first = begin, behind = end, from = 0;
    do {
      if (large) {
        first = 0, behind = min(large - from, kListed);
        fill_list<kBackward>(a, shared, behind, from, group);
      }
#pragma unroll 1
      for (int start = first; start < behind; start += kThreads) {
        const int at = start + static_cast<int>(threadIdx.x);
        Member<T> m{-1, 0};
        if (at < behind) m = {shared.rows[at], shared.rewards[at]};
        visit(m);
      }
      from += kListed;
    } while (from < large);
  }
  template <typename Is>
  __device__ int count(Is is) const {
    int found = 0;
    each([&](const Member<T>& m) { found += __syncthreads_count(m.row >= 0 && is(m.reward)); });
    return found;
  }
  // The least of what value(reward) is; infinity where there is no member.
  template <typename Value>
  __device__ double least(Value value) const {
    double found[1] = {kInfinity};
    each([&](const Member<T>& m) {
      if (m.row >= 0) found[0] = Least()(found[0], value(m.reward));
    });
    join(found, shared, Least());
    return found[0];
  }
};

// ---- the groups of a block's rows --------------------------------------------------------------------------

// The distinct labels of the block's rows, ascending; returns how many.
template <typename T>
__device__ int sort_labels(const AdvantagesArgs<T>& a, Shared<T>& shared, int first, int rows) {
  const auto k = static_cast<int>(threadIdx.x);
  int64_t label = 0;
  if (k < rows) shared.unsorted[k] = label = a.groups[first + k];
  __syncthreads();
  bool is_first = k < rows;
#pragma unroll 1
  for (int j = 0; j < rows; ++j) is_first = is_first && (j >= k || shared.unsorted[j] != label);
  if (k < rows) shared.first[k] = is_first;
  const int count = __syncthreads_count(is_first);
  int place = 0;
#pragma unroll 1
  for (int j = 0; j < rows; ++j) place += shared.first[j] && shared.unsorted[j] < label;
  if (is_first) shared.labels[place] = label;
  __syncthreads();
  return count;
}

// The place of a label among `count` sorted ones, or -1.
__device__ inline int place_of(int64_t label, const int64_t* labels, int count) {
  int low = 0, high = count;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (labels[middle] < label) low = middle + 1;
    else high = middle;
  }
  return low < count && labels[low] == label ? low : -1;
}

// What a warp finds of the groups [from, to) in its stretch of the rows: counted, or written into the list.
template <bool kWrite, typename T>
__device__ void find_members(const AdvantagesArgs<T>& a, Shared<T>& shared, int groups, int from, int to) {
  int* places = kWrite ? shared.places[warp()] : shared.counts[warp()];
  int(&span)[2] = shared.spans[warp()];
  const int end = span[1];
  int first = end, behind = 0;
#pragma unroll 1
  for (int start = span[0]; start < end; start += kWarp * kAhead) {
    int64_t labels[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int row = start + k * kWarp + lane();
      labels[k] = row < end ? a.groups[row] : 0;
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int at = start + k * kWarp, row = at + lane();
      int group = row < end ? place_of(labels[k], shared.labels, groups) : -1;
      if (group < from || group >= to) group = -1;
      const unsigned hits = __ballot_sync(kAll, group >= 0);
      if (!hits) continue;
      first = min(first, at + __ffs(static_cast<int>(hits)) - 1);
      behind = at + kWarp - __clz(static_cast<int>(hits));
      const unsigned same = __match_any_sync(kAll, group), before = same & ((1u << lane()) - 1);
      if (kWrite && group >= 0) shared.rows[places[group] + __popc(before)] = row;
      __syncwarp();
      if (group >= 0 && !before) places[group] += __popc(same);
      __syncwarp();
    }
  }
  __syncwarp();
  // Only between what it found first and last are there members.
  if (!kWrite && lane() == 0) span[0] = first, span[1] = behind;
}

// How many members the groups have. A warp looks through a stretch of all rows, so that the list is in their order.
template <typename T>
__device__ void count_members(const AdvantagesArgs<T>& a, Shared<T>& shared, int groups) {
  const int batch = static_cast<int>(a.rows.batch), stretch = (batch + kWarps - 1) / kWarps;
  if (lane() == 0) {
    shared.spans[warp()][0] = min(warp() * stretch, batch);
    shared.spans[warp()][1] = min((warp() + 1) * stretch, batch);
  }
  for (int g = lane(); g < groups; g += kWarp) shared.counts[warp()][g] = 0;
  __syncwarp();
  find_members<false>(a, shared, groups, 0, groups);
  __syncthreads();
  const auto g = static_cast<int>(threadIdx.x);
  if (g < groups) {
    int size = 0;
    for (int w = 0; w < kWarps; ++w) size += shared.counts[w][g];
    shared.sizes[g] = size;
  }
  if (threadIdx.x == 0) {
    shared.behind = 0;
    for (const auto& span : shared.spans) shared.behind = max(shared.behind, span[1]);
  }
  __syncthreads();
}

// Whether an advantage depends on other rows.
template <typename T>
__device__ bool is_relative(const AdvantagesArgs<T>& a) {
  return a.scale != Scale::none || a.raw_singletons || (a.baseline != Baseline::none && a.baseline != Baseline::given);
}

// One set of rows after the other: all rows, where the scale is made of them; then each group of the block's rows, or
// these themselves where they have nothing to do with others.
template <typename T, bool kBackward>
class Sets {
 public:
  Members<T, kBackward> members;
  bool whole = false;  // all rows

  __device__ Sets(const AdvantagesArgs<T>& a, Shared<T>& shared, int first, int rows)
      : members{a, shared, 0, 0, 0, -1}, first_(first), rows_(rows) {}

  __device__ bool next() {
    const AdvantagesArgs<T>& a = members.a;
    Shared<T>& shared = members.shared;
    whole = !whole && groups_ < 0 && a.scale == Scale::batch_std;
    if (whole) {
      const int batch = static_cast<int>(a.rows.batch);
      if (batch > kListed) members.large = batch;
      else list(0, batch);
      return true;
    }
    if (groups_ < 0) {
      if (!is_relative(a)) {
        groups_ = 0;
        list(first_, rows_);
        return true;
      }
      groups_ = sort_labels(a, shared, first_, rows_);
      count_members(a, shared, groups_);
    }
    if (group_ == groups_) return false;
    if (group_ == listed_) list_groups();
    members.large = 0;
    members.begin = shared.starts[group_];
    members.end = members.begin + shared.sizes[group_];
    members.group = group_++;
    if (members.end > kListed) members.large = shared.behind;
    return true;
  }

 private:
  __device__ void list(int from, int size) {
    members.begin = 0, members.end = size;
    fill_list<kBackward>(members.a, members.shared, size, from, -1);
  }

  // As many groups as there is space for; or one that alone has too many members, and is not listed.
  __device__ void list_groups() {
    Shared<T>& shared = members.shared;
    int size = 0;
    do {
      if (threadIdx.x == 0) shared.starts[listed_] = size;
      size += shared.sizes[listed_++];
    } while (listed_ < groups_ && size + shared.sizes[listed_] <= kListed);
    __syncthreads();
    if (size > kListed) return;
    for (int i = threadIdx.x; i < kWarps * (listed_ - group_); i += kThreads) {
      const int w = i % kWarps, g = group_ + i / kWarps;
      int place = shared.starts[g];
#pragma unroll 1
      for (int other = 0; other < w; ++other) place += shared.counts[other][g];
      shared.places[w][g] = place;
    }
    __syncthreads();
    find_members<true>(members.a, shared, groups_, group_, listed_);
    fill_list<kBackward>(members.a, shared, size, -1, -1);
  }

  int first_, rows_;
  int groups_ = -1, group_ = 0, listed_ = 0;  // how many, the next one, and the first behind those in the list
};

// ---- statistics of a group ---------------------------------------------------------------------------------

// Centred on the smallest reward first: rewards near 1000 keep their differences. Equal rewards, whose std comes out of
// rounding size, are told by comparison.
template <typename T, bool kBackward>
__device__ void find_spread(const Members<T, kBackward>& members, int ddof, bool squares, Spread& found) {
  using M = const Member<T>&;
  double ends[2] = {kInfinity, kInfinity};
  members.each([&](M m) {
    if (m.row < 0) return;
    ends[0] = Least()(ends[0], m.reward);
    ends[1] = Least()(ends[1], -m.reward);
  });
  join(ends, members.shared, Least());
  Spread s{0, ends[0], -ends[1], 0, 0, 0, false};
  double sums[3] = {};
  members.each([&](M m) {
    if (m.row < 0) return;
    sums[0] += m.reward - s.low;
    sums[1] += fabs(static_cast<double>(m.reward));
    sums[2] += 1;
  });
  join(sums, members.shared, Add());
  s.n = sums[2];
  s.differs = s.n > 0 && !(s.low == s.high);
  s.mean_above = sums[0] / max(s.n, 1.0);
  s.mean_abs = sums[1] / max(s.n, 1.0);
  if (squares && s.differs) {
    double square[1] = {};
    members.each([&](M m) {
      const double centred = m.reward - s.low - s.mean_above;
      if (m.row >= 0) square[0] += centred * centred;
    });
    join(square, members.shared, Add());
    s.std = sqrt(square[0] / max(s.n - ddof, 1.0));
  }
  if (threadIdx.x == 0) found = s;
  __syncthreads();
}

// Integers in the order of the numbers; zeros are one.
template <typename T>
struct Key {
  using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  static constexpr Bits kLowest = std::numeric_limits<Bits>::min(), kHighest = std::numeric_limits<Bits>::max();

  __device__ static Bits of(T number) {
    number += T{0};
    Bits bits;
    memcpy(&bits, &number, sizeof bits);
    return bits < 0 ? bits ^ kHighest : bits;
  }
  __device__ static T number(Bits key) {
    const Bits bits = key < 0 ? key ^ kHighest : key;
    T number;
    memcpy(&number, &bits, sizeof number);
    return number;
  }
};

// The reward of that rank from below by bisection over all numbers, and the next rank's where that is wanted.
template <typename T, bool kBackward>
__device__ void find_ranked(const Members<T, kBackward>& members, int rank, bool next, double& below,
                            double& above) {
  auto lower = Key<T>::kLowest, upper = Key<T>::kHighest;
  int at_most = rank + 2;  // members up to `upper`
  while (lower < upper) {
    const auto middle = (lower & upper) + ((lower ^ upper) >> 1);
    const int reached = members.count([&](T r) { return Key<T>::of(r) <= middle; });
    if (reached > rank) {
      upper = middle;
      at_most = reached;
    } else {
      lower = middle + 1;
    }
  }
  above = below = Key<T>::number(upper);
  if (next && at_most < rank + 2)
    above = members.least([&](T r) { return Key<T>::of(r) > upper ? static_cast<double>(r) : kInfinity; });
}

enum Place { kHighest, kLowest, kBelow, kAbove };

// What the advantages of a group are made of, beside its spread.
struct Statistics {
  double inv_scale = 1;
  double gain = 1, low = 0, baseline = 0;  // reward less baseline is gain * (reward - low - baseline), unless
  bool flat = false, alone = false;        // it is 0, the rewards being equal, or the reward itself, of a group of one
  // Of the gradients: how the baseline depends on rewards, its rank lying `part` of the way between two of them; and
  // the earliest rows (Place) of these rewards, -1 for none. Of the best row forward too.
  double share = 0, part = 0;
  int places[4] = {-1, -1, -1, -1};
};

template <typename T>
__device__ bool is_ranked(const AdvantagesArgs<T>& a) {
  return a.baseline == Baseline::median || a.baseline == Baseline::quantile || a.baseline == Baseline::max ||
         a.baseline == Baseline::second_max;
}

// The rewards that an order statistic lies between, and how far.
template <typename T, bool kBackward>
__device__ void find_ranks(const AdvantagesArgs<T>& a, const Members<T, kBackward>& members, double& below,
                           double& above, double& part) {
  const Spread& group = members.shared.spreads[0];
  below = above = group.high;
  if (a.baseline == Baseline::second_max && group.n > 1 && members.count([&](T r) { return r == group.high; }) == 1)
    below = above = -members.least([&](T r) { return r < group.high ? -static_cast<double>(r) : kInfinity; });
  if (group.high != group.high) return;  // a NaN has no rank
  if (a.baseline != Baseline::median && a.baseline != Baseline::quantile) return;
  const double last = max(group.n - 1, 0.0);
  double at = floor(last / 2);
  if (a.baseline == Baseline::quantile) {
    // In the precision of the rewards, as torch.quantile.
    at = static_cast<T>(a.quantile) * static_cast<T>(last);
    part = max(at - floor(at), 0.0);
  }
  find_ranked(members, static_cast<int>(at), part > 0, below, above);
}

// The earliest rows of some rewards; -1 for none.
template <int N, typename T, bool kBackward>
__device__ void find_places(const Members<T, kBackward>& members, const double (&rewards)[4], int (&places)[4]) {
  double rows[N];
#pragma unroll
  for (auto& row : rows) row = kInfinity;
  members.each([&](const Member<T>& m) {
#pragma unroll
    for (int k = 0; k < N; ++k)
      if (m.row >= 0 && m.reward == rewards[k]) rows[k] = min(rows[k], static_cast<double>(m.row));
  });
  join(rows, members.shared, Least());
#pragma unroll
  for (int k = 0; k < N; ++k) places[k] = rows[k] < kInfinity ? static_cast<int>(rows[k]) : -1;
}

template <typename T, bool kBackward>
__device__ Statistics statistics_of(const AdvantagesArgs<T>& a, const Members<T, kBackward>& members) {
  const Spread &group = members.shared.spreads[0], &of = members.shared.spreads[a.scale == Scale::batch_std];
  Statistics s;
  s.low = group.low, s.baseline = group.mean_above;
  s.share = 1 / max(group.n, 1.0);
  if (a.baseline == Baseline::leave_one_out) s.gain = group.n > 1 ? group.n / (group.n - 1) : 0;
  s.share *= s.gain;
  if (a.baseline == Baseline::length_weighted) {
    double sums[2] = {};
    members.each([&](const Member<T>& m) {
      if (m.row < 0) return;
      const double length = a.lengths[m.row];
      sums[0] += length;
      sums[1] += length * (m.reward - group.low);
    });
    join(sums, members.shared, Add());
    s.share = sums[0] > 0 ? 1 / sums[0] : 0;
    s.baseline = sums[0] > 0 ? sums[1] / sums[0] : 0;
  }
  double below = 0, above = 0;
  if (is_ranked(a)) {
    find_ranks(a, members, below, above, s.part);
    s.low = below, s.baseline = s.part > 0 ? s.part * (above - below) : 0;
  }
  if (kBackward ? is_ranked(a) || a.scale == Scale::range : a.baseline == Baseline::second_max)
    find_places<kBackward ? 4 : 1>(members, {group.high, group.low, below, above}, s.places);
  s.alone = a.raw_singletons && group.n == 1;
  s.flat = !group.differs || (group.n < 2 && group.low == group.low);
  if (a.scale != Scale::none && !s.alone) {
    const double size = a.scale == Scale::mean_abs ? group.mean_abs
                        : a.scale == Scale::range  ? group.high - group.low
                                                   : of.std;
    s.inv_scale = of.differs ? 1 / (size + a.eps) : 0;
  }
  return s;
}

// Reward less baseline.
template <typename T>
__device__ double numerator(const AdvantagesArgs<T>& a, const Statistics& s, const Member<T>& m) {
  if (s.alone || a.baseline == Baseline::none) return m.reward;
  if (a.baseline == Baseline::given) return static_cast<double>(m.reward) - a.given[m.row];
  const bool one = a.baseline == Baseline::second_max && s.low == s.low;  // the best row's alone
  if (s.flat || (one && m.row != s.places[kHighest])) return 0;
  return s.gain * (m.reward - s.low - s.baseline);
}

// How the baseline depends on the row's reward.
template <typename T>
__device__ double weight(const AdvantagesArgs<T>& a, const Statistics& s, int row) {
  if (a.baseline == Baseline::none || a.baseline == Baseline::given) return 0;
  if (a.baseline == Baseline::length_weighted) return s.share * a.lengths[row];
  if (!is_ranked(a)) return s.share;
  return (row == s.places[kBelow] ? 1 - s.part : 0) + (row == s.places[kAbove] ? s.part : 0);
}

// How the scale does, which is made of the rewards of `of`.
template <typename T>
__device__ double slope(const AdvantagesArgs<T>& a, const Statistics& s, const Spread& of, const Member<T>& m) {
  if (a.scale == Scale::none) return 0;
  if (a.scale == Scale::range) return (m.row == s.places[kHighest]) - (m.row == s.places[kLowest]);
  if (a.scale == Scale::mean_abs) return ((m.reward > 0) - (m.reward < 0)) / max(of.n, 1.0);
  return of.std > 0 ? (m.reward - of.low - of.mean_above) / (max(of.n - a.ddof, 1.0) * of.std) : 0;
}

// What comes from above to a row, in the order of its parts.
template <typename T>
__device__ double upstream(const AdvantagesArgs<T>& a, int row) {
  if (!a.grad.data) return 0;
  if (!a.tokens_given) return a.grad.data[row];
  double sum = 0;
#pragma unroll 4
  for (int64_t part = 0; part < a.parts; ++part) sum += a.sums[row * a.parts + part];
  return sum;
}

// Of all members: what comes from above, and what of it goes through the scale.
template <typename T>
__device__ void sum_upstream(const AdvantagesArgs<T>& a, const Members<T, true>& members, double (&found)[2]) {
  double sums[2] = {};
  members.each([&](const Member<T>& m) {
    if (m.row < 0) return;
    const double up = upstream(a, m.row);
    sums[0] += up;
    sums[1] += up * a.numerators[m.row] + (a.grad_inv_scale ? static_cast<double>(a.grad_inv_scale[m.row]) : 0.0);
  });
  join(sums, members.shared, Add());
  if (threadIdx.x == 0) found[0] = sums[0], found[1] = sums[1];
  __syncthreads();
}

// ---- kernels -----------------------------------------------------------------------------------------------

// The results of the block's rows, 0 for those that do not count: of(member, statistics, k) writes row k's.
template <bool kBackward, typename T, typename Of>
__device__ void for_rows(const AdvantagesArgs<T>& a, Shared<T>& shared, int first, int rows, Of of) {
  if (static_cast<int>(threadIdx.x) < rows)
    for (auto& result : shared.results) result[threadIdx.x] = 0;
  Sets<T, kBackward> sets(a, shared, first, rows);
  while (sets.next()) {
    Statistics s;
    if (is_relative(a)) {
      find_spread(sets.members, a.ddof, a.scale == Scale::std || sets.whole, shared.spreads[sets.whole]);
      if constexpr (kBackward) sum_upstream(a, sets.members, shared.upstream[sets.whole]);
      if (sets.whole) continue;
      s = statistics_of(a, sets.members);
    }
    sets.members.each([&](const Member<T>& m) {
      if (m.row >= first && m.row < first + rows) of(m, s, m.row - first);
    });
  }
  __syncthreads();
}

// Block (i, k): the `each` rows from i * each on, and of their tokens part k.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    group_advantages_kernel(const __grid_constant__ AdvantagesArgs<T> a, int each) {
  __shared__ Shared<T> shared;
  const int first = static_cast<int>(blockIdx.x) * each, rows = min(each, static_cast<int>(a.rows.batch) - first);
  for_rows<false>(a, shared, first, rows, [&](const Member<T>& m, const Statistics& s, int k) {
    const double value = numerator(a, s, m);
    // An infinite reward in a group without spread does not make a NaN.
    shared.results[0][k] = static_cast<T>(times(s.inv_scale, value));
    shared.results[1][k] = static_cast<T>(s.inv_scale);
    shared.results[2][k] = static_cast<T>(value);
  });
  if (const int k = threadIdx.x; k < rows && blockIdx.y == 0) {
    if (!a.tokens_given) a.advantages[first + k] = shared.results[0][k];
    a.inv_scale[first + k] = shared.results[1][k];
    a.numerators[first + k] = shared.results[2][k];
  }
  if (a.tokens_given) write_tokens(a, shared.results[0], first, rows);
}

// Block i: the gradients of the rewards of the `each` rows from i * each on, and of their given baselines.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    group_advantages_backward_kernel(const __grid_constant__ AdvantagesArgs<T> a, int each) {
  __shared__ Shared<T> shared;
  const int first = static_cast<int>(blockIdx.x) * each, rows = min(each, static_cast<int>(a.rows.batch) - first);
  const bool relative = is_relative(a), second = a.baseline == Baseline::second_max;
  const int of_scale = a.scale == Scale::batch_std;
  for_rows<true>(a, shared, first, rows, [&](const Member<T>& m, const Statistics& s, int k) {
    const double up = upstream(a, m.row), through = relative ? shared.upstream[of_scale][1] : 0;
    double gain = s.gain, total = relative ? shared.upstream[0][0] : 0;
    if (second) {
      gain = m.row == s.places[kHighest];
      total = s.places[kHighest] < 0 ? 0 : upstream(a, s.places[kHighest]);
    }
    const double grad = s.inv_scale * (gain * up - weight(a, s, m.row) * total) -
                        slope(a, s, shared.spreads[of_scale], m) * s.inv_scale * s.inv_scale * through;
    shared.results[0][k] = static_cast<T>(s.alone ? up : grad);
    shared.results[1][k] = static_cast<T>(s.alone ? 0 : -s.inv_scale * up);
  });
  if (const int k = threadIdx.x; k < rows) {
    a.grad_rewards[first + k] = shared.results[0][k];
    if (a.grad_given) a.grad_given[first + k] = shared.results[1][k];
  }
}

}  // namespace rewardops::cuda::advantages
