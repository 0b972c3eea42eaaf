// Prefix values from the longest common prefixes of all pairs of a group; no tree is built.
#pragma once

#include <cstdint>

#include "rewardops/cpu/kernels.h"

namespace rewardops::cpu {

template <typename Token, typename T>
struct PrefixArgs {
  Rows rows;
  Tokens<const uint8_t> mask;
  Tokens<const Token> tokens;
  const int64_t* groups;             // [B]
  const T* rewards;                  // [B]; forward only
  Tokens<T> before, after;           // forward only
  Tokens<int32_t> count;             // forward only
  Tokens<const T> grad_before, grad_after;  // backward only; each may be null
  T* grad_rewards;                   // backward only, [B]
};

template <typename Token, typename T>
void prefix_values(const PrefixArgs<Token, T>& a, int threads);
template <typename Token, typename T>
void prefix_values_backward(const PrefixArgs<Token, T>& a, int threads);

}  // namespace rewardops::cpu
