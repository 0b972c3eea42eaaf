// The longest common prefix of two rows of tokens.
#pragma once

#include "rewardops/cpu/kernels.h"

namespace rewardops::cpu {
namespace REWARDOPS_ISA {

template <typename Token>
int64_t common_prefix(const Token* a, const Token* b, int64_t n) {
  constexpr int64_t kBlock = 256 / sizeof(Token);
  int64_t t = 0;
  // No early exit inside a block, so that its comparison becomes SIMD code.
  for (; t + kBlock <= n; t += kBlock) {
    Token difference = 0;
#pragma omp simd reduction(| : difference)
    for (int64_t k = 0; k < kBlock; ++k) difference |= a[t + k] ^ b[t + k];
    if (difference) break;
  }
  while (t < n && a[t] == b[t]) ++t;
  return t;
}

}  // namespace REWARDOPS_ISA
}  // namespace rewardops::cpu
