// Arguments of the kernels that reduce the tokens of a scope (the batch, groups of rows, their classes) and map the
// tokens by what was found.
#pragma once

#include "rewardops/rows.h"

namespace rewardops {

// What is done with the tokens.
enum class Scoped : int {
  standardize = 0,
  standardize_backward = 1,
  weigh = 2,
  weigh_backward = 3,
  covary = 4,
  bonus = 5,
  bonus_backward = 6,
  steer = 7
};
// Raw weights of tokens, in the order of rewardops.reference.scopes.FORMS: x, 1 / max(x, floor), exp(rate x).
enum class Form : int { linear = 0, inverse = 1, exponential = 2 };

// Numbers of a part of a row.
constexpr int64_t kPartNumbers = 4;

// The moments of a part of a row, or of a scope: values are taken less the part's first valid one.
struct Moments {
  double count, origin, mean, squares;  // weights; the first value; mean less origin; squares about the mean
};

// [tokens] stands for [B, T], or [N] for packed rows.
template <typename T>
struct ScopesArgs {
  Scoped op;
  Tokens<const T> values;      // [tokens]
  Tokens<const T> weights;     // [tokens]; null: 1. covary: the other values; bonus: entropies
  Tokens<const uint8_t> mask;  // [tokens]; null: every token is valid
  Tokens<const T> grad;        // [tokens]; backward
  Rows rows;
  const int64_t* groups;  // [B] labels; null: the batch is one scope
  const T* outcomes;      // [B]; null: a scope is a whole group
  double threshold;       // rows with an outcome above it are a class of their group
  double eps;             // added to the variance, or to the standard deviation
  int64_t ddof;
  bool of_variance;  // where eps is added
  bool rounded;      // a variance that rounding of equal values explains is 0
  bool shifted;      // false: the mean is added again
  Form form;
  double rate,
      floor;  // of the form; bonus: the entropy's factor, and kappa; steer: the smallest and the largest weight
  double* statistics;  // [1 or B, 5], by op:
                       // the mean in two parts, the scale, its derivative over its square, 1 / count
                       // 1 / mean weight, the weight where that is 0, the largest x (of rate x), rate, 1 / count
                       // the mean of values in two parts, that of weights, 1 / count
                       // steer: the smallest value, a slope, a base
  Tokens<T> out;       // [tokens]

  int64_t scopes;  // 1 or B

  // Scratch. A row is cut into parts of kScopeBlock tokens.
  const int64_t* first;  // [B + 1]: the first part of each row
  const int64_t* rows_of_parts;
  double* parts;  // [parts, kPartNumbers]
  double* found;  // [1 or B, 2]: backward, the coefficients of a scope
};

}  // namespace rewardops
