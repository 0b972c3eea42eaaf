#include "prefix_tree.h"

#include <algorithm>
#include <vector>

#include "groups.h"
#include "parallel.h"

namespace rewardops::cpu {
namespace {

int64_t common_prefix(const int32_t* a, const int32_t* b, int64_t n) { return kernels().common_prefix4(a, b, n); }
int64_t common_prefix(const int64_t* a, const int64_t* b, int64_t n) { return kernels().common_prefix8(a, b, n); }

// Rows from their first valid token to their last, and the common prefixes of all pairs of a group.
template <typename Token, typename T>
struct Prefixes {
  const PrefixArgs<Token, T>& args;
  GroupIndex index;
  std::vector<int64_t> first, length;  // per row
  std::vector<int64_t> rank;           // of a row among its group's members
  std::vector<int64_t> table;          // where a group's [n, n] block of lcp starts
  std::vector<int32_t> lcp;            // -1 where one of the two rows is empty

  Prefixes(const PrefixArgs<Token, T>& a, int threads)
      : args(a), index(a.groups, a.rows.batch), first(a.rows.batch), length(a.rows.batch), rank(a.rows.batch) {
    int64_t cells = 0;
    for (int64_t g = 0; g < index.view().count; ++g) {
      table.push_back(cells);
      cells += index.size(g) * index.size(g);
      for (int64_t k = 0; k < index.size(g); ++k) rank[index.members[index.offsets[g] + k]] = k;
    }
    lcp.resize(cells);
    parallel_for(a.rows.batch, 1, threads, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) span(b);
    });
    parallel_for(a.rows.batch, 1, threads, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) pairs(b);
    });
  }

  void span(int64_t b) {
    int64_t from = 0, to = args.rows.size(b);
    if (const uint8_t* mask = args.mask.row(args.rows, b)) {
      while (from < to && !mask[from]) ++from;
      while (to > from && !mask[to - 1]) --to;
    }
    first[b] = from;
    length[b] = to - from;
  }

  // Of row b with the members after it; both halves of the table are written.
  void pairs(int64_t b) {
    const int64_t g = index.group_of[b], n = index.size(g), i = rank[b];
    int32_t* block = lcp.data() + table[g];
    const Token* mine = args.tokens.row(args.rows, b) + first[b];
    block[i * n + i] = length[b] > 0 ? static_cast<int32_t>(length[b]) : -1;
    for (int64_t j = i + 1; j < n; ++j) {
      const int64_t other = index.members[index.offsets[g] + j];
      const int64_t shorter = std::min(length[b], length[other]);
      const Token* theirs = args.tokens.row(args.rows, other) + first[other];
      const int64_t shared = shorter > 0 ? common_prefix(mine, theirs, shorter) : -1;
      block[i * n + j] = block[j * n + i] = static_cast<int32_t>(shared);
    }
  }

  const int32_t* row(int64_t b) const {
    const int64_t g = index.group_of[b];
    return lcp.data() + table[g] + rank[b] * index.size(g);
  }

  // Row b's states fall into intervals in which the rows that still share its prefix are the same:
  // visit(from, to, alive) for each, from the longest prefix down; states t in (from, to].
  template <typename Visit>
  void intervals(int64_t b, std::vector<int32_t>& depths, Visit visit) const {
    const int64_t n = index.size(index.group_of[b]);
    const int32_t* mine = row(b);
    depths.assign(mine, mine + n);
    std::sort(depths.begin(), depths.end(), std::greater<int32_t>());
    for (int64_t k = 0; k < n && depths[k] >= 0;) {
      const int32_t depth = depths[k];
      while (k < n && depths[k] == depth) ++k;
      visit(k < n && depths[k] >= 0 ? depths[k] : -1, depth, k);
    }
  }
};

}  // namespace

template <typename Token, typename T>
void prefix_values(const PrefixArgs<Token, T>& a, int threads) {
  const Prefixes<Token, T> prefixes(a, threads);
  const GroupIndex& index = prefixes.index;
  parallel_for(a.rows.batch, 1, threads, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> depths;
    for (int64_t b = begin; b < end; ++b) {
      T* before = a.before.row(a.rows, b);
      T* after = a.after.row(a.rows, b);
      int32_t* count = a.count.row(a.rows, b);
      const int64_t width = a.rows.size(b);
      const int64_t from = prefixes.first[b], length = prefixes.length[b];
      const auto zero = [&](int64_t t, int64_t stop) {
        std::fill(before + t, before + stop, T{0});
        std::fill(after + t, after + stop, T{0});
        std::fill(count + t, count + stop, 0);
      };
      zero(0, from);
      zero(from + length, width);
      const int64_t* members = index.members.data() + index.offsets[index.group_of[b]];
      const int64_t n = index.size(index.group_of[b]);
      const int32_t* lcp = prefixes.row(b);
      prefixes.intervals(b, depths, [&](int64_t low, int64_t high, int64_t alive) {
        // Summed in member order, whatever the depths: rows that share a prefix get the same bits.
        double sum = 0;
        for (int64_t k = 0; k < n; ++k)
          if (lcp[k] >= high) sum += a.rewards[members[k]];
        const T value = static_cast<T>(sum / alive);
        // State t lies before token t and after token t - 1.
        std::fill(before + from + low + 1, before + from + std::min(high + 1, length), value);
        const int64_t begin_after = std::max<int64_t>(low, 0);
        std::fill(after + from + begin_after, after + from + high, value);
        std::fill(count + from + begin_after, count + from + high, static_cast<int32_t>(alive));
      });
      if (const uint8_t* mask = a.mask.row(a.rows, b))
        for (int64_t t = from; t < from + length; ++t)
          if (!mask[t]) zero(t, t + 1);
    }
  });
}

template <typename Token, typename T>
void prefix_values_backward(const PrefixArgs<Token, T>& a, int threads) {
  const Prefixes<Token, T> prefixes(a, threads);
  const GroupIndex& index = prefixes.index;
  // What row i's states send to member j; laid out as the common prefixes are, and summed over i in order.
  std::vector<double> sent(prefixes.lcp.size(), 0.0);
  parallel_for(a.rows.batch, 1, threads, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> depths;
    std::vector<double> up;
    for (int64_t b = begin; b < end; ++b) {
      const int64_t from = prefixes.first[b], length = prefixes.length[b];
      const uint8_t* mask = a.mask.row(a.rows, b);
      const T* before = a.grad_before.row(a.rows, b);
      const T* after = a.grad_after.row(a.rows, b);
      up.assign(length + 1, 0.0);  // per state
      for (int64_t t = 0; t < length; ++t) {
        if (mask && !mask[from + t]) continue;
        if (before) up[t] += before[from + t];
        if (after) up[t + 1] += after[from + t];
      }
      const int64_t g = index.group_of[b], n = index.size(g);
      double* to = sent.data() + prefixes.table[g] + prefixes.rank[b] * n;
      const int32_t* lcp = prefixes.row(b);
      prefixes.intervals(b, depths, [&](int64_t low, int64_t high, int64_t alive) {
        double sum = 0;
        for (int64_t t = low + 1; t <= high; ++t) sum += up[t];
        for (int64_t k = 0; k < n; ++k)
          if (lcp[k] >= high) to[k] += sum / alive;
      });
    }
  });
  for (int64_t b = 0; b < a.rows.batch; ++b) {
    const int64_t g = index.group_of[b], n = index.size(g);
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += sent[prefixes.table[g] + i * n + prefixes.rank[b]];
    a.grad_rewards[b] = static_cast<T>(sum);
  }
}

#define REWARDOPS_INSTANTIATE(Token, T)                                    \
  template void prefix_values<Token, T>(const PrefixArgs<Token, T>&, int); \
  template void prefix_values_backward<Token, T>(const PrefixArgs<Token, T>&, int);
REWARDOPS_INSTANTIATE(int32_t, float)
REWARDOPS_INSTANTIATE(int32_t, double)
REWARDOPS_INSTANTIATE(int64_t, float)
REWARDOPS_INSTANTIATE(int64_t, double)

}  // namespace rewardops::cpu
