// Values of trees whose parents are arguments, from the leaves up.
#pragma once

#include "rewardops/tree.h"

namespace rewardops::cpu {

void tree_values(const TreeArgs& a);

// The gradient of the leaves' rewards, to `out`, from the gradient of the values.
void tree_values_backward(int64_t nodes, const int64_t* parent, const double* slope, const double* grad, double* out);

// The end of the path that follows `step` from each node: the first node that is its own step. False if a path never
// ends.
bool path_ends(int64_t nodes, const int64_t* step, int64_t* out);

}  // namespace rewardops::cpu
