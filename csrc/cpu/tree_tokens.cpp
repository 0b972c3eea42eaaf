// Values of prefix-tree nodes on the tokens of their rows, and the gradients back.
#include <algorithm>
#include <cstring>
#include <vector>

#include "parallel.h"
#include "prefix_tree.h"

namespace rewardops::cpu {
namespace {

struct Span {
  int64_t from, to;  // tokens, counted from the row's first
};

// The tokens of a row whose state lies in a node. None if the row's leaf was moved above the node.
Span span_of(const TreeView& tree, int64_t row, int64_t n, At at) {
  const int64_t shift = at == At::before ? 0 : 1;  // state s is that of token s - shift
  if (tree.depth[n] > tree.depth[tree.leaf[row]]) return {0, 0};
  const int64_t low = tree.parent_depth(n) + 1;
  const int64_t high = tree.leaf[row] == n ? tree.length[row] : tree.depth[n];
  return {std::max<int64_t>(low - shift, 0), std::min(high + 1 - shift, tree.length[row])};
}

// The value of a node for one row: the value of the node, plus the value of the row discounted from the row's end.
template <typename T>
double value_of(const NodeTokensArgs<T>& a, int64_t row, int64_t n, int64_t c) {
  double value = a.values ? a.values[n * a.channels + c] : 0.0;
  if (a.scaled_values)
    value += a.row_factor[row * a.channels + c] * discount(a.gamma, a.tree.length[row] - a.tree.depth[n]) *
             a.scaled_values[n * a.channels + c];
  return value;
}

// gamma^(depth - state) for the states of a span, from its last token to its first: visit(token, factor).
template <typename Visit>
void discounted(const TreeView& tree, int64_t n, const Span& span, At at, double gamma, Visit visit) {
  const int64_t shift = at == At::before ? 0 : 1;
  double factor = 1;
  for (int64_t t = span.to - 1; t >= span.from; --t) {
    const int64_t left = tree.depth[n] - t - shift;
    if (left > 0) factor = t == span.to - 1 ? discount(gamma, left) : factor * gamma;
    visit(t, factor);
  }
}

}  // namespace

template <typename T>
void nodes_to_tokens(const NodeTokensArgs<T>& a, int threads) {
  const TreeView& tree = a.tree;
  const int64_t channels = a.channels;
  parallel_for(a.rows.batch, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t width = a.rows.size(b), first = tree.first[b], length = tree.length[b];
      const uint8_t* mask = a.mask.row(a.rows, b);
      // The valid tokens' values are written to the front of the row first, then moved to their places.
      const bool moved = a.skip && mask && length > 0 && std::memchr(mask, 0, length);
      const bool holes = !a.skip && mask && length > 0 && std::memchr(mask + first, 0, length);
      for (int64_t c = 0; c < channels; ++c) {
        T* const row = a.out.row(a.rows, b) + c * a.plane;
        T* const out = row + first;
        std::fill(row, out, T{0});
        std::fill(out + length, row + width, T{0});
        if (length == 0) continue;
        const double base = a.row_bias ? a.row_bias[b * channels + c] : 0.0;
        if (a.at == At::step) std::fill(out, out + length, static_cast<T>(base));
        for (int64_t n = tree.leaf[b]; n >= 0; n = tree.parent[n]) {
          const double value = value_of(a, b, n, c);
          if (a.at == At::step) {
            const int64_t up = tree.parent[n];
            if (up >= 0) out[tree.depth[up]] = static_cast<T>(base + (value - value_of(a, b, up, c)));
            continue;
          }
          const Span span = span_of(tree, b, n, a.at);
          if (a.gamma == 1.0) {
            std::fill(out + span.from, out + std::max(span.from, span.to), static_cast<T>(base + value));
          } else {
            discounted(tree, n, span, a.at, a.gamma,
                       [&](int64_t t, double factor) { out[t] = static_cast<T>(base + factor * value); });
          }
        }
        if (holes)
          for (int64_t t = 0; t < length; ++t) out[t] = mask[first + t] ? out[t] : T{0};
        if (moved)
          for (int64_t t = width - 1, k = length; t >= 0; --t) row[t] = mask[t] ? row[--k] : T{0};
      }
    }
  });
}

template <typename T>
void nodes_to_tokens_backward(const NodeTokensArgs<T>& args, int threads) {
  NodeTokensArgs<T> a = args;
  std::vector<T> moved;
  if (a.skip && a.mask.data) {
    moved.resize(static_cast<size_t>(a.channels * a.plane));
    Tokens<T> front{moved.data(), a.grad.stride};
    parallel_for(a.rows.batch, 1, threads, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b)
        for (int64_t c = 0; c < a.channels; ++c) {
          const uint8_t* mask = a.mask.row(a.rows, b);
          const T* from = a.grad.row(a.rows, b) + c * a.plane;
          T* to = front.row(a.rows, b) + c * a.plane;
          for (int64_t t = 0; t < a.rows.size(b); ++t)
            if (mask[t]) *to++ = from[t];
        }
    });
    a.grad = {moved.data(), a.grad.stride};
    a.mask = {};
  }
  const TreeView& tree = a.tree;
  const int64_t channels = a.channels;
  // Gradient of a node from the tokens of one row: the discounted sum of their upstream gradients.
  const auto from_row = [&](int64_t row, int64_t n, int64_t c) {
    const uint8_t* mask = a.mask.row(a.rows, row);
    const T* grad = a.grad.row(a.rows, row) + c * a.plane + tree.first[row];
    if (mask) mask += tree.first[row];
    double sum = 0;
    if (a.at == At::step) {
      const int64_t enters = tree.parent_depth(n), leaves = tree.depth[n];
      if (tree.depth[n] > tree.depth[tree.leaf[row]]) return 0.0;
      if (enters >= 0 && (!mask || mask[enters])) sum += grad[enters];
      if (tree.leaf[row] != n && (!mask || mask[leaves])) sum -= grad[leaves];
      return sum;
    }
    const Span span = span_of(tree, row, n, a.at);
    if (a.gamma == 1.0) {
      for (int64_t t = span.from; t < span.to; ++t) sum += mask && !mask[t] ? T{0} : grad[t];
    } else {
      discounted(tree, n, span, a.at, a.gamma,
                 [&](int64_t t, double factor) { sum += mask && !mask[t] ? 0.0 : factor * grad[t]; });
    }
    return sum;
  };
  parallel_for(tree.nodes(), 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t c = 0; c < channels; ++c) {
        double values = 0, along = 0;
        for (int64_t p = tree.begin[n]; p < tree.end[n]; ++p) {
          const int64_t row = tree.order[p];
          const double sum = from_row(row, n, c);
          values += sum;
          if (a.scaled_values)
            along += a.row_factor[row * channels + c] * discount(a.gamma, tree.length[row] - tree.depth[n]) * sum;
        }
        if (a.grad_values) a.grad_values[n * channels + c] = values;
        if (a.grad_scaled) a.grad_scaled[n * channels + c] = along;
      }
    }
  });
  if (!a.grad_bias && !a.grad_factor) return;
  parallel_for(a.rows.batch, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const uint8_t* mask = a.mask.row(a.rows, b);
      const int64_t first = tree.first[b], length = tree.length[b];
      for (int64_t c = 0; c < channels; ++c) {
        if (a.grad_bias) {
          const T* grad = a.grad.row(a.rows, b) + c * a.plane;
          double sum = 0;
          for (int64_t t = first; t < first + length; ++t) sum += mask && !mask[t] ? T{0} : grad[t];
          a.grad_bias[b * channels + c] = sum;
        }
        if (a.grad_factor) {
          double sum = 0;
          for (int64_t n = tree.leaf[b]; n >= 0; n = tree.parent[n])
            sum += discount(a.gamma, length - tree.depth[n]) * a.scaled_values[n * channels + c] * from_row(b, n, c);
          a.grad_factor[b * channels + c] = sum;
        }
      }
    }
  });
}

template void nodes_to_tokens<int32_t>(const NodeTokensArgs<int32_t>&, int);
#define REWARDOPS_INSTANTIATE(T)                                   \
  template void nodes_to_tokens<T>(const NodeTokensArgs<T>&, int); \
  template void nodes_to_tokens_backward<T>(const NodeTokensArgs<T>&, int);
REWARDOPS_INSTANTIATE(float)
REWARDOPS_INSTANTIATE(double)

}  // namespace rewardops::cpu
