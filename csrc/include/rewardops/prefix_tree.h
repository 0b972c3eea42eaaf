// Prefix trees as arrays, and the arguments of their kernels, on every device.
#pragma once

#include <cstdint>

#include "rewardops/rows.h"

namespace rewardops {

// Of fixed size, whatever the tokens: position p holds row order[p], groups by label and rows in lexicographic
// order; node p < batch is the prefix at which the rows at p - 1 and p part, if it is the first such place of
// its rows, and node batch + p is what row order[p] shares with no row. A node holds the rows at the positions
// [begin, end) and its states reach from behind its parent's depth to its own; depth is -1 for no node.
template <typename I>
struct Tree {
  int64_t batch;
  I *order, *leaf, *first, *length;  // per row but `order`; leaf is a row's deepest node, -1 for an empty row
  I *shared;                         // per position: with the row before it; -1 at the first of a group
  I *begin, *end, *depth, *parent;   // per node

  REWARDOPS_BOTH int64_t nodes() const { return 2 * batch; }
  REWARDOPS_BOTH int64_t parent_depth(int64_t node) const { return parent[node] < 0 ? -1 : depth[parent[node]]; }
};
using MutableTree = Tree<int64_t>;
using TreeView = Tree<const int64_t>;

template <typename Token>
struct PrefixTreeArgs {
  Rows rows;
  Tokens<const uint8_t> mask;
  Tokens<const Token> tokens;
  const int64_t* groups;  // [B]
  MutableTree tree;
  bool skip;  // a row is its valid tokens only, not all from the first to the last
};

// Rows by label, those of a group ascending: the group of row b is rows[begin[b]], ..., rows[end[b] - 1]. On a GPU,
// where it is a kernel's work to find it, part of the arguments.
struct ByLabel {
  const int64_t *rows, *begin, *end;
};

// Per row, the members of its group in ascending order and what it shares with them; -1 behind the last.
struct PrefixLcpArgs {
  TreeView tree;
  const int64_t* groups;
  int64_t most;            // entries of a row; the members behind them are left out
  int32_t *members, *lcp;  // [B, most]
};

// Over a node's rows: the sum of weight * gamma^(length - depth) * x, or of weight * (x - centre)^2.
struct SubtreeArgs {
  TreeView tree;
  int64_t channels;
  const double* x;        // [B, C]
  const double* weights;  // [B], or null for ones
  const double* centre;   // [2B, C], or null
  double gamma;
  double* out;            // [2B, C]; forward only
  const double* grad;     // [2B, C]; backward only
  double *grad_x, *grad_weights;  // [B, C] and, or null, [B]; backward only
};

// The state of a token is the prefix up to and including it (after) or without it (before); step is the
// difference of the two.
enum class At : int { after = 0, before = 1, step = 2 };

// base + gamma^(depth - state) * (values + factor * gamma^(length - depth) * along), of the row and of the state's
// node: what a node says is discounted from its depth, what a row brings from its end. Behind the depth of the
// row's leaf, which the caller may have moved towards the root, the value is held.
template <typename T>
struct NodeTokensArgs {
  TreeView tree;
  Rows rows;
  Tokens<const uint8_t> mask;
  int64_t channels, plane;      // elements between the channels of a per-token array
  const double *values, *along;  // [2B, C]; values or both along and factor may be null
  const double *base, *factor;   // [B, C]; base may be null
  At at;
  double gamma;
  bool skip;
  Tokens<T> out;                // forward only
  Tokens<const T> grad;         // backward only
  double *grad_values, *grad_along, *grad_base, *grad_factor;  // backward only; null where not given
};

}  // namespace rewardops
