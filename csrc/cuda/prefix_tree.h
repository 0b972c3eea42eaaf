// Prefix trees on the GPU: the tree of each group of rows, common prefixes, and values of its nodes on the tokens.
#pragma once

#include "rewardops/prefix_tree.h"

namespace rewardops::cuda {

// Sorts rows by label. Each row is compared with all others, which suits batches of some thousands. `out` is [3, B],
// the arrays of a ByLabel.
void rows_by_label(const int64_t* groups, int64_t batch, int64_t* out, void* stream);

// Work space: codes [B]; moved, as many elements as `a.tokens` has, if rows skip masked tokens.
template <typename Token>
void prefix_tree(const PrefixTreeArgs<Token>& a, const ByLabel& groups, int64_t* codes, Token* moved, void* stream);

void prefix_lcp(const PrefixLcpArgs& a, const ByLabel& groups, void* stream);

template <typename T>
void nodes_to_tokens(const NodeTokensArgs<T>& a, void* stream);
// Work space: moved, as many elements as the gradient has, if rows skip masked tokens.
template <typename T>
void nodes_to_tokens_backward(const NodeTokensArgs<T>& a, T* moved, void* stream);

}  // namespace rewardops::cuda
