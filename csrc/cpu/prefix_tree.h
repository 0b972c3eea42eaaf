// The prefix tree of each group of rows, sums over its subtrees, and values of its nodes on the tokens.
#pragma once

#include <cmath>

#include "rewardops/prefix_tree.h"

namespace rewardops::cpu {

// gamma^n, without rounding for gamma = 1.
inline double discount(double gamma, int64_t n) { return gamma == 1.0 ? 1.0 : std::pow(gamma, static_cast<double>(n)); }

template <typename Token>
void prefix_tree(const PrefixTreeArgs<Token>& a, int threads);

void prefix_lcp(const PrefixLcpArgs& a, int threads);

void subtree_statistics(const SubtreeArgs& a, int threads);
void subtree_statistics_backward(const SubtreeArgs& a, int threads);

// ---- tree_tokens.cpp ----------------------------------------------------------------------------------------

template <typename T>
void nodes_to_tokens(const NodeTokensArgs<T>& a, int threads);
template <typename T>
void nodes_to_tokens_backward(const NodeTokensArgs<T>& a, int threads);

}  // namespace rewardops::cpu
