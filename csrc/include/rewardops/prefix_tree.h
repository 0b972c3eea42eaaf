// Prefix trees as arrays, and the arguments of their kernels, on every device.
#pragma once

#include <cstdint>

#include "rewardops/rows.h"

namespace rewardops {

// A tree of fixed size, whatever the tokens. Position p holds row order[p]: groups by label, then rows in lexicographic
// order. Node p < batch is the prefix at which the rows at p - 1 and p diverge, if p is the first such place of the
// node's rows. Node batch + p holds the tokens that row order[p] shares with no other row. The rows of a node are at
// the positions [begin, end). Its states are the prefixes longer than its parent's depth, up to its own; depth is -1
// where there is no node.
template <typename I>
struct Tree {
  int64_t batch;
  I* order;                         // [B], per position: its row
  I *leaf, *first, *length;         // [B], per row: the deepest node (-1 for an empty row), first token, tokens
  I* shared;                        // [B], per position: tokens shared with the row before it; -1 at the group's first
  I *begin, *end, *depth, *parent;  // [2B], per node; parent is -1 at a root

  REWARDOPS_BOTH int64_t nodes() const { return 2 * batch; }
  REWARDOPS_BOTH int64_t parent_depth(int64_t node) const { return parent[node] < 0 ? -1 : depth[parent[node]]; }
};
using MutableTree = Tree<int64_t>;
using TreeView = Tree<const int64_t>;

template <typename Token>
struct PrefixTreeArgs {
  Tokens<const Token> tokens;  // [tokens]
  const int64_t* groups;       // [B], labels
  Tokens<const uint8_t> mask;  // [tokens]; null: every token is valid
  Rows rows;
  bool skip;         // a row is its valid tokens alone, not all from its first to its last valid one
  MutableTree tree;  // out
};

// Rows by label, ascending within a group: the group of row b is rows[begin[b]], ..., rows[end[b] - 1]. On GPUs
// this is an argument, which a separate kernel computes.
struct ByLabel {
  const int64_t *rows, *begin, *end;  // [B]
};

// Per row, the members of its group in ascending order and the length of the prefix it shares with each; -1 after the
// last.
struct PrefixLcpArgs {
  TreeView tree;
  const int64_t* groups;   // [B], labels
  int64_t most;            // entries per row; further members are left out
  int32_t *members, *lcp;  // [B, most], out
};

enum class Statistic : int { sum = 0, mean = 1, std = 2 };

// A statistic of a node's rows: the sum of weight * gamma^(length - depth) * x, that sum over the total weight, or the
// standard deviation, for which gamma is 1.
struct SubtreeArgs {
  const double* x;        // [B, C]
  const double* weights;  // [B]; null for ones
  TreeView tree;
  double gamma;
  Statistic statistic;
  int64_t ddof;
  int64_t channels;      // C
  double* out;           // [2B, C]; these three are results of the forward pass, and inputs of the backward pass
  double* total;         // [2B], weights of the rows
  double* centre;        // [2B, C], the mean
  const double* grad;    // backward: [2B, C]; null in the forward pass
  double* grad_x;        // backward: [B, C]
  double* grad_weights;  // backward: [B]; may be null
};

// The state of a token: the prefix up to and including it (after), or without it (before). step: the value after minus
// the value before.
enum class At : int { after = 0, before = 1, step = 2 };

// Values of tokens: row_bias + gamma^(depth - state) * (values + row_factor * gamma^(length - depth) * scaled_values),
// for the token's row and the node of its state. A node's value is discounted from the node's depth, a row's from the
// row's end. Beyond the depth of the row's leaf, which the caller may have moved towards the root, the value stays the
// same.
template <typename T>
struct NodeTokensArgs {
  const double *values, *scaled_values;  // [2B, C]; values may be null, scaled_values and row_factor together
  const double *row_bias, *row_factor;   // [B, C]; row_bias may be null
  TreeView tree;
  Tokens<const uint8_t> mask;  // [tokens]; null: every token is valid
  Rows rows;
  bool skip;  // same as in PrefixTreeArgs
  At at;
  double gamma;
  int64_t channels;                   // C
  int64_t plane;                      // elements between the channels of a per-token array
  Tokens<T> out;                      // forward: [C, tokens]
  Tokens<const T> grad;               // backward: [C, tokens]
  double *grad_values, *grad_scaled;  // backward: [2B, C]; either may be null
  double *grad_bias, *grad_factor;    // backward: [B, C]; either may be null
};

}  // namespace rewardops
