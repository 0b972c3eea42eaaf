// The prefix tree of each group of rows, sums over its subtrees, and values of its nodes on the tokens.
#pragma once

#include "rewardops/prefix_tree.h"

namespace rewardops::cpu {

template <typename Token>
void prefix_tree(const PrefixTreeArgs<Token>& a, int threads);

void prefix_lcp(const PrefixLcpArgs& a, int threads);

void subtree_sums(const SubtreeArgs& a, int threads);
void subtree_sums_backward(const SubtreeArgs& a, int threads);

template <typename T>
void nodes_to_tokens(const NodeTokensArgs<T>& a, int threads);
template <typename T>
void nodes_to_tokens_backward(const NodeTokensArgs<T>& a, int threads);

}  // namespace rewardops::cpu
