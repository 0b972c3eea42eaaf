#include "prefix_tree.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <unordered_map>
#include <vector>

#include "groups.h"
#include "parallel.h"

namespace rewardops::cpu {
namespace {

int64_t common_prefix(const int32_t* a, const int32_t* b, int64_t n) { return kernels().common_prefix4(a, b, n); }
int64_t common_prefix(const int64_t* a, const int64_t* b, int64_t n) { return kernels().common_prefix8(a, b, n); }

// Top down: what all rows of a piece share, then the pieces by the next token. Every token that is shared is
// read once for every row that shares it, and no other but the first behind it.
template <typename Token>
class Builder {
 public:
  Builder(const PrefixTreeArgs<Token>& a) : a_(a), tree_(a.tree) {}

  // The tree of some rows, in positions from `base` on.
  void group(const int64_t* members, int64_t count, int64_t base) {
    rows_.clear();
    moved_.clear();
    for (int64_t k = 0; k < count; ++k) {
      span(members[k]);
      tree_.leaf[members[k]] = -1;
      if (tree_.length[members[k]] > 0) rows_.push_back({Token{}, false, members[k]});
    }
    const auto live = static_cast<int64_t>(rows_.size());
    pieces_.clear();
    if (live) pieces_.push_back({0, live, 0, -1});
    while (!pieces_.empty()) {
      const Piece piece = pieces_.back();
      pieces_.pop_back();
      if (piece.end - piece.begin == 1) leaf(piece, base);
      else branch(piece, base);
    }
    for (int64_t k = 0; k < live; ++k) tree_.order[base + k] = rows_[k].row;
    int64_t next = base + live;
    for (int64_t k = 0; k < count; ++k)
      if (tree_.length[members[k]] == 0) tree_.order[next++] = members[k];
  }

 private:
  struct Row {
    Token next;  // behind what the rows of the piece share
    bool goes_on;
    int64_t row;
    bool operator<(const Row& other) const {
      return goes_on != other.goes_on ? other.goes_on : goes_on && next < other.next;
    }
  };
  struct Piece {
    int64_t begin, end, shared, parent;
  };

  void span(int64_t b) {
    int64_t from = 0, to = a_.rows.size(b);
    if (const uint8_t* mask = a_.mask.row(a_.rows, b)) {
      while (from < to && !mask[from]) ++from;
      while (to > from && !mask[to - 1]) --to;
    }
    tree_.first[b] = from < to && !a_.skip ? from : 0;
    tree_.length[b] = to - from;
    if (a_.skip && to > from) without_holes(b, from, to);
  }

  // Rows that do not begin at their first column or have holes are copied.
  void without_holes(int64_t b, int64_t from, int64_t to) {
    const uint8_t* mask = a_.mask.row(a_.rows, b);
    if (!mask || (from == 0 && !std::memchr(mask, 0, to))) return;
    const Token* row = a_.tokens.row(a_.rows, b);
    std::vector<Token>& copy = moved_[b];
    for (int64_t t = from; t < to; ++t)
      if (mask[t]) copy.push_back(row[t]);
    tree_.length[b] = static_cast<int64_t>(copy.size());
  }

  const Token* tokens(int64_t b) const {
    if (!moved_.empty()) {
      const auto copy = moved_.find(b);
      if (copy != moved_.end()) return copy->second.data();
    }
    return a_.tokens.row(a_.rows, b) + tree_.first[b];
  }

  void node(int64_t id, const Piece& piece, int64_t base, int64_t depth) {
    tree_.begin[id] = base + piece.begin;
    tree_.end[id] = base + piece.end;
    tree_.depth[id] = depth;
    tree_.parent[id] = piece.parent;
  }

  void leaf(const Piece& piece, int64_t base) {
    const int64_t row = rows_[piece.begin].row, id = tree_.batch + base + piece.begin;
    node(id, piece, base, tree_.length[row]);
    tree_.leaf[row] = id;
  }

  void branch(const Piece& piece, int64_t base) {
    const Token* one = tokens(rows_[piece.begin].row);
    int64_t depth = tree_.length[rows_[piece.begin].row];
    for (int64_t k = piece.begin + 1; k < piece.end; ++k) {
      const int64_t row = rows_[k].row, limit = std::min(depth, tree_.length[row]);
      depth = piece.shared + common_prefix(one + piece.shared, tokens(row) + piece.shared, limit - piece.shared);
    }
    for (int64_t k = piece.begin; k < piece.end; ++k) {
      rows_[k].goes_on = tree_.length[rows_[k].row] > depth;
      if (rows_[k].goes_on) rows_[k].next = tokens(rows_[k].row)[depth];
    }
    std::stable_sort(rows_.begin() + piece.begin, rows_.begin() + piece.end);
    int64_t from = piece.begin;  // rows that end here come first, each a piece without a node
    while (from < piece.end && !rows_[from].goes_on) ++from;
    int64_t second = from > piece.begin ? piece.begin + 1 : piece.end;
    for (int64_t k = from + 1; k < piece.end && second == piece.end; ++k)
      if (rows_[k].next != rows_[from].next) second = k;
    const int64_t id = base + second;
    node(id, piece, base, depth);
    for (int64_t k = piece.begin; k < from; ++k) {
      tree_.leaf[rows_[k].row] = id;
      if (k > piece.begin) tree_.shared[base + k] = depth;
    }
    while (from < piece.end) {
      int64_t to = from + 1;
      while (to < piece.end && rows_[to].next == rows_[from].next) ++to;
      if (from > piece.begin) tree_.shared[base + from] = depth;
      pieces_.push_back({from, to, depth + 1, id});
      from = to;
    }
  }

  const PrefixTreeArgs<Token>& a_;
  const MutableTree& tree_;
  std::vector<Row> rows_;
  std::vector<Piece> pieces_;
  std::unordered_map<int64_t, std::vector<Token>> moved_;  // rows without their holes
};

}  // namespace

template <typename Token>
void prefix_tree(const PrefixTreeArgs<Token>& a, int threads) {
  const int64_t batch = a.rows.batch;
  std::fill(a.tree.shared, a.tree.shared + batch, -1);
  std::fill(a.tree.begin, a.tree.begin + a.tree.nodes(), 0);
  std::fill(a.tree.end, a.tree.end + a.tree.nodes(), 0);
  std::fill(a.tree.depth, a.tree.depth + a.tree.nodes(), -1);
  std::fill(a.tree.parent, a.tree.parent + a.tree.nodes(), -1);
  const GroupIndex index(a.groups, batch);
  const int64_t groups = index.view().count;
  // By label, so that the tree does not depend on the order of the rows.
  std::vector<int64_t> by_label(groups), base(groups);
  std::iota(by_label.begin(), by_label.end(), 0);
  std::sort(by_label.begin(), by_label.end(), [&](int64_t g, int64_t h) {
    return a.groups[index.members[index.offsets[g]]] < a.groups[index.members[index.offsets[h]]];
  });
  for (int64_t k = 0, next = 0; k < groups; next += index.size(by_label[k++])) base[k] = next;
  parallel_for(groups, 1, threads, [&](int64_t begin, int64_t end) {
    Builder<Token> builder(a);
    for (int64_t k = begin; k < end; ++k) {
      const int64_t g = by_label[k];
      builder.group(index.members.data() + index.offsets[g], index.size(g), base[k]);
    }
  });
}

void prefix_lcp(const PrefixLcpArgs& a, int threads) {
  const TreeView& tree = a.tree;
  const GroupIndex index(a.groups, tree.batch);
  std::vector<int64_t> rank(tree.batch);
  for (int64_t g = 0; g < index.view().count; ++g)
    for (int64_t k = 0; k < index.size(g); ++k) rank[index.members[index.offsets[g] + k]] = k;
  parallel_for(tree.batch, 16, threads, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t row = tree.order[p], g = index.group_of[row];
      int32_t* members = a.members + row * a.most;
      int32_t* lcp = a.lcp + row * a.most;
      const int64_t listed = std::min(a.most, index.size(g));
      for (int64_t k = 0; k < listed; ++k) members[k] = static_cast<int32_t>(index.members[index.offsets[g] + k]);
      std::fill(members + listed, members + a.most, -1);
      std::fill(lcp, lcp + a.most, -1);
      const auto put = [&](int64_t q, int64_t shared) {
        const int64_t k = rank[tree.order[q]];
        if (k < a.most) lcp[k] = static_cast<int32_t>(shared);
      };
      const int64_t length = tree.length[row];
      put(p, length > 0 ? length : -1);
      // Two rows share the least of what the neighbours between them do.
      int64_t least = length;
      for (int64_t q = p; tree.shared[q] >= 0; --q) put(q - 1, least = std::min(least, tree.shared[q]));
      least = length;
      for (int64_t q = p + 1; q < tree.batch && tree.shared[q] >= 0; ++q) put(q, least = std::min(least, tree.shared[q]));
    }
  });
}

// ---- sums over subtrees ------------------------------------------------------------------------------------

namespace {

double power(double gamma, int64_t n) { return gamma == 1.0 ? 1.0 : std::pow(gamma, static_cast<double>(n)); }

}  // namespace

void subtree_sums(const SubtreeArgs& a, int threads) {
  const TreeView& tree = a.tree;
  const int64_t channels = a.channels;
  parallel_for(tree.nodes(), 64, threads, [&](int64_t from, int64_t to) {
    for (int64_t n = from; n < to; ++n) {
      double* out = a.out + n * channels;
      std::fill(out, out + channels, 0.0);
      for (int64_t p = tree.begin[n]; p < tree.end[n]; ++p) {
        const int64_t row = tree.order[p];
        const double weight = a.weights ? a.weights[row] : 1.0;
        const double factor = a.centre ? weight : weight * power(a.gamma, tree.length[row] - tree.depth[n]);
        for (int64_t c = 0; c < channels; ++c) {
          const double x = a.x[row * channels + c];
          if (a.centre) {
            const double off = x - a.centre[n * channels + c];
            out[c] += factor * off * off;
          } else {
            out[c] += factor * x;
          }
        }
      }
    }
  });
}

void subtree_sums_backward(const SubtreeArgs& a, int threads) {
  const TreeView& tree = a.tree;
  const int64_t channels = a.channels;
  parallel_for(tree.batch, 64, threads, [&](int64_t from, int64_t to) {
    for (int64_t row = from; row < to; ++row) {
      double* grad_x = a.grad_x + row * channels;
      std::fill(grad_x, grad_x + channels, 0.0);
      double grad_weight = 0;
      const double weight = a.weights ? a.weights[row] : 1.0;
      for (int64_t n = tree.leaf[row]; n >= 0; n = tree.parent[n]) {
        const double factor = a.centre ? 1.0 : power(a.gamma, tree.length[row] - tree.depth[n]);
        for (int64_t c = 0; c < channels; ++c) {
          const double x = a.x[row * channels + c], up = a.grad[n * channels + c] * factor;
          if (a.centre) {
            const double off = x - a.centre[n * channels + c];
            grad_x[c] += 2 * weight * off * up;
            grad_weight += off * off * up;
          } else {
            grad_x[c] += weight * up;
            grad_weight += x * up;
          }
        }
      }
      if (a.grad_weights) a.grad_weights[row] = grad_weight;
    }
  });
}

// ---- nodes and tokens --------------------------------------------------------------------------------------

namespace {

struct Span {
  int64_t from, to;  // tokens, counted from the row's first
};

// The tokens of a row whose state lies in a node: none where the row's leaf was moved above the node.
Span span_of(const TreeView& tree, int64_t row, int64_t n, At at) {
  const int64_t shift = at == At::before ? 0 : 1;  // state s is that of token s - shift
  if (tree.depth[n] > tree.depth[tree.leaf[row]]) return {0, 0};
  const int64_t low = tree.parent_depth(n) + 1;
  const int64_t high = tree.leaf[row] == n ? tree.length[row] : tree.depth[n];
  return {std::max<int64_t>(low - shift, 0), std::min(high + 1 - shift, tree.length[row])};
}

// What a row says at a node.
template <typename T>
double value_of(const NodeTokensArgs<T>& a, int64_t row, int64_t n, int64_t c) {
  double value = a.values ? a.values[n * a.channels + c] : 0.0;
  if (a.along)
    value += a.factor[row * a.channels + c] * power(a.gamma, a.tree.length[row] - a.tree.depth[n]) *
             a.along[n * a.channels + c];
  return value;
}

// gamma^(depth - state) for the states of a span, from its last token to its first: visit(token, factor).
template <typename Visit>
void discounted(const TreeView& tree, int64_t n, const Span& span, At at, double gamma, Visit visit) {
  const int64_t shift = at == At::before ? 0 : 1;
  double factor = 1;
  for (int64_t t = span.to - 1; t >= span.from; --t) {
    const int64_t left = tree.depth[n] - t - shift;
    if (left > 0) factor = t == span.to - 1 ? power(gamma, left) : factor * gamma;
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
      // Without its holes a row is written to its front first.
      const bool moved = a.skip && mask && length > 0 && std::memchr(mask, 0, length);
      const bool holes = !a.skip && mask && length > 0 && std::memchr(mask + first, 0, length);
      for (int64_t c = 0; c < channels; ++c) {
        T* const row = a.out.row(a.rows, b) + c * a.plane;
        T* const out = row + first;
        std::fill(row, out, T{0});
        std::fill(out + length, row + width, T{0});
        if (length == 0) continue;
        const double base = a.base ? a.base[b * channels + c] : 0.0;
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
void nodes_to_tokens_backward(const NodeTokensArgs<T>& given, int threads) {
  NodeTokensArgs<T> a = given;
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
  // What a row's tokens send to a node: the sum of their upstream gradients, discounted.
  const auto sent = [&](int64_t row, int64_t n, int64_t c) {
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
          const double sum = sent(row, n, c);
          values += sum;
          if (a.along) along += a.factor[row * channels + c] * power(a.gamma, tree.length[row] - tree.depth[n]) * sum;
        }
        if (a.grad_values) a.grad_values[n * channels + c] = values;
        if (a.grad_along) a.grad_along[n * channels + c] = along;
      }
    }
  });
  if (!a.grad_base && !a.grad_factor) return;
  parallel_for(a.rows.batch, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const uint8_t* mask = a.mask.row(a.rows, b);
      const int64_t first = tree.first[b], length = tree.length[b];
      for (int64_t c = 0; c < channels; ++c) {
        if (a.grad_base) {
          const T* grad = a.grad.row(a.rows, b) + c * a.plane;
          double sum = 0;
          for (int64_t t = first; t < first + length; ++t) sum += mask && !mask[t] ? T{0} : grad[t];
          a.grad_base[b * channels + c] = sum;
        }
        if (a.grad_factor) {
          double sum = 0;
          for (int64_t n = tree.leaf[b]; n >= 0; n = tree.parent[n])
            sum += power(a.gamma, length - tree.depth[n]) * a.along[n * channels + c] * sent(b, n, c);
          a.grad_factor[b * channels + c] = sum;
        }
      }
    }
  });
}

template void prefix_tree<int32_t>(const PrefixTreeArgs<int32_t>&, int);
template void prefix_tree<int64_t>(const PrefixTreeArgs<int64_t>&, int);
template void nodes_to_tokens<int32_t>(const NodeTokensArgs<int32_t>&, int);
#define REWARDOPS_INSTANTIATE(T)                                     \
  template void nodes_to_tokens<T>(const NodeTokensArgs<T>&, int); \
  template void nodes_to_tokens_backward<T>(const NodeTokensArgs<T>&, int);
REWARDOPS_INSTANTIATE(float)
REWARDOPS_INSTANTIATE(double)

}  // namespace rewardops::cpu
