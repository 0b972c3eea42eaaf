// Values of given trees, from the leaves up.
#pragma once

#include <cstdint>

namespace rewardops::cpu {

// In the order of rewardops.tree.REDUCES.
enum class TreeReduce : int { mean = 0, max = 1, min = 2, softmax = 3, sum = 4 };

struct TreeValuesArgs {
  int64_t nodes;
  const int64_t* parent;  // outside [0, nodes) for a root
  const double* rewards;  // read at leaves
  const double* visits;   // may be null, for ones
  TreeReduce reduce;
  double temperature;
  double *values, *slope;  // slope: how much a node's value moves its parent's
};

void tree_values(const TreeValuesArgs& a);

// grad of the values to grad of the leaves' rewards.
void tree_values_backward(int64_t nodes, const int64_t* parent, const double* slope, const double* grad, double* out);

// Where following step from each node ends: at the first node that is its own step. False where one never ends.
bool path_ends(int64_t nodes, const int64_t* step, int64_t* out);

}  // namespace rewardops::cpu
