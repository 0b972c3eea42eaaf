// Arguments of the selection of the largest values.
#pragma once

#include "rewardops/rows.h"

namespace rewardops {

// [tokens] stands for [B, T], or [N] for packed rows.
template <typename T>
struct LargestArgs {
  Tokens<const T> values;      // [tokens]
  Tokens<const uint8_t> mask;  // [tokens]; null: every token is valid
  Rows rows;
  const int64_t* scopes;  // [B], the scope of each row, from 0
  const int64_t* wanted;  // [scopes], the number of tokens to select in each scope
  Tokens<uint8_t> out;    // [tokens], 1 where selected
};

}  // namespace rewardops
