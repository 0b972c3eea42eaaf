// A value of each row written to the row's tokens.
#pragma once

#include "rewardops/cpu/kernels.h"

namespace rewardops::cpu {
namespace REWARDOPS_ISA {

template <typename T>
void rows_to_tokens(const RowsToTokensArgs<T>& a, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const int64_t n = a.rows.size(b);
    const uint8_t* mask = a.mask.row(a.rows, b);
    T* out = a.out.row(a.rows, b);
    const T value = a.values[b];
    if (mask) {
#pragma omp simd
      for (int64_t t = 0; t < n; ++t) out[t] = mask[t] ? value : T{0};
    } else {
#pragma omp simd
      for (int64_t t = 0; t < n; ++t) out[t] = value;
    }
  }
}

}  // namespace REWARDOPS_ISA
}  // namespace rewardops::cpu
