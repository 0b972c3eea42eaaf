// Exactly so many of the largest values of a scope: a row, a group of rows, or all of them.
#pragma once

#include <cstdint>

#include "rewardops/rows.h"

namespace rewardops::cpu {

template <typename T>
struct LargestArgs {
  Rows rows;
  Tokens<const uint8_t> mask;
  Tokens<const T> values;
  const int64_t* scopes;  // [B], the scope of each row, from 0
  const int64_t* wanted;  // at each scope, how many
  Tokens<uint8_t> out;
};

template <typename T>
void largest(const LargestArgs<T>& a, int threads);

}  // namespace rewardops::cpu
