// Prefix trees on the GPU: the tree of each group of rows, common prefixes, and values of its nodes on the tokens.
#pragma once

#include "rewardops/prefix_tree.h"

namespace rewardops::cuda {

// Rows by label, each looking at all labels: for batches of some thousand. `out` is [3, B], the members of a ByLabel.
void rows_by_label(const int64_t* groups, int64_t batch, int64_t* out, void* stream);

// codes: [B], to work in; moved: as many tokens as there are, for rows that skip masked ones.
template <typename Token>
void prefix_tree(const PrefixTreeArgs<Token>& a, const ByLabel& groups, int64_t* codes, Token* moved, void* stream);

void prefix_lcp(const PrefixLcpArgs& a, const ByLabel& groups, void* stream);

template <typename T>
void nodes_to_tokens(const NodeTokensArgs<T>& a, void* stream);
// moved: as much as the gradient, for rows that skip masked tokens.
template <typename T>
void nodes_to_tokens_backward(const NodeTokensArgs<T>& a, T* moved, void* stream);

}  // namespace rewardops::cuda
