#include "cuda/prefix_tree.h"

#include <algorithm>
#include <type_traits>

#include "cuda/launch.h"
#include "rewardops/cuda/tree_tokens.cuh"

namespace rewardops::cuda {
namespace {

using namespace trees;

constexpr int64_t kMostY = 65535;  // length of a grid's second dimension, at most

int64_t quotient_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

Grid block_for_each(int64_t count, int64_t y = 1) { return {count, static_cast<unsigned>(y), kThreads}; }
Grid warp_for_each(int64_t count) { return {quotient_up(count, kWarps), 1, kThreads}; }

// The valid tokens of each row, moved to its front in the array `moved`.
template <typename T>
Tokens<T> move_to_front(const Rows& rows, const Tokens<const uint8_t>& mask, const Tokens<const T>& tokens, T* moved,
                        int64_t channels, int64_t plane, int64_t* first, int64_t* length, void* stream) {
  using Word = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  const Tokens<T> to{moved, rows.cu ? 0 : rows.width};
  const WithoutHoles<Word> a{rows,
                             mask,
                             {reinterpret_cast<const Word*>(tokens.data), tokens.stride},
                             {reinterpret_cast<Word*>(to.data), to.stride},
                             plane,
                             first,
                             length};
  launch("without_holes", without_holes_kernel<Word>, block_for_each(rows.batch, channels), stream, a);
  return to;
}

}  // namespace

void rows_by_label(const int64_t* groups, int64_t batch, int64_t* out, void* stream) {
  launch("rows_by_label", by_label_kernel, warp_for_each(batch), stream, groups, batch, out, out + batch,
         out + 2 * batch);
}

template <typename Token>
void prefix_tree(const PrefixTreeArgs<Token>& args, const ByLabel& groups, int64_t* codes, Token* moved, void* stream) {
  PrefixTreeArgs<Token> a = args;
  a.skip = a.skip && a.mask.data;
  if (a.skip) {
    const auto front = move_to_front(a.rows, a.mask, a.tokens, moved, 1, 0, a.tree.first, a.tree.length, stream);
    a.tokens = {front.data, front.stride};
  }
  launch("prefix_tree rows", rows_kernel<Token>, block_for_each(a.rows.batch), stream, a, groups, codes);
  launch("prefix_tree places", places_kernel<Token>, block_for_each(a.rows.batch), stream, a, groups, codes);
  launch("prefix_tree nodes", nodes_kernel, warp_for_each(a.rows.batch), stream, a.tree);
}

void prefix_lcp(const PrefixLcpArgs& a, const ByLabel& groups, void* stream) {
  launch("prefix_lcp", prefix_lcp_kernel, warp_for_each(a.tree.batch), stream, a, groups);
}

template <typename T>
void nodes_to_tokens(const NodeTokensArgs<T>& a, void* stream) {
  if (a.rows.batch == 0 || a.channels == 0) return;
  // Rows are cut into parts where rows alone are too few for the device.
  const int64_t wanted = int64_t{8} * attribute(cudaDevAttrMultiProcessorCount);
  const int64_t longest = a.rows.cu ? a.rows.total : a.rows.width;
  const int64_t most = std::max<int64_t>(1, std::min(longest / kTile, kMostY / a.channels));
  const int64_t parts = std::min(quotient_up(wanted, a.rows.batch * a.channels), most);
  const auto kernel = a.skip && a.mask.data ? nodes_to_tokens_kernel<T, true> : nodes_to_tokens_kernel<T, false>;
  launch("nodes_to_tokens", kernel, block_for_each(a.rows.batch, parts * a.channels), stream, a);
}

template <typename T>
void nodes_to_tokens_backward(const NodeTokensArgs<T>& args, T* moved, void* stream) {
  NodeTokensArgs<T> a = args;
  if (a.skip && a.mask.data) {
    const auto front = move_to_front(a.rows, a.mask, a.grad, moved, a.channels, a.plane, nullptr, nullptr, stream);
    a.grad = {front.data, front.stride};
    a.mask = {};
  }
  launch("nodes_to_tokens_backward nodes", nodes_backward_kernel<T>, block_for_each(a.tree.nodes(), a.channels), stream,
         a);
  if (a.grad_bias || a.grad_factor)
    launch("nodes_to_tokens_backward rows", rows_backward_kernel<T>, block_for_each(a.rows.batch, a.channels), stream,
           a);
}

template void prefix_tree<int32_t>(const PrefixTreeArgs<int32_t>&, const ByLabel&, int64_t*, int32_t*, void*);
template void prefix_tree<int64_t>(const PrefixTreeArgs<int64_t>&, const ByLabel&, int64_t*, int64_t*, void*);
template void nodes_to_tokens<float>(const NodeTokensArgs<float>&, void*);
template void nodes_to_tokens<double>(const NodeTokensArgs<double>&, void*);
template void nodes_to_tokens<int32_t>(const NodeTokensArgs<int32_t>&, void*);
template void nodes_to_tokens_backward<float>(const NodeTokensArgs<float>&, float*, void*);
template void nodes_to_tokens_backward<double>(const NodeTokensArgs<double>&, double*, void*);

}  // namespace rewardops::cuda
