// The members of groups: lists in shared memory, and passes over them.
#pragma once

#include <cstdint>
#include <limits>

#include "rewardops/advantages.h"
#include "rewardops/cuda/block.cuh"
#include "rewardops/cuda/search.cuh"

namespace rewardops::cuda::advantages {

constexpr int kBlocks = 2;                       // blocks per multiprocessor, at least
constexpr int kRows = 64;                        // rows per block, at most
constexpr int64_t kMostRows = int64_t{1} << 30;  // rows per batch: their numbers have 32 bits, offsets of tokens 64
constexpr int kListed = 2048;  // members at once; larger groups are searched for again in each pass over them
constexpr int kAhead = 4;      // labels that a thread loads at once
constexpr int kLook = 8;       // leading tokens that are searched first: nearly every row has a valid one there
constexpr int kReduced = 4;    // numbers reduced over a block at once, at most
static_assert(kRows <= kThreads);
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// The rewards of a set of rows.
struct RewardSummary {
  double n;           // their number
  double low, high;   // the smallest and the largest; NaN if a reward is NaN
  double mean_above;  // the mean of reward - origin(low)
  double std;         // 0 if not requested
  double mean_abs;    // the mean of |reward|
  bool differs;       // any two rewards differ, or one is infinite or NaN
};

// The block's shared memory.
template <typename T>
struct Shared {
  int64_t labels[kRows], unsorted[kRows];  // labels of the block's rows: distinct and ascending; one per row
  bool first[kRows];                       // row k is the first row of its label
  int sizes[kRows], starts[kRows];         // per group: number of members, and place in the list
  int counts[kWarps][kRows];               // members of each group among a warp's part of the batch
  int places[kWarps][kRows];               // the place in the list of the warp's next member of each group
  int spans[kWarps][2];                    // the range of rows that holds a warp's members
  int last_end;                            // one past the last member of all
  int rows[kListed];                       // the list; -1 for rows that are not members
  T rewards[kListed];
  double partial[kWarps][kReduced];
  RewardSummary summaries[2];  // group, and all rows; in shared memory to save registers
  double upstream[2][2];       // sums over the members, see sum_upstream
  T results[3][kRows];         // results of the block's rows
};

// ---- members -----------------------------------------------------------------------------------------------

// True if the lane's row is `chosen` and has a valid token. A lane reads the first tokens of its row. Rows without a
// valid one among these are searched by the whole warp, in sequence.
template <typename T>
__device__ bool has_token(const AdvantagesArgs<T>& a, int row, bool chosen) {
  if (!a.tokens_given) return chosen;
  if (!a.mask.data) return chosen && a.rows.size(row) > 0;
  const uint8_t *mask = nullptr, *end = nullptr;
  if (chosen) {
    mask = a.mask.row(a.rows, row);
    end = mask + a.rows.size(row);
  }
  bool any = false;
#pragma unroll
  for (int t = 0; t < kLook; ++t) any |= t < end - mask && mask[t];
  for (unsigned open = __ballot_sync(kAll, !any && end - mask > kLook); open; open &= open - 1) {
    const int source = __ffs(static_cast<int>(open)) - 1;
    const bool hit = any_set(from_lane(mask, source) + kLook, from_lane(end, source));
    if (lane() == source) any = hit;
  }
  return any;
}

// Fills the list with `size` rows and their rewards, -1 for rows that are not members. The rows are those already in
// the list (from < 0), or those from row `from` on, of which only rows of `group` are members (-1: of any group). Not
// inlined, as every pass over a large set calls it.
template <typename T>
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
    const bool member = has_token(a, row, chosen);
    if (inside) {
      shared.rows[at] = member ? row : -1;
      shared.rewards[at] = member ? reward : T{0};
    }
  }
  __syncthreads();
}

template <typename T>
struct Member {
  int row;  // -1: no member
  T reward;
};

// A set of rows: the part [begin, end) of the list. A set that the list cannot hold is searched again in every pass:
// the rows of `group` among the first `large` rows of the batch, which enter the list window by window.
template <typename T, bool kBackward>
struct Members {
  const AdvantagesArgs<T>& a;
  Shared<T>& shared;
  int begin, end;
  int large;  // 0: the list holds the set
  int group;  // -1: any group

  // Visits every member once. Called by all threads of the block; each calls visit equally often, with a member or
  // none.
  template <typename Visit>
  __device__ void each(Visit visit) const {
    int first = begin, stop = end, from = 0;
    do {
      if (large) {
        first = 0, stop = min(large - from, kListed);
        fill_list(a, shared, stop, from, group);
      }
#pragma unroll 1
      for (int start = first; start < stop; start += kThreads) {
        const int at = start + static_cast<int>(threadIdx.x);
        Member<T> m{-1, 0};
        if (at < stop) m = {shared.rows[at], shared.rewards[at]};
        visit(m);
      }
      from += kListed;
    } while (from < large);
  }
  // The number of members whose reward passes a test.
  template <typename Test>
  __device__ int count(Test test) const {
    int result = 0;
    each([&](const Member<T>& m) { result += __syncthreads_count(m.row >= 0 && test(m.reward)); });
    return result;
  }
  // The smallest value(reward); infinity where there is no member.
  template <typename Value>
  __device__ double smallest(Value value) const {
    double result[1] = {kInfinity};
    each([&](const Member<T>& m) {
      if (m.row >= 0) result[0] = MinOrNan()(result[0], value(m.reward));
    });
    reduce(result, MinOrNan());
    return result[0];
  }
  // Reduces N numbers of each thread, for all threads.
  template <int N, typename Op>
  __device__ void reduce(double (&x)[N], Op op) const {
    reduce_block<WarpOrder::pairwise>(x, shared.partial, op);
  }
};

// ---- the groups of a block's rows --------------------------------------------------------------------------

// Writes the distinct labels of the block's rows, ascending, to shared.labels; returns their number.
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

// Finds the members of the groups [from, to) among the warp's part of the rows, and counts them or writes them to the
// list.
template <bool kWrite, typename T>
__device__ void find_members(const AdvantagesArgs<T>& a, Shared<T>& shared, int groups, int from, int to) {
  int* places = kWrite ? shared.places[warp()] : shared.counts[warp()];
  int (&span)[2] = shared.spans[warp()];
  const int end = span[1];
  int first = end, last_end = 0;
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
      int group = row < end ? lower_bound(shared.labels, groups, labels[k]) : groups;
      if (group < from || group >= to || shared.labels[group] != labels[k]) group = -1;
      const unsigned hits = __ballot_sync(kAll, group >= 0);
      if (!hits) continue;
      first = min(first, at + __ffs(static_cast<int>(hits)) - 1);
      last_end = at + kWarp - __clz(static_cast<int>(hits));
      const unsigned same = __match_any_sync(kAll, group), before = same & ((1u << lane()) - 1);
      if (kWrite && group >= 0) shared.rows[places[group] + __popc(before)] = row;
      __syncwarp();
      if (group >= 0 && !before) places[group] += __popc(same);
      __syncwarp();
    }
  }
  __syncwarp();
  // The next search starts at the first member, and ends behind the last.
  if (!kWrite && lane() == 0) span[0] = first, span[1] = last_end;
}

// Counts the members of the groups. Warps take neighbouring parts of the batch, in order, so that the list is in the
// order of the rows.
template <typename T>
__device__ void count_members(const AdvantagesArgs<T>& a, Shared<T>& shared, int groups) {
  const int batch = static_cast<int>(a.rows.batch), each = (batch + kWarps - 1) / kWarps;
  if (lane() == 0) {
    shared.spans[warp()][0] = min(warp() * each, batch);
    shared.spans[warp()][1] = min((warp() + 1) * each, batch);
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
    shared.last_end = 0;
    for (const auto& span : shared.spans) shared.last_end = max(shared.last_end, span[1]);
  }
  __syncthreads();
}

// True if an advantage depends on the rewards of other rows.
template <typename T>
__device__ bool is_relative(const AdvantagesArgs<T>& a) {
  return a.scale != Scale::none || a.raw || (a.baseline != Baseline::none && a.baseline != Baseline::values);
}

// Iterates over sets of rows: all rows first, if the scale depends on them; then the group of each label of the block's
// rows or, if advantages do not depend on other rows, the block's rows as one set.
template <typename T, bool kBackward>
class Sets {
 public:
  Members<T, kBackward> members;
  bool whole = false;  // the set is all rows

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
    if (members.end > kListed) members.large = shared.last_end;
    return true;
  }

 private:
  __device__ void list(int from, int size) {
    members.begin = 0, members.end = size;
    fill_list(members.a, members.shared, size, from, -1);
  }

  // Lists the members of as many groups as fit. A group larger than the list is not listed.
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
    fill_list(members.a, shared, size, -1, -1);
  }

  int first_, rows_;
  int groups_ = -1;  // the number of groups; -1: not known yet
  int group_ = 0;    // the next group
  int listed_ = 0;   // one past the last group in the list
};

}  // namespace rewardops::cuda::advantages
