#include "tree.h"

#include <cmath>
#include <limits>
#include <vector>

namespace rewardops::cpu {
namespace {

// The nodes in an order with every child before its parent, without those on a cycle. `children` becomes the number of
// children of each node.
std::vector<int64_t> upwards(int64_t nodes, const int64_t* parent, std::vector<int64_t>& children) {
  const auto has_parent = [&](int64_t n) { return parent[n] >= 0 && parent[n] < nodes; };
  children.assign(nodes, 0);
  bool falling = true;  // every child comes after its parent, as in most trees
  for (int64_t n = 0; n < nodes; ++n)
    if (has_parent(n)) {
      ++children[parent[n]];
      falling = falling && parent[n] < n;
    }
  std::vector<int64_t> order;
  if (falling) {
    order.resize(nodes);
    for (int64_t n = 0; n < nodes; ++n) order[n] = nodes - 1 - n;
    return order;
  }
  std::vector<int64_t> waiting = children;
  order.reserve(nodes);
  for (int64_t n = 0; n < nodes; ++n)
    if (children[n] == 0) order.push_back(n);
  for (size_t k = 0; k < order.size(); ++k)
    if (has_parent(order[k]) && --waiting[parent[order[k]]] == 0) order.push_back(parent[order[k]]);
  return order;
}

// Running reduction of a node's children. For a mean: the sums of weight * value and of weights. For a soft maximum:
// the sums of e * value and of e, with e relative to the largest value. For an extreme: the first child that attains
// it.
struct State {
  double sum = 0, weight = 0, largest = -std::numeric_limits<double>::infinity();
  int64_t chosen = -1;
};

}  // namespace

void tree_values(const TreeArgs& a) {
  std::vector<int64_t> children;
  const std::vector<int64_t> order = upwards(a.nodes, a.parent, children);
  std::vector<State> states(a.nodes);
  const auto weight = [&](int64_t n) { return a.visits ? a.visits[n] : 1.0; };
  const bool extreme = a.reduce == TreeReduce::max || a.reduce == TreeReduce::min;
  const double sign = a.reduce == TreeReduce::min ? -1 : 1;
  for (int64_t n = 0; n < a.nodes; ++n) a.values[n] = std::numeric_limits<double>::quiet_NaN();
  for (const int64_t n : order) {
    const State& from = states[n];
    if (children[n] == 0) a.values[n] = a.rewards[n];
    else if (extreme) a.values[n] = from.chosen < 0 ? 0 : a.values[from.chosen];
    else if (a.reduce == TreeReduce::sum) a.values[n] = from.sum;
    else a.values[n] = from.weight == 0 ? 0 : from.sum / from.weight;
    const int64_t up = a.parent[n];
    if (up < 0 || up >= a.nodes || weight(n) == 0) continue;
    State& s = states[up];
    const double v = a.values[n];
    switch (a.reduce) {
      case TreeReduce::sum: s.sum += v; break;
      case TreeReduce::mean:
        s.sum += weight(n) * v;
        s.weight += weight(n);
        break;
      case TreeReduce::softmax: {
        const double largest = v > s.largest ? v : s.largest;
        const double fade = s.weight == 0 ? 0 : std::exp((s.largest - largest) / a.temperature);
        const double e = std::exp((v - largest) / a.temperature);
        s.sum = s.sum * fade + e * v;
        s.weight = s.weight * fade + e;
        s.largest = largest;
        break;
      }
      default:
        // Children come in any order; ties go to the first one.
        if (s.chosen < 0 || sign * v > sign * a.values[s.chosen] || (v == a.values[s.chosen] && n < s.chosen))
          s.chosen = n;
    }
  }
  for (int64_t n = 0; n < a.nodes; ++n) {
    a.slope[n] = 0;
    const int64_t up = a.parent[n];
    if (up < 0 || up >= a.nodes || weight(n) == 0) continue;
    const State& s = states[up];
    if (a.reduce == TreeReduce::sum) a.slope[n] = 1;
    else if (extreme) a.slope[n] = s.chosen == n;
    else if (a.reduce == TreeReduce::mean) a.slope[n] = weight(n) / s.weight;
    else
      a.slope[n] = std::exp((a.values[n] - s.largest) / a.temperature) / s.weight *
                   (1 + (a.values[n] - a.values[up]) / a.temperature);
  }
}

void tree_values_backward(int64_t nodes, const int64_t* parent, const double* slope, const double* grad, double* out) {
  std::vector<int64_t> children;
  const std::vector<int64_t> order = upwards(nodes, parent, children);
  std::vector<double> total(grad, grad + nodes);
  for (auto n = order.rbegin(); n != order.rend(); ++n) {
    const int64_t up = parent[*n];
    if (up >= 0 && up < nodes && slope[*n] != 0) total[*n] += slope[*n] * total[up];
  }
  for (int64_t n = 0; n < nodes; ++n) out[n] = children[n] == 0 ? total[n] : 0;
}

bool path_ends(int64_t nodes, const int64_t* step, int64_t* out) {
  constexpr int64_t unknown = -1, passed = -2;
  for (int64_t n = 0; n < nodes; ++n) out[n] = unknown;
  for (int64_t n = 0; n < nodes; ++n) {
    int64_t m = n;
    for (; out[m] == unknown && step[m] != m; m = step[m]) out[m] = passed;
    if (out[m] == passed) return false;  // the walk is back on its own path: a cycle
    const int64_t end = out[m] == unknown ? m : out[m];
    out[m] = end;
    for (int64_t k = n; k != m; k = step[k]) out[k] = end;
  }
  return true;
}

}  // namespace rewardops::cpu
