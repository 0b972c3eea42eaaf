// Prefix trees of groups of rows, common prefixes, and values of nodes written to tokens; and back.
//
// Contract: as prefix_tree, prefix_lcp, nodes_to_tokens and nodes_to_tokens_backward of
// rewardops/reference/prefix_tree.py; integers exactly, sums in double and in an order that depends on the tree alone.
//
// Bytes, for B = 1024 rows of T = 8192 in groups of 16 that share a prompt of 512 tokens (int64):
//   rows_kernel     up to 8 KB of mask and 4 KB of tokens a row, the leader's from L2: 12 MB, 2.9 us at 4.3 TB/s
//   places_kernel   16 codes a row, and a sector or two of each row of a pair that the leader did not tell apart: 1 MB
//   nodes_to_tokens, and its backward    mask 1 and token 4 each: 42 MB, 9.8 us
// Tree, labels and codes stay in L2: by_label_kernel reads 8 MB there, nodes_kernel and prefix_lcp_kernel less than 1
// MB; these take what a launch takes.
//
// Why not Triton: there a program compares its row with one member after the other, 512 tokens at a time, and reads
// what all share once for each pair: 130 MB here. A warp can leave a loop alone, and threads can take what is left by
// votes. Here each row is first compared with one row of its group, its leader, by a whole block: which of two rows
// comes first, and what they share, is known by that for all but those that leave the leader's path at the same token
// on the same side. And writing tokens, the nodes of a row's path are listed once in shared memory, not walked for
// every block of it.
#pragma once

#include <climits>
#include <cstring>

#include "rewardops/cuda/scan.cuh"
#include "rewardops/prefix_tree.h"

namespace rewardops::cuda::trees {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kBlocks = 4;                // of a multiprocessor
constexpr int kFew = 4;                   // tokens that tell most rows apart
constexpr int kNodes = 64;                // of a path at once
constexpr int kTile = kThreads * kItems;  // tokens of a block at once
constexpr int kInFlight = 64;             // bytes that a thread reads at once where sums take them

// ---- over a block ------------------------------------------------------------------------------------------

struct Sum {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Most {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};

// The values of all threads, joined in one order, for all of them.
template <typename T, typename Join>
__device__ T over_block(T x, Join join) {
  __shared__ T warps[kWarps];
#pragma unroll
  for (int distance = kWarp / 2; distance; distance /= 2) x = join(x, __shfl_xor_sync(kAll, x, distance));
  if (lane() == 0) warps[warp()] = x;
  __syncthreads();
  x = warps[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) x = join(x, warps[w]);
  __syncthreads();
  return x;
}

// ---- searches ----------------------------------------------------------------------------------------------

// Threads that search together. least(x, none): the least of what they have, `none` being nothing.
struct ByWarp {
  __device__ static int rank() { return lane(); }
  static constexpr int kSize = kWarp;
  __device__ static unsigned least(unsigned x, unsigned) { return __reduce_min_sync(kAll, x); }
};
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

// How far an address is from the boundary of 16 bytes below it, in elements.
template <typename T>
__device__ int off_boundary(const T* address) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(address) % 16 / sizeof(T));
}

// The elements of 16 bytes. (By __ldg, as compilers take other loads of a Pack to pieces here.)
template <typename T>
__device__ Pack<T, 16 / sizeof(T)> load_pack(const T* address) {
  const uint4 bits = __ldg(reinterpret_cast<const uint4*>(address));
  Pack<T, 16 / sizeof(T)> pack;
  memcpy(&pack, &bits, sizeof pack);
  return pack;
}

// What is searched: element t is a hit or not, kEach of them are one load of 16 bytes where t lies at a boundary.
// Here: the elements of which a test holds; kBackwards: from in front of `data`, to the left.
template <typename T, typename Test, bool kBackwards = false>
struct Where {
  static constexpr int kEach = 16 / sizeof(T);
  const T* data;
  Test test;

  // Elements from the last boundary up to t; -1 where there is none.
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

// The tokens in which two rows differ.
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

// The first hit among the elements [from, limit), or limit; by all threads of the team.
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

// ---- tokens of a row ---------------------------------------------------------------------------------------

// The tokens [low, high) of a row as threads take them, kItems at once, from `start` on: the last place up to `low`
// from which all arrays can be read so. (A row has no 2^31 tokens: what it shares with others is told in 32 bits.)
struct Stretch {
  int low, high, start;
  bool packs;

  template <typename Aligned>
  __device__ static Stretch of(int low, int high, Aligned aligned_at) {
    int h = 0;
    while (h < kItems && !aligned_at(low + h)) ++h;
    return {low, high, h % kItems ? low + h - kItems : low, h < kItems};
  }
  __device__ Tile tile(int first) const {
    return {low, high, first, packs && first >= low && first + kItems <= high};
  }
  // Of the whole block: tile k, of how many.
  __device__ int tiles() const { return high > start ? (high - start + kTile - 1) / kTile : 0; }
  __device__ int tile_start(int k) const { return start + k * kTile; }
  __device__ Tile block_tile(int k) const { return tile(tile_start(k) + static_cast<int>(threadIdx.x) * kItems); }
};

template <typename T>
__device__ bool aligned_with(const T* row, const uint8_t* mask, int t) {
  return aligned<kItems>(row + t) && (!mask || aligned<kItems>(mask + t));
}

// How many tokens there are up to here, over threads.
struct Count {
  int n;
  __device__ static Count identity() { return {0}; }
  __device__ static Count then(const Count& first, const Count& second) { return {first.n + second.n}; }
};

__device__ inline int count_valid(const uint8_t* mask, int size) {
  const Stretch all = Stretch::of(0, size, [&](int t) { return aligned<kItems>(mask + t); });
  int count = 0;
  for (int k = 0; k < all.tiles(); ++k) count += __popc(load_valid(mask, all.block_tile(k)));
  return over_block(count, Sum());
}

// Arrays whose valid tokens are moved to the front of their rows; what lies behind them is left as it is.
template <typename Word>
struct WithoutHoles {
  Rows rows;
  Tokens<const uint8_t> mask;
  Tokens<const Word> from;
  Tokens<Word> to;
  int64_t plane;            // elements between the channels
  int64_t *first, *length;  // of the rows as they are then; or null
};

// Block (b, c): channel c of row b.
template <typename Word>
__global__ void __launch_bounds__(kThreads, kBlocks)
    without_holes_kernel(const __grid_constant__ WithoutHoles<Word> a) {
  __shared__ Count warps[2][kMostWarps];
  const int64_t b = blockIdx.x, channel = blockIdx.y * a.plane;
  const uint8_t* mask = a.mask.row(a.rows, b);
  const Word* from = a.from.row(a.rows, b) + channel;
  Word* to = a.to.row(a.rows, b) + channel;
  const int size = static_cast<int>(a.rows.size(b));
  const Stretch all = Stretch::of(0, size, [&](int t) { return aligned_with(from, mask, t); });
  int moved = 0;
  for (int k = 0; k < all.tiles(); ++k) {
    const Tile tile = all.block_tile(k);
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

// Warp b: where row b lies among the rows by label.
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

struct IsSet {
  __device__ bool operator()(uint8_t valid) const { return valid != 0; }
};

struct Span {
  int64_t first, length;
};

// From the first valid token to the last; by the block.
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

// What a row's comparison with its leader says: twice the tokens that it shares with it, plus one where it comes after
// it; -1 for an empty row. Rows of different codes are told apart by them: the one that shares less leaves the leader's
// path first, and the other is there still; of rows that share equally much, one lies on each side.
struct Code {
  int64_t code;

  __device__ static Code of(int64_t reach, bool after) { return {2 * reach + after}; }
  __device__ int64_t reach() const { return code >> 1; }
  __device__ bool after() const { return code & 1; }
  __device__ bool empty() const { return code < 0; }
};

// Block b: the span of row b, and its code; the leader is the first row of its group.
template <typename Token>
__global__ void __launch_bounds__(kThreads, kBlocks)
    rows_kernel(const __grid_constant__ PrefixTreeArgs<Token> a, const __grid_constant__ ByLabel groups,
                int64_t* codes) {
  const int64_t b = blockIdx.x, leader = groups.rows[groups.begin[b]];
  const Span own = span_of(a, b), theirs = leader == b ? own : span_of(a, leader);
  const Token *mine = first_token(a, b, own.first), *other = first_token(a, leader, theirs.first);
  const int64_t shorter = own.length < theirs.length ? own.length : theirs.length;
  const int64_t reach = leader == b ? own.length : first_hit<ByBlock>(Differ<Token>{mine, other}, 0, shorter);
  if (threadIdx.x != 0) return;
  const bool after = reach < shorter ? other[reach] < mine[reach] : theirs.length <= own.length;
  codes[b] = own.length > 0 ? Code::of(reach, after).code : -1;
  if (!a.skip) a.tree.first[b] = own.first, a.tree.length[b] = own.length;
}

// How many tokens two rows share that share `from`, as far as a few more tell.
template <typename Token>
__device__ int64_t few_more(const Token* x, const Token* y, int64_t from, int64_t limit) {
  int same = 0;
#pragma unroll
  for (int i = 0; i < kFew; ++i) same += same == i && from + i < limit && x[from + i] == y[from + i];
  return from + same;
}

template <typename T>
__device__ T from_lane(T value, int source) {
  return __shfl_sync(kAll, value, source);
}
template <typename T>
__device__ T* from_lane(T* address, int source) {
  return reinterpret_cast<T*>(__shfl_sync(kAll, reinterpret_cast<unsigned long long>(address), source));
}

// Block b: the place of row b among all rows, and what it shares with the row before it: of those before it in its
// group, the last one shares most. A lane takes a member; what codes and a few tokens leave open, the warp compares.
template <typename Token>
__global__ void __launch_bounds__(kThreads, kBlocks)
    places_kernel(const __grid_constant__ PrefixTreeArgs<Token> a, const __grid_constant__ ByLabel groups,
                  const int64_t* codes) {
  const int64_t b = blockIdx.x, begin = groups.begin[b], end = groups.end[b];
  const Code code{codes[b]};
  const int64_t length = a.tree.length[b];
  const Token* mine = first_token(a, b, a.tree.first[b]);
  const int64_t each = (end - begin + kWarps - 1) / kWarps, lanes = each < kWarp ? each : kWarp;
  int64_t place = 0, most = -1;
  for (int64_t from = begin + warp() * lanes; from < end; from += kWarps * lanes) {
    const bool active = lane() < lanes && from + lane() < end;
    const int64_t j = active ? groups.rows[from + lane()] : b;
    const Code theirs{j == b ? -1 : codes[j]};
    const Token* other = mine;
    int64_t same = -1, limit = -1, other_length = 0;
    bool ahead = false, open = false;
    if (code.empty()) {
      ahead = j != b && (!theirs.empty() || j < b);  // empty rows come last, by number
    } else if (!theirs.empty() && theirs.code != code.code) {
      const bool by_theirs = theirs.reach() <= code.reach();
      same = by_theirs ? theirs.reach() : code.reach();
      ahead = by_theirs ? !theirs.after() : code.after();
    } else if (!theirs.empty()) {
      other_length = a.tree.length[j];
      other = first_token(a, j, a.tree.first[j]);
      limit = length < other_length ? length : other_length;
      same = few_more(mine, other, code.reach(), limit);
      open = same == code.reach() + kFew && same < limit;
    }
    for (unsigned left = __ballot_sync(kAll, open); left; left &= left - 1) {
      const int source = __ffs(static_cast<int>(left)) - 1;
      const Differ<Token> differ{mine, from_lane(other, source)};
      const int64_t found = first_hit<ByWarp>(differ, from_lane(same, source), from_lane(limit, source));
      if (lane() == source) same = found;
    }
    if (limit >= 0) {
      const bool shorter_first = other_length < length || (other_length == length && j < b);
      ahead = same < limit ? other[same] < mine[same] : shorter_first;
    }
    place += ahead;
    if (ahead && most < same) most = same;
  }
  place = begin + over_block(place, Sum());
  most = over_block(most, Most());
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

// What the rows at neighbouring positions share, searched by a warp.
struct Shares {
  const int64_t* shared;
  int64_t batch;

  // The last position up to `upto` that shares less than `depth`; -1 where there is none.
  __device__ int64_t last_below(int64_t upto, int64_t depth) const {
    return upto - first_hit<ByWarp>(Where<int64_t, Below, true>{shared + upto + 1, {depth}}, 0, upto + 1);
  }
  // The first one from `begin` on of which the test holds; else `batch`.
  template <typename Test>
  __device__ int64_t first(int64_t begin, Test test) const {
    return first_hit<ByWarp>(Where<int64_t, Test>{shared, test}, begin, batch);
  }
  // The depth of what the rows at [begin, end) share with a neighbour, -1 where nothing, and its node.
  __device__ int64_t enclosing(int64_t begin, int64_t end, int64_t& node) const {
    const int64_t here = shared[begin], there = end < batch ? shared[end] : -1, depth = here < there ? there : here;
    node = depth < 0 ? -1 : first(last_below(begin, depth) + 1, Equals{depth});
    return depth;
  }
};

__device__ inline void put_node(const MutableTree& tree, int64_t node, bool is, int64_t begin, int64_t end,
                                int64_t depth, int64_t parent) {
  tree.begin[node] = is ? begin : 0;
  tree.end[node] = is ? end : 0;
  tree.depth[node] = is ? depth : -1;
  tree.parent[node] = is ? parent : -1;
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

// Towards one end of the group (kStep), what the row at p shares with the rows there: the least of what the neighbours
// between them do. A lane takes a position.
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
      int64_t low = 0, high = size - 1;  // where the row is among the members
      while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (members[middle] < row) low = middle + 1;
        else high = middle;
      }
      if (low < a.most) lcp[low] = static_cast<int32_t>(shared);
    }
    if (ends) return;
    least = from_lane(shared, kWarp - 1);
  }
}

// Warp p: the members of the group of the row at position p, and what it shares with them.
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

// ---- nodes and tokens --------------------------------------------------------------------------------------

// Powers of gamma as products of two or three of a table, so that they are cheap, and depend on the exponent alone: the
// values of rows that share a prefix have the same bits, wherever their tokens lie. Exponents below 0 are 0.
class Powers {
 public:
  static constexpr int kEach = 256;
  struct Table {
    double low[kEach], high[kEach + 1];
  };

  // Called by all threads of the block; barriers are the caller's.
  __device__ Powers(double gamma, Table& table) : table_(table), one_(gamma == 1) {
    if (one_) return;
    const double log = ::log2(gamma);
#pragma unroll 1
    for (int k = threadIdx.x; k <= 2 * kEach; k += kThreads) {
      const int n = k < kEach ? k : (k - kEach) * kEach;
      const double power = n ? ::exp2(n * log) : 1;  // the logarithm of 0 is infinite
      if (k < kEach) table.low[slot(k)] = power;
      else table.high[k - kEach] = power;
    }
  }
  __device__ bool one() const { return one_; }
  __device__ double operator()(int n) const {
    if (one_ || n <= 0) return 1;
    double x = table_.low[slot(n % kEach)] * table_.high[n / kEach % kEach];
    for (int more = n / (kEach * kEach); more > 0; --more) x *= table_.high[kEach];
    return x;
  }

 private:
  // Neighbouring lanes are kItems tokens apart: they find their numbers in neighbouring banks.
  __device__ static int slot(int k) { return k % kItems * (kEach / kItems) + k / kItems; }

  const Table& table_;
  bool one_;
};

// State s of a row, its first s tokens, is that of token s - shift.
__device__ inline int shift_of(At at) { return at == At::before ? 0 : 1; }

// Some nodes of a path, from its leaf's side on: those of the states (low, high].
struct Listed {
  double value[kNodes];
  int depth[kNodes];
  int64_t node[kNodes];
  int low, high;
  int64_t next;  // where the next list begins, -1 where this one goes up to the top
  int count;
};

// What the nodes of the path of row b, the block's, say of its tokens, which are asked for from the right to the left.
// kHoles: tokens lie apart, in a row that skips masked ones. kFactor: the derivative by the row's factor.
template <typename T, bool kHoles, bool kFactor>
class PathValues {
 public:
  // Of a channel; called by all threads.
  __device__ PathValues(const NodeTokensArgs<T>& a, int64_t b, int channel, const Powers& power, Listed& listed)
      : a_(a), power_(power), listed_(listed), b_(b), channel_(channel), depth_(0), above_(INT_MAX), value_(0) {
    if (threadIdx.x == 0) {
      listed_.low = listed_.high = INT_MAX;
      listed_.next = a_.tree.leaf[b_];
      listed_.count = 0;
    }
    __syncthreads();
  }

  // x of the thread's tokens: of number `first` of the row, from its first valid one, and of those behind it; `valid`
  // are those that count where others are skipped. None that matters, of any thread, is below `lowest`. Returns
  // whether all are x[0].
  __device__ bool read(int first, unsigned valid, int lowest, double (&x)[kItems]) {
    const int shift = shift_of(a_.at);
    const auto state = [&](int i) { return first + shift + (kHoles ? __popc(valid & ((1u << i) - 1)) : i); };
    // Most tokens have the node that the thread has met last.
    const bool met = first + shift > above_, alike = met && (power_.one() || a_.at == At::step);
#pragma unroll
    for (int i = 0; i < kItems; ++i) x[i] = value_;
    while (true) {
      int n = -1;
      // Not unrolled, for want of registers.
#pragma unroll 1
      for (int i = kItems - 1; i >= 0 && !alike; --i) {
        double value = value_;
        if (met) {
          value *= power_(depth_ - state(i));
        } else {
          if (state(i) <= listed_.low || state(i) > listed_.high) continue;
          n = n < 0 ? find(state(i)) : up_to(n, state(i));
          value = of(n, state(i));
          if (i == 0) meet(n);
        }
#pragma unroll
        for (int k = 0; k < kItems; ++k)
          if (k == i) x[k] = value;
      }
      if (listed_.low < lowest + shift) return alike;
      list();
    }
  }

 private:
  // The next nodes of the path. States up to the last of them are for the list after it, which begins with it: a step
  // into a node needs its parent.
  __device__ void list() {
    const TreeView& tree = a_.tree;
    __syncthreads();
    if (threadIdx.x == 0) {
      int n = 0;
      int64_t node = listed_.next;
#pragma unroll 1
      for (; node >= 0 && n < kNodes; node = tree.parent[node]) listed_.node[n++] = node;
      listed_.count = n;
      listed_.next = node < 0 ? -1 : listed_.node[n - 1];
      listed_.high = listed_.low;
      listed_.low = node < 0 ? -1 : static_cast<int>(tree.depth[listed_.next]);
    }
    __syncthreads();
    for (int n = threadIdx.x; n < listed_.count; n += kThreads) {
      const int64_t node = listed_.node[n], at = node * a_.channels + channel_;
      const auto depth = static_cast<int>(tree.depth[node]);
      double value = kFactor || !a_.values ? 0 : a_.values[at];
      if (a_.along) {
        const double factor = kFactor ? 1 : a_.factor[b_ * a_.channels + channel_];
        value += factor * power_(static_cast<int>(tree.length[b_]) - depth) * a_.along[at];
      }
      listed_.depth[n] = depth;
      listed_.value[n] = value;
    }
    __syncthreads();
  }

  // The node of a state: the last listed one whose depth is not below it, or the leaf. Or the same, from a node on.
  __device__ int find(int state) const {
    int n = 0;
#pragma unroll
    for (int half = kNodes / 2; half; half /= 2)
      if (n + half < listed_.count && listed_.depth[n + half] >= state) n += half;
    return n;
  }
  __device__ int up_to(int n, int state) const {
#pragma unroll 1
    while (n + 1 < listed_.count && listed_.depth[n + 1] >= state) ++n;
    return n;
  }

  __device__ double of(int n, int state) const {
    if (a_.at != At::step) return power_(listed_.depth[n] - state) * listed_.value[n];
    const bool enters = n + 1 < listed_.count && listed_.depth[n + 1] == state - 1;
    return enters ? listed_.value[n] - listed_.value[n + 1] : 0;
  }

  // Its tokens are alike but for the discount: those above its parent's depth, and of steps, above the one into it.
  __device__ void meet(int n) {
    const bool step = a_.at == At::step;
    depth_ = listed_.depth[n];
    value_ = step ? 0 : listed_.value[n];
    above_ = (n + 1 < listed_.count ? listed_.depth[n + 1] : -1) + step;
  }

  const NodeTokensArgs<T>& a_;
  const Powers& power_;
  Listed& listed_;
  const int64_t b_;
  const int channel_;
  int depth_, above_;  // of the node that the thread has met last
  double value_;
};

// Block (b, c + channels * k): part k of the tokens of row b in channel c. kHoles: masked tokens are skipped, otherwise
// they are states as well.
template <typename T, bool kHoles>
__global__ void __launch_bounds__(kThreads, kBlocks)
    nodes_to_tokens_kernel(const __grid_constant__ NodeTokensArgs<T> a) {
  __shared__ Listed listed;
  __shared__ Powers::Table table;
  const int channels = static_cast<int>(a.channels), c = blockIdx.y % channels;
  const int parts = gridDim.y / channels, part = blockIdx.y / channels;
  const int64_t b = blockIdx.x;
  const int first = static_cast<int>(a.tree.first[b]), length = static_cast<int>(a.tree.length[b]);
  const int size = static_cast<int>(a.rows.size(b));
  const uint8_t* mask = a.mask.row(a.rows, b);
  T* out = a.out.row(a.rows, b) + c * a.plane;
  const Stretch row = Stretch::of(0, size, [&](int t) { return aligned_with(out, mask, t); });
  const int tiles = row.tiles(), each = (tiles + parts - 1) / parts, from = part * each;
  const int to = from + each < tiles ? from + each : tiles;
  if (from >= to) return;
  const Powers power(a.gamma, table);
  PathValues<T, kHoles, false> values(a, b, c, power, listed);
  // Without its holes, a row has so many tokens up to the end of the tile.
  int before = !kHoles ? 0 : to == tiles ? length : count_valid(mask, row.tile_start(to));
  for (int k = to - 1; k >= from; --k) {
    const Tile tile = row.block_tile(k);
    const int number = static_cast<int>(tile.first) - first, lowest = row.tile_start(k) - first;  // of those that count
    unsigned valid = 0;
    double x[kItems] = {};
    bool alike = true;
    if constexpr (kHoles) {
      __shared__ Count warps[2][kWarps];
      valid = load_valid(mask, tile);
      Count total;
      const int own = scan_block(Count{__popc(valid)}, warps[k & 1], total).n;
      before -= total.n;
      alike = values.read(before + own, valid, before, x);
    } else if (lowest < length && lowest + kTile > 0) {
      valid = load_valid(mask, tile);
#pragma unroll
      for (int i = 0; i < kItems; ++i)
        if (number + i < 0 || number + i >= length) valid &= ~(1u << i);
      alike = values.read(number, valid, lowest > 0 ? lowest : 0, x);
    }
    const double base = a.base ? a.base[b * channels + c] : 0;
    T results[kItems];
    results[0] = static_cast<T>(x[0] + base);
#pragma unroll
    for (int i = 1; i < kItems; ++i) results[i] = alike ? results[0] : static_cast<T>(x[i] + base);
    store_items(out, tile, valid, results);
  }
}

// The gradients of a row's tokens [from, to), counted from its first, by `size` threads: visit(token, kItems gradients
// from there on, 0 where they do not count).
template <typename T, typename Visit>
__device__ void visit_gradients(const T* grad, const uint8_t* mask, int from, int to, int rank, int size, Visit visit) {
  const Stretch row = Stretch::of(from, to, [&](int t) { return aligned_with(grad, mask, t); });
  constexpr int kAhead = kInFlight / (kItems * sizeof(T));
  const int step = size * kItems;
  for (int at = row.start + rank * kItems; at < to;) {
    if (row.packs && at >= from && at + (kAhead - 1) * step + kItems <= to) {
      // All are there: several loads are in flight.
      Pack<T, kItems> packs[kAhead];
      unsigned valid[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k) packs[k] = *reinterpret_cast<const Pack<T, kItems>*>(grad + at + k * step);
#pragma unroll
      for (int k = 0; k < kAhead; ++k) valid[k] = load_valid(mask, Tile{from, to, at + k * step, true});
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
#pragma unroll
        for (int i = 0; i < kItems; ++i)
          if (!(valid[k] >> i & 1)) packs[k].at[i] = 0;
        visit(at, packs[k].at);
        at += step;
      }
    } else {
      const Tile tile = row.tile(at);
      T x[kItems];
      load_items(grad, tile, load_valid(mask, tile), T{0}, x);
      visit(at, x);
      at += step;
    }
  }
}

// Block (n, c): what the tokens whose state lies in node n send to it in channel c, over its rows. As many rows at
// once as there are, by as many threads each as that leaves, or a warp where tokens are many. (Blocks of nodes that
// many rows share have much to read, so rather fewer of them at once, with more in flight each.)
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks - 1)
    nodes_backward_kernel(const __grid_constant__ NodeTokensArgs<T> a) {
  __shared__ Powers::Table table;
  const TreeView& tree = a.tree;
  const int64_t n = blockIdx.x, c = blockIdx.y;
  const auto depth = static_cast<int>(tree.depth[n]);
  if (depth < 0) return;
  const Powers power(a.gamma, table);
  __syncthreads();
  const int64_t begin = tree.begin[n], end = tree.end[n];
  const int above = static_cast<int>(tree.parent_depth(n)), shift = shift_of(a.at);
  const int from = above + 1 > shift ? above + 1 - shift : 0, behind = depth + 1 - shift;
  int size = kThreads;
  while (size > 1 && size * (end - begin) > kThreads) size /= 2;
  while (a.at != At::step && size < kWarp && size * kItems < behind - from) size *= 2;
  const int rank = static_cast<int>(threadIdx.x) % size, team = static_cast<int>(threadIdx.x) / size;
  double sum = 0, weighed = 0;
  for (int64_t p = begin + team; p < end; p += kThreads / size) {
    const int64_t row = tree.order[p], leaf = tree.leaf[row];
    const auto span = static_cast<int>(tree.length[row]);
    if (tree.depth[leaf] < depth) continue;  // the leaf was moved above the node
    const T* grad = a.grad.row(a.rows, row) + c * a.plane + tree.first[row];
    const uint8_t* mask = a.mask.row(a.rows, row);
    if (mask) mask += tree.first[row];
    double sent = 0;
    if (a.at != At::step) {
      const int to = leaf == n || behind > span ? span : behind;
      visit_gradients(grad, mask, from, to, rank, size, [&](int t, const T(&x)[kItems]) {
        int left = depth - shift - (t + kItems - 1);
        double factor = power(left);
#pragma unroll
        for (int i = kItems - 1; i >= 0; --i, ++left) {
          sent += factor * static_cast<double>(x[i]);
          if (left >= 0) factor *= a.gamma;
        }
      });
    } else if (rank == 0) {
      // The token that enters the node, and the one that leaves it.
      if (above >= 0 && (!mask || mask[above])) sent += static_cast<double>(grad[above]);
      if (leaf != n && (!mask || mask[depth])) sent -= static_cast<double>(grad[depth]);
    }
    sum += sent;
    if (a.along) weighed += a.factor[row * a.channels + c] * power(span - depth) * sent;
  }
  sum = over_block(sum, Sum());
  if (a.along) weighed = over_block(weighed, Sum());
  if (threadIdx.x != 0) return;
  if (a.grad_values) a.grad_values[n * a.channels + c] = sum;
  if (a.grad_along) a.grad_along[n * a.channels + c] = weighed;
}

// Block (b, c): what the tokens of row b send to its base and its factor in channel c.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks) rows_backward_kernel(const __grid_constant__ NodeTokensArgs<T> a) {
  __shared__ Listed listed;
  __shared__ Powers::Table table;
  const int64_t b = blockIdx.x, c = blockIdx.y, first = a.tree.first[b];
  const uint8_t* mask = a.mask.row(a.rows, b);
  if (mask) mask += first;
  const T* grad = a.grad.row(a.rows, b) + c * a.plane + first;
  const int length = static_cast<int>(a.tree.length[b]);
  const Stretch row = Stretch::of(0, length, [&](int t) { return aligned_with(grad, mask, t); });
  const Powers power(a.gamma, table);
  PathValues<T, false, true> values(a, b, blockIdx.y, power, listed);
  double plain = 0, scaled = 0;
  for (int k = row.tiles() - 1; k >= 0; --k) {
    const Tile tile = row.block_tile(k);
    const unsigned valid = load_valid(mask, tile);
    T up[kItems];
    load_items(grad, tile, valid, T{0}, up);
#pragma unroll
    for (int i = 0; i < kItems; ++i) plain += static_cast<double>(up[i]);
    if (!a.grad_factor) continue;
    const int lowest = row.tile_start(k);
    double x[kItems];
    values.read(static_cast<int>(tile.first), valid, lowest > 0 ? lowest : 0, x);
#pragma unroll
    for (int i = 0; i < kItems; ++i)
      if (valid >> i & 1) scaled += static_cast<double>(up[i]) * x[i];
  }
  plain = over_block(plain, Sum());
  if (a.grad_factor) scaled = over_block(scaled, Sum());
  if (threadIdx.x != 0) return;
  if (a.grad_base) a.grad_base[b * a.channels + c] = plain;
  if (a.grad_factor) a.grad_factor[b * a.channels + c] = scaled;
}

}  // namespace rewardops::cuda::trees
