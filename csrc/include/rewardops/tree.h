// Arguments of the values of trees that are given by their parents.
#pragma once

#include <cstdint>

namespace rewardops {

// In the order of REDUCES in Python.
enum class TreeReduce : int { mean = 0, max = 1, min = 2, softmax = 3, sum = 4 };

// Arrays of one number per node.
struct TreeArgs {
  const int64_t* parent;  // outside [0, nodes) for a root
  const double* rewards;  // read at leaves
  const double* visits;   // null for ones
  TreeReduce reduce;
  double temperature;     // of the soft maximum
  int64_t nodes;
  double* values;         // out
  double* slope;          // out: derivative of the parent's value in the node's
};

}  // namespace rewardops
