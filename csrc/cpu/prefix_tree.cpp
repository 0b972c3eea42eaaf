// The prefix tree of each group of rows, common prefixes of pairs of rows, and sums over subtrees.
#include "prefix_tree.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <unordered_map>
#include <vector>

#include "groups.h"
#include "parallel.h"
#include "rewardops/cpu/kernels.h"

namespace rewardops::cpu {
namespace {

int64_t common_prefix(const int32_t* a, const int32_t* b, int64_t n) { return kernels().common_prefix4(a, b, n); }
int64_t common_prefix(const int64_t* a, const int64_t* b, int64_t n) { return kernels().common_prefix8(a, b, n); }

// Builds the tree of a group top down: finds the prefix that all rows of a piece share, then divides the piece by the
// next token. A row's shared tokens are read once; of its other tokens only the first is read.
template <typename Token>
class Builder {
 public:
  Builder(const PrefixTreeArgs<Token>& a) : a_(a), tree_(a.tree) {}

  // Builds the tree of one group's rows, at the positions from `base` on.
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
    Token next;    // the token after the prefix that the rows of the piece share
    bool goes_on;  // the next token exists
    int64_t row;
    bool operator<(const Row& other) const {
      return goes_on != other.goes_on ? other.goes_on : goes_on && next < other.next;
    }
  };
  // Rows [begin, end) of rows_, which share their first `shared` tokens, below the node `parent`.
  struct Piece {
    int64_t begin, end, shared, parent;
  };

  // First token and length of a row.
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

  // Copies a row that has masked tokens inside, or does not begin at its first column.
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
    int64_t from = piece.begin;  // rows that end here come first, and have no node of their own
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
  std::unordered_map<int64_t, std::vector<Token>> moved_;  // the valid tokens of rows that have masked tokens inside
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
  // Groups are sorted by label, so that the tree does not depend on the order of the rows.
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
      // The common prefix of two rows is the shortest one of the neighbouring rows between them.
      int64_t least = length;
      for (int64_t q = p; tree.shared[q] >= 0; --q) put(q - 1, least = std::min(least, tree.shared[q]));
      least = length;
      for (int64_t q = p + 1; q < tree.batch && tree.shared[q] >= 0; ++q)
        put(q, least = std::min(least, tree.shared[q]));
    }
  });
}

// ---- statistics of subtrees ---------------------------------------------------------------------------------

namespace {

// What the total weight of a node divides.
double divisor(double total) { return total > 0 ? total : 1.0; }

// n / (n - ddof) for the n rows of a node; 0 for at most ddof.
double corrected(const SubtreeArgs& a, int64_t n) {
  const int64_t count = a.tree.end[n] - a.tree.begin[n];
  return count > a.ddof ? static_cast<double>(count) / static_cast<double>(count - a.ddof) : 0.0;
}

}  // namespace

void subtree_statistics(const SubtreeArgs& a, int threads) {
  const TreeView& tree = a.tree;
  const int64_t channels = a.channels;
  parallel_for(tree.nodes(), 64, threads, [&](int64_t from, int64_t to) {
    for (int64_t n = from; n < to; ++n) {
      double* out = a.out + n * channels;
      const auto over_rows = [&](auto add) {
        std::fill(out, out + channels, 0.0);
        for (int64_t p = tree.begin[n]; p < tree.end[n]; ++p) {
          const int64_t row = tree.order[p];
          const double weight = a.weights ? a.weights[row] : 1.0;
          for (int64_t c = 0; c < channels; ++c) out[c] += add(row, c, weight, a.x[row * channels + c]);
        }
      };
      double total = 0;
      for (int64_t p = tree.begin[n]; p < tree.end[n]; ++p) total += a.weights ? a.weights[tree.order[p]] : 1.0;
      a.total[n] = total;
      over_rows([&](int64_t row, int64_t, double weight, double x) {
        return weight * discount(a.gamma, tree.length[row] - tree.depth[n]) * x;
      });
      double* centre = a.centre + n * channels;
      for (int64_t c = 0; c < channels; ++c) centre[c] = out[c] / divisor(total);
      if (a.statistic == Statistic::sum) continue;
      if (a.statistic == Statistic::mean) {
        std::copy(centre, centre + channels, out);
        continue;
      }
      over_rows([&](int64_t, int64_t c, double weight, double x) {
        const double off = x - centre[c];
        return weight * off * off;
      });
      for (int64_t c = 0; c < channels; ++c) {
        const double variance = out[c] / divisor(total) * corrected(a, n);
        out[c] = variance > 0 ? std::sqrt(variance) : 0.0;
      }
    }
  });
}

void subtree_statistics_backward(const SubtreeArgs& a, int threads) {
  const TreeView& tree = a.tree;
  const int64_t channels = a.channels;
  parallel_for(tree.batch, 64, threads, [&](int64_t from, int64_t to) {
    for (int64_t row = from; row < to; ++row) {
      double* grad_x = a.grad_x + row * channels;
      std::fill(grad_x, grad_x + channels, 0.0);
      double grad_weight = 0;
      const double weight = a.weights ? a.weights[row] : 1.0;
      for (int64_t n = tree.leaf[row]; n >= 0; n = tree.parent[n]) {
        const double factor = discount(a.gamma, tree.length[row] - tree.depth[n]), total = a.total[n];
        for (int64_t c = 0; c < channels; ++c) {
          const double x = a.x[row * channels + c], up = a.grad[n * channels + c], out = a.out[n * channels + c];
          if (a.statistic == Statistic::std) {
            if (!(out > 0)) continue;
            const double correction = corrected(a, n), off = x - a.centre[n * channels + c];
            const double per = up / divisor(total) * correction / (2 * out);
            grad_x[c] += weight * per * 2 * off;
            grad_weight += per * (off * off - (total > 0 ? out * out / correction : 0.0));
          } else {
            const bool mean = a.statistic == Statistic::mean;
            const double per = mean ? up / divisor(total) : up;
            grad_x[c] += weight * per * factor;
            grad_weight += per * (factor * x - (mean && total > 0 ? out : 0.0));
          }
        }
      }
      if (a.grad_weights) a.grad_weights[row] = grad_weight;
    }
  });
}

template void prefix_tree<int32_t>(const PrefixTreeArgs<int32_t>&, int);
template void prefix_tree<int64_t>(const PrefixTreeArgs<int64_t>&, int);

}  // namespace rewardops::cpu
