// Prefix trees of groups of rows, and common prefixes.
//
// Contract: exactly as prefix_tree and prefix_lcp of rewardops/reference/prefix_tree.py.
//
// Bytes, for B = 1024 rows of T = 8192 in groups of 16 that share a prompt of 512 tokens (int64):
//   rows_kernel     up to 8 KB of mask and 4 KB of tokens a row, the leader's from L2: 12 MB, 2.9 us at 4.3 TB/s
//   places_kernel   16 orders a row, and a sector or two of each row of a pair that these leave open: 1 MB
// Tree, labels and orders stay in L2: by_label_kernel reads 8 MB there, nodes_kernel and prefix_lcp_kernel less than 1
// MB; the time of these is that of a launch.
//
// Why not Triton: in CUDA a warp leaves a loop independently of others, and votes distribute the remaining work over
// threads. A whole block first compares each row with one row of its group,
// the leader. That decides the order of two rows and their common prefix, except for rows that leave the leader's path
// at the same token on the same side.
#pragma once

#include <climits>

#include "rewardops/cuda/scan.cuh"
#include "rewardops/cuda/search.cuh"
#include "rewardops/prefix_tree.h"

namespace rewardops::cuda::trees {

constexpr int kBlocks = 4;                // blocks per multiprocessor
constexpr int kFew = 4;                   // leading tokens, in which most rows differ
constexpr int kTile = kThreads * kItems;  // tokens that a block processes at once

// ---- valid tokens to the front -----------------------------------------------------------------------------

// A number of valid tokens, as the map of a scan.
struct Count {
  int n;
  __device__ static Count identity() { return {0}; }
  __device__ static Count then(const Count& first, const Count& second) { return {first.n + second.n}; }
};

// Moves the valid tokens of each row to its front, from one array to another; the rest of a row is not written.
template <typename Word>
struct WithoutHoles {
  Rows rows;
  Tokens<const uint8_t> mask;
  Tokens<const Word> from;
  Tokens<Word> to;
  int64_t plane;            // elements between the channels
  int64_t *first, *length;  // outputs: first token and length of the moved rows; or null
};

// Block (b, c): channel c of row b.
template <typename Word>
__global__ void __launch_bounds__(kThreads, kBlocks)
    without_holes_kernel(const __grid_constant__ WithoutHoles<Word> a) {
  __shared__ Count warps[2][kWarps];
  const int64_t b = blockIdx.x, channel = blockIdx.y * a.plane;
  const uint8_t* mask = a.mask.row(a.rows, b);
  const Word* from = a.from.row(a.rows, b) + channel;
  Word* to = a.to.row(a.rows, b) + channel;
  const int size = static_cast<int>(a.rows.size(b));
  const auto row = RowTiles<int>::of(0, size, kTile, [&](int t) { return aligned_with(from, mask, t); });
  int moved = 0;
  for (int k = 0; k < row.tiles(); ++k) {
    const Tile tile = row.tile(k);
    const unsigned valid = load_valid(mask, tile);
    Word words[kItems];
    load_items(from, tile, valid, Word{0}, words);
    Count total;
    int place = moved + scan_block(Count{__popc(valid)}, warps[k % 2], total).n;
#pragma unroll
    for (int i = 0; i < kItems; ++i)
      if (valid >> i & 1) to[place++] = words[i];
    moved += total.n;
  }
  if (threadIdx.x == 0 && blockIdx.y == 0 && a.length) a.first[b] = 0, a.length[b] = moved;
}

// ---- the tree ----------------------------------------------------------------------------------------------

// Warp b: the place of row b among the rows by label, and the range of its group there.
__global__ void __launch_bounds__(kThreads, kBlocks)
    by_label_kernel(const int64_t* groups, int64_t batch, int64_t* rows, int64_t* begin, int64_t* end) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * kWarps + warp();
  if (b >= batch) return;
  const int64_t own = groups[b];
  unsigned smaller = 0, equal = 0, earlier = 0;
#pragma unroll 4
  for (int64_t j = lane(); j < batch; j += kWarp) {
    const int64_t label = groups[j];
    smaller += label < own;
    equal += label == own;
    earlier += label == own && j < b;
  }
  smaller = __reduce_add_sync(kAll, smaller);
  equal = __reduce_add_sync(kAll, equal);
  earlier = __reduce_add_sync(kAll, earlier);
  if (lane() == 0) {
    begin[b] = smaller;
    end[b] = smaller + equal;
    rows[smaller + earlier] = b;
  }
}

struct Span {
  int64_t first, length;
};

// The tokens of row b, from its first valid one to its last; called by the whole block.
template <typename Token>
__device__ Span span_of(const PrefixTreeArgs<Token>& a, int64_t b) {
  if (a.skip) return {0, a.tree.length[b]};
  const int64_t size = a.rows.size(b);
  const uint8_t* mask = a.mask.row(a.rows, b);
  if (!mask) return {0, size};
  const int64_t first = first_hit<ByBlock>(Where<uint8_t, IsSet>{mask, {}}, 0, size);
  if (first == size) return {0, 0};
  const int64_t behind = first_hit<ByBlock>(Where<uint8_t, IsSet, true>{mask + size, {}}, 0, size - first);
  return {first, size - behind - first};
}

template <typename Token>
__device__ const Token* first_token(const PrefixTreeArgs<Token>& a, int64_t b, int64_t first) {
  return a.tokens.row(a.rows, b) + first;
}

// A row's place relative to its leader, as an integer: twice the length of their common prefix, plus one where the row
// comes after the leader; -1 for an empty row. Rows with different codes are ordered by code alone. The one with the
// shorter common prefix diverges from the leader first, where the other still has the leader's tokens; with equal
// lengths one sorts before the leader and one after.
struct PrefixOrder {
  int64_t code;

  __device__ static PrefixOrder of(int64_t common, bool after) { return {2 * common + after}; }
  __device__ int64_t common() const { return code >> 1; }
  __device__ bool after() const { return code & 1; }
  __device__ bool empty() const { return code < 0; }
};

// Block b: the span of row b, and its order relative to the leader, which is the first row of its group.
template <typename Token>
__global__ void __launch_bounds__(kThreads, kBlocks)
    rows_kernel(const __grid_constant__ PrefixTreeArgs<Token> a, const __grid_constant__ ByLabel groups,
                int64_t* codes) {
  const int64_t b = blockIdx.x, leader = groups.rows[groups.begin[b]];
  const Span own = span_of(a, b), theirs = leader == b ? own : span_of(a, leader);
  const Token *mine = first_token(a, b, own.first), *other = first_token(a, leader, theirs.first);
  const int64_t shorter = own.length < theirs.length ? own.length : theirs.length;
  const int64_t common = leader == b ? own.length : first_hit<ByBlock>(Differ<Token>{mine, other}, 0, shorter);
  if (threadIdx.x != 0) return;
  const bool after = common < shorter ? other[common] < mine[common] : theirs.length <= own.length;
  codes[b] = own.length > 0 ? PrefixOrder::of(common, after).code : -1;
  if (!a.skip) a.tree.first[b] = own.first, a.tree.length[b] = own.length;
}

// Length of the common prefix of two rows that share `from` tokens, or from + kFew if it is longer.
template <typename Token>
__device__ int64_t few_more(const Token* x, const Token* y, int64_t from, int64_t limit) {
  int same = 0;
#pragma unroll
  for (int i = 0; i < kFew; ++i) same += same == i && from + i < limit && x[from + i] == y[from + i];
  return from + same;
}

// Block b: the place of row b among all rows, and its common prefix with the row before it, which is the longest one
// with any row of the group that comes before it. Each lane compares with one member of the group by codes and a few
// tokens; pairs that these leave open are compared by the whole warp.
template <typename Token>
__global__ void __launch_bounds__(kThreads, kBlocks)
    places_kernel(const __grid_constant__ PrefixTreeArgs<Token> a, const __grid_constant__ ByLabel groups,
                  const int64_t* codes) {
  const int64_t b = blockIdx.x, begin = groups.begin[b], end = groups.end[b];
  const PrefixOrder code{codes[b]};
  const int64_t length = a.tree.length[b];
  const Token* mine = first_token(a, b, a.tree.first[b]);
  const int64_t each = (end - begin + kWarps - 1) / kWarps, lanes = each < kWarp ? each : kWarp;
  int64_t place = 0, most = -1;
  for (int64_t from = begin + warp() * lanes; from < end; from += kWarps * lanes) {
    const bool active = lane() < lanes && from + lane() < end;
    const int64_t j = active ? groups.rows[from + lane()] : b;
    const PrefixOrder theirs{j == b ? -1 : codes[j]};
    const Token* other = mine;
    int64_t same = -1, limit = -1, other_length = 0;
    bool ahead = false, open = false;
    if (code.empty()) {
      ahead = j != b && (!theirs.empty() || j < b);  // empty rows come last, in the order of their numbers
    } else if (!theirs.empty() && theirs.code != code.code) {
      const bool by_theirs = theirs.common() <= code.common();
      same = by_theirs ? theirs.common() : code.common();
      ahead = by_theirs ? !theirs.after() : code.after();
    } else if (!theirs.empty()) {
      other_length = a.tree.length[j];
      other = first_token(a, j, a.tree.first[j]);
      limit = length < other_length ? length : other_length;
      same = few_more(mine, other, code.common(), limit);
      open = same == code.common() + kFew && same < limit;
    }
    for (unsigned left = __ballot_sync(kAll, open); left; left &= left - 1) {
      const int source = __ffs(static_cast<int>(left)) - 1;
      const Differ<Token> differ{mine, from_lane(other, source)};
      const int64_t common = first_hit<ByWarp>(differ, from_lane(same, source), from_lane(limit, source));
      if (lane() == source) same = common;
    }
    if (limit >= 0) {
      const bool shorter_first = other_length < length || (other_length == length && j < b);
      ahead = same < limit ? other[same] < mine[same] : shorter_first;
    }
    place += ahead;
    if (ahead && most < same) most = same;
  }
  place = begin + reduce_block(place, Add());
  most = reduce_block(most, Max());
  if (threadIdx.x == 0) {
    a.tree.order[place] = b;
    a.tree.shared[place] = most;
  }
}

struct Below {
  int64_t depth;
  __device__ bool operator()(int64_t shared) const { return shared < depth; }
};
struct Equals {
  int64_t depth;
  __device__ bool operator()(int64_t shared) const { return shared == depth; }
};

// Searches by a warp among the lengths of the common prefixes of neighbouring rows (Tree::shared).
struct Shares {
  const int64_t* shared;
  int64_t batch;

  // The last position up to `upto` whose length is below `depth`; -1 where there is none.
  __device__ int64_t last_below(int64_t upto, int64_t depth) const {
    return upto - first_hit<ByWarp>(Where<int64_t, Below, true>{shared + upto + 1, {depth}}, 0, upto + 1);
  }
  // The first position from `begin` on whose length passes the test; `batch` where there is none.
  template <typename Test>
  __device__ int64_t first(int64_t begin, Test test) const {
    return first_hit<ByWarp>(Where<int64_t, Test>{shared, test}, begin, batch);
  }
  // The longest common prefix that the rows at [begin, end), taken as one, have with a neighbour, -1 where there is
  // none: its depth and its node.
  __device__ int64_t enclosing(int64_t begin, int64_t end, int64_t& node) const {
    const int64_t here = shared[begin], there = end < batch ? shared[end] : -1, depth = here < there ? there : here;
    node = depth < 0 ? -1 : first(last_below(begin, depth) + 1, Equals{depth});
    return depth;
  }
};

__device__ inline void put_node(const MutableTree& tree, int64_t node, bool exists, int64_t begin, int64_t end,
                                int64_t depth, int64_t parent) {
  tree.begin[node] = exists ? begin : 0;
  tree.end[node] = exists ? end : 0;
  tree.depth[node] = exists ? depth : -1;
  tree.parent[node] = exists ? parent : -1;
}

// Warp p: the nodes p and batch + p.
__global__ void __launch_bounds__(kThreads, kBlocks) nodes_kernel(const __grid_constant__ MutableTree tree) {
  const int64_t p = static_cast<int64_t>(blockIdx.x) * kWarps + warp();
  if (p >= tree.batch) return;
  const Shares shares{tree.shared, tree.batch};
  const int64_t depth = tree.shared[p];
  int64_t begin = 0, end = 0, up = -1;
  bool parts = depth >= 0;
  if (parts) {
    begin = shares.last_below(p - 1, depth);
    parts = shares.first(begin + 1, Equals{depth}) == p;
  }
  if (parts) {
    end = shares.first(p + 1, Below{depth});
    shares.enclosing(begin, end, up);
  }
  int64_t alone_up;
  const int64_t above = shares.enclosing(p, p + 1, alone_up);
  if (lane() != 0) return;
  put_node(tree, p, parts, begin, end, depth, up);
  const int64_t row = tree.order[p], length = tree.length[row], node = tree.batch + p;
  const bool own = length > (above > 0 ? above : 0);
  put_node(tree, node, own, p, p + 1, length, alone_up);
  tree.leaf[row] = own ? node : length > 0 ? alone_up : -1;
}

// ---- common prefixes ---------------------------------------------------------------------------------------

// The common prefixes of the row at p with the rows on one side of it (kStep) in its group, `members`. The common
// prefix of two rows is the shortest one of the neighbouring rows between them. Each lane takes a position.
template <int kStep>
__device__ void walk_group(const PrefixLcpArgs& a, const int64_t* members, int64_t size, int64_t p, int64_t length,
                           int32_t* lcp) {
  int64_t least = length;
  for (int64_t at = kStep < 0 ? p : p + 1;; at += kStep * kWarp) {
    const int64_t q = at + kStep * lane();
    int64_t shared = q >= 0 && q < a.tree.batch ? a.tree.shared[q] : -1;
    const unsigned ends = __ballot_sync(kAll, shared < 0);
    if (least < shared) shared = least;
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const int64_t nearer = __shfl_up_sync(kAll, shared, distance);
      if (lane() >= distance && nearer < shared) shared = nearer;
    }
    if (shared >= 0) {
      const int64_t row = a.tree.order[kStep < 0 ? q - 1 : q];
      const int64_t place = lower_bound(members, size - 1, row);  // the row is one of them
      if (place < a.most) lcp[place] = static_cast<int32_t>(shared);
    }
    if (ends) return;
    least = from_lane(shared, kWarp - 1);
  }
}

// Warp p: the members of the group of the row at position p, and its common prefixes with them.
__global__ void __launch_bounds__(kThreads, kBlocks)
    prefix_lcp_kernel(const __grid_constant__ PrefixLcpArgs a, const __grid_constant__ ByLabel groups) {
  const int64_t p = static_cast<int64_t>(blockIdx.x) * kWarps + warp();
  if (p >= a.tree.batch) return;
  const int64_t row = a.tree.order[p], length = a.tree.length[row];
  const int64_t* members = groups.rows + groups.begin[row];
  const int64_t size = groups.end[row] - groups.begin[row];
  int32_t* lcp = a.lcp + row * a.most;
  for (int64_t k = lane(); k < a.most; k += kWarp) {
    const int64_t member = k < size ? members[k] : -1;
    a.members[row * a.most + k] = static_cast<int32_t>(member);
    lcp[k] = member == row && length > 0 ? static_cast<int32_t>(length) : -1;
  }
  __syncwarp();
  walk_group<-1>(a, members, size, p, length, lcp);
  walk_group<1>(a, members, size, p, length, lcp);
}

}  // namespace rewardops::cuda::trees
