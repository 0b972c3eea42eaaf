// Values of nodes of a prefix tree written to tokens, and the gradients.
//
// Contract: as nodes_to_tokens and nodes_to_tokens_backward of rewardops/reference/prefix_tree.py; sums in double and
// in an order that depends on the tree alone.
//
// Bytes, for B = 1024 rows of T = 8192: mask 1 and token 4 each, 42 MB, 9.8 us at 4.3 TB/s; the same backward.
//
// Why not Triton: here the nodes of a row's path are listed once in shared memory, and not walked for every block of
// its tokens.
#pragma once

#include "rewardops/cuda/prefix_tree.cuh"

namespace rewardops::cuda::trees {

constexpr int kNodes = 64;     // nodes of a path at once
constexpr int kInFlight = 64;  // bytes of gradients that a thread loads at once

// ---- values along a path -----------------------------------------------------------------------------------

// Powers of gamma, as products of two or three entries of a table. They are cheap, and depend on the exponent alone, so
// that the values of rows that share a prefix have the same bits, wherever their tokens lie. Exponents below 0 count as
// 0.
class Powers {
 public:
  static constexpr int kEach = 256;
  struct Table {
    double low[kEach], high[kEach + 1];
  };

  // Called by all threads of the block; a barrier must follow before the first power.
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
  // Neighbouring lanes are kItems tokens apart: their numbers lie in neighbouring banks.
  __device__ static int slot(int k) { return k % kItems * (kEach / kItems) + k / kItems; }

  const Table& table_;
  bool one_;
};

// State s of a row is the prefix of its first s tokens; it belongs to token s - shift.
__device__ inline int shift_of(At at) { return at == At::before ? 0 : 1; }

// Consecutive nodes of a path, towards the root: those of the states (low, high].
struct PathWindow {
  double value[kNodes];
  int depth[kNodes];
  int64_t node[kNodes];
  int low, high;
  int64_t next;  // the first node of the next window; -1 where this one reaches the root
  int count;     // number of nodes
};

// Values of the tokens of the block's row b, from the nodes of its path. Tokens are read from the right to the left.
// kHoles: masked tokens are skipped, and tokens with neighbouring states may lie apart. kFactor: not the values but
// their derivatives in the row's factor.
template <typename T, bool kHoles, bool kFactor>
class PathValues {
 public:
  // Prepares one channel; called by all threads.
  __device__ PathValues(const NodeTokensArgs<T>& a, int64_t b, int channel, const Powers& power, PathWindow& window)
      : a_(a), power_(power), window_(window), b_(b), channel_(channel), depth_(0), above_(INT_MAX), value_(0) {
    if (threadIdx.x == 0) {
      window_.low = window_.high = INT_MAX;
      window_.next = a_.tree.leaf[b_];
      window_.count = 0;
    }
    __syncthreads();
  }

  // Computes x, the values of the thread's tokens. `first` is the number of the first one, counted from the row's first
  // valid token; with kHoles, only tokens of `valid` are counted. No token of any thread is below `lowest`. Returns
  // true if all values are x[0].
  __device__ bool read(int first, unsigned valid, int lowest, double (&x)[kItems]) {
    const int shift = shift_of(a_.at);
    const auto state = [&](int i) { return first + shift + (kHoles ? __popc(valid & ((1u << i) - 1)) : i); };
    // Most tokens lie in the thread's current node.
    const bool met = first + shift > above_, alike = met && (power_.one() || a_.at == At::step);
#pragma unroll
    for (int i = 0; i < kItems; ++i) x[i] = value_;
    while (true) {
      int n = -1;
      // Not unrolled, to save registers.
#pragma unroll 1
      for (int i = kItems - 1; i >= 0 && !alike; --i) {
        double value = value_;
        if (met) {
          value *= power_(depth_ - state(i));
        } else {
          if (state(i) <= window_.low || state(i) > window_.high) continue;
          n = n < 0 ? find(state(i)) : find_from(n, state(i));
          value = value_of(n, state(i));
          if (i == 0) remember(n);
        }
#pragma unroll
        for (int k = 0; k < kItems; ++k)
          if (k == i) x[k] = value;
      }
      if (window_.low < lowest + shift) return alike;
      advance();
    }
  }

 private:
  // Moves the window to the next nodes of the path. It ends above its last node, with which the next window begins
  // again: the value of a step into a node needs the node's parent.
  __device__ void advance() {
    const TreeView& tree = a_.tree;
    __syncthreads();
    if (threadIdx.x == 0) {
      int n = 0;
      int64_t node = window_.next;
#pragma unroll 1
      for (; node >= 0 && n < kNodes; node = tree.parent[node]) window_.node[n++] = node;
      window_.count = n;
      window_.next = node < 0 ? -1 : window_.node[n - 1];
      window_.high = window_.low;
      window_.low = node < 0 ? -1 : static_cast<int>(tree.depth[window_.next]);
    }
    __syncthreads();
    for (int n = threadIdx.x; n < window_.count; n += kThreads) {
      const int64_t node = window_.node[n], at = node * a_.channels + channel_;
      const auto depth = static_cast<int>(tree.depth[node]);
      double value = kFactor || !a_.values ? 0 : a_.values[at];
      if (a_.scaled_values) {
        const double factor = kFactor ? 1 : a_.row_factor[b_ * a_.channels + channel_];
        value += factor * power_(static_cast<int>(tree.length[b_]) - depth) * a_.scaled_values[at];
      }
      window_.depth[n] = depth;
      window_.value[n] = value;
    }
    __syncthreads();
  }

  // The node that a state lies in: the last one in the window whose depth is not below it, or the leaf. find_from: the
  // same, searched from node n of the window on.
  __device__ int find(int state) const {
    int n = 0;
#pragma unroll
    for (int half = kNodes / 2; half; half /= 2)
      if (n + half < window_.count && window_.depth[n + half] >= state) n += half;
    return n;
  }
  __device__ int find_from(int n, int state) const {
#pragma unroll 1
    while (n + 1 < window_.count && window_.depth[n + 1] >= state) ++n;
    return n;
  }

  __device__ double value_of(int n, int state) const {
    if (a_.at != At::step) return power_(window_.depth[n] - state) * window_.value[n];
    const bool enters = n + 1 < window_.count && window_.depth[n + 1] == state - 1;
    return enters ? window_.value[n] - window_.value[n + 1] : 0;
  }

  // Makes node n the current one, for the tokens to the left. But for the discount, the values of a node's tokens are
  // equal: those of the states above its parent's depth and, for steps, above the one into it.
  __device__ void remember(int n) {
    const bool step = a_.at == At::step;
    depth_ = window_.depth[n];
    value_ = step ? 0 : window_.value[n];
    above_ = (n + 1 < window_.count ? window_.depth[n + 1] : -1) + step;
  }

  const NodeTokensArgs<T>& a_;
  const Powers& power_;
  PathWindow& window_;
  const int64_t b_;
  const int channel_;
  int depth_, above_;  // of the current node: its last state, and the one in front of its first
  double value_;
};

// ---- values to tokens --------------------------------------------------------------------------------------

// The number of valid tokens, by the block.
__device__ inline int count_valid(const uint8_t* mask, int size) {
  const auto row = RowTiles<int>::of(0, size, kTile, [&](int t) { return aligned<kItems>(mask + t); });
  int count = 0;
  for (int k = 0; k < row.tiles(); ++k) count += __popc(load_valid(mask, row.tile(k)));
  return reduce_block(count, Add());
}

// Block (b, c + channels * k): part k of the tokens of row b in channel c. kHoles: masked tokens are skipped, otherwise
// they are states as well.
template <typename T, bool kHoles>
__global__ void __launch_bounds__(kThreads, kBlocks)
    nodes_to_tokens_kernel(const __grid_constant__ NodeTokensArgs<T> a) {
  __shared__ PathWindow window;
  __shared__ Powers::Table table;
  const int channels = static_cast<int>(a.channels), c = blockIdx.y % channels;
  const int parts = gridDim.y / channels, part = blockIdx.y / channels;
  const int64_t b = blockIdx.x;
  const int first = static_cast<int>(a.tree.first[b]), length = static_cast<int>(a.tree.length[b]);
  const int size = static_cast<int>(a.rows.size(b));
  const uint8_t* mask = a.mask.row(a.rows, b);
  T* out = a.out.row(a.rows, b) + c * a.plane;
  const auto row = RowTiles<int>::of(0, size, kTile, [&](int t) { return aligned_with(out, mask, t); });
  const int tiles = row.tiles(), each = (tiles + parts - 1) / parts, from = part * each;
  const int to = from + each < tiles ? from + each : tiles;
  if (from >= to) return;
  const Powers power(a.gamma, table);
  PathValues<T, kHoles, false> values(a, b, c, power, window);
  // The number of valid tokens in front of the tiles that are still to come.
  int before = !kHoles ? 0 : to == tiles ? length : count_valid(mask, row.tile_start(to));
  for (int k = to - 1; k >= from; --k) {
    const Tile tile = row.tile(k);
    const int number = static_cast<int>(tile.first) - first,
              lowest = row.tile_start(k) - first;  // among the valid tokens
    unsigned valid = 0;
    double x[kItems] = {};
    bool alike = true;
    if constexpr (kHoles) {
      __shared__ Count warps[2][kWarps];
      valid = load_valid(mask, tile);
      Count total;
      const int in_front = scan_block(Count{__popc(valid)}, warps[k & 1], total).n;
      before -= total.n;
      alike = values.read(before + in_front, valid, before, x);
    } else if (lowest < length && lowest + kTile > 0) {
      valid = load_valid(mask, tile);
#pragma unroll
      for (int i = 0; i < kItems; ++i)
        if (number + i < 0 || number + i >= length) valid &= ~(1u << i);
      alike = values.read(number, valid, lowest > 0 ? lowest : 0, x);
    }
    const double base = a.row_bias ? a.row_bias[b * channels + c] : 0;
    T results[kItems];
    results[0] = static_cast<T>(x[0] + base);
#pragma unroll
    for (int i = 1; i < kItems; ++i) results[i] = alike ? results[0] : static_cast<T>(x[i] + base);
    store_items(out, tile, valid, results);
  }
}

// ---- gradients ---------------------------------------------------------------------------------------------

// Visits the gradients of a row's tokens [from, to) by `size` threads, this one with number `rank`: visit(t, x) with
// the gradients x of the kItems tokens from t on, 0 for masked ones and those out of range. Tokens are counted from the
// row's first valid one.
template <typename T, typename Visit>
__device__ void visit_gradients(const T* grad, const uint8_t* mask, int from, int to, int rank, int size, Visit visit) {
  const auto row = RowTiles<int>::of(from, to, size * kItems, [&](int t) { return aligned_with(grad, mask, t); });
  constexpr int kAhead = kInFlight / (kItems * sizeof(T));
  const int step = size * kItems;
  for (int at = row.start + rank * kItems; at < to;) {
    if (row.packs && at >= from && at + (kAhead - 1) * step + kItems <= to) {
      // All tokens exist: several loads are in flight.
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
      const Tile tile = row.items(at);
      T x[kItems];
      load_items(grad, tile, load_valid(mask, tile), T{0}, x);
      visit(at, x);
      at += step;
    }
  }
}

// Block (n, c): gradient of node n, channel c: sum over the tokens of its rows whose state lies in n. The block's
// threads are divided evenly among its rows, at most a row a thread; a row of many tokens has at least a warp. (Blocks
// of nodes that many rows share read much: fewer blocks at once, with more loads in flight each.)
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
  double sum = 0, weighted = 0;
  for (int64_t p = begin + team; p < end; p += kThreads / size) {
    const int64_t row = tree.order[p], leaf = tree.leaf[row];
    const auto span = static_cast<int>(tree.length[row]);
    if (tree.depth[leaf] < depth) continue;  // the leaf was moved above the node
    const T* grad = a.grad.row(a.rows, row) + c * a.plane + tree.first[row];
    const uint8_t* mask = a.mask.row(a.rows, row);
    if (mask) mask += tree.first[row];
    double of_row = 0;
    if (a.at != At::step) {
      const int to = leaf == n || behind > span ? span : behind;
      visit_gradients(grad, mask, from, to, rank, size, [&](int t, const T(&x)[kItems]) {
        int left = depth - shift - (t + kItems - 1);
        double factor = power(left);
#pragma unroll
        for (int i = kItems - 1; i >= 0; --i, ++left) {
          of_row += factor * static_cast<double>(x[i]);
          if (left >= 0) factor *= a.gamma;
        }
      });
    } else if (rank == 0) {
      // The token that enters the node, and the one that leaves it.
      if (above >= 0 && (!mask || mask[above])) of_row += static_cast<double>(grad[above]);
      if (leaf != n && (!mask || mask[depth])) of_row -= static_cast<double>(grad[depth]);
    }
    sum += of_row;
    if (a.scaled_values) weighted += a.row_factor[row * a.channels + c] * power(span - depth) * of_row;
  }
  sum = reduce_block(sum, Add());
  if (a.scaled_values) weighted = reduce_block(weighted, Add());
  if (threadIdx.x != 0) return;
  if (a.grad_values) a.grad_values[n * a.channels + c] = sum;
  if (a.grad_scaled) a.grad_scaled[n * a.channels + c] = weighted;
}

// Block (b, c): gradients of the base and the factor of row b, channel c: sums over the row's tokens.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks) rows_backward_kernel(const __grid_constant__ NodeTokensArgs<T> a) {
  __shared__ PathWindow window;
  __shared__ Powers::Table table;
  const int64_t b = blockIdx.x, c = blockIdx.y, first = a.tree.first[b];
  const uint8_t* mask = a.mask.row(a.rows, b);
  if (mask) mask += first;
  const T* grad = a.grad.row(a.rows, b) + c * a.plane + first;
  const int length = static_cast<int>(a.tree.length[b]);
  const auto row = RowTiles<int>::of(0, length, kTile, [&](int t) { return aligned_with(grad, mask, t); });
  const Powers power(a.gamma, table);
  PathValues<T, false, true> values(a, b, blockIdx.y, power, window);
  double plain = 0, scaled = 0;
  for (int k = row.tiles() - 1; k >= 0; --k) {
    const Tile tile = row.tile(k);
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
  plain = reduce_block(plain, Add());
  if (a.grad_factor) scaled = reduce_block(scaled, Add());
  if (threadIdx.x != 0) return;
  if (a.grad_bias) a.grad_bias[b * a.channels + c] = plain;
  if (a.grad_factor) a.grad_factor[b * a.channels + c] = scaled;
}

}  // namespace rewardops::cuda::trees
