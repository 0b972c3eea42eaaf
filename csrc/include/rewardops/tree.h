// Arguments of tree values; a tree is an array of parents.
#pragma once

#include <cstdint>

namespace rewardops {

// Reductions, in the order of REDUCES in Python.
enum class TreeReduce : int { mean = 0, max = 1, min = 2, softmax = 3, sum = 4 };

// Arrays of one number per node.
struct TreeArgs {
  const int64_t* parent;  // [nodes]; outside [0, nodes) for a root
  const double* rewards;  // read at leaves
  const double* visits;   // null for ones
  TreeReduce reduce;
  double temperature;  // temperature of the soft maximum
  int64_t nodes;
  double* values;  // out
  double* slope;   // out: d (parent's value) / d (node's value)
};

}  // namespace rewardops
