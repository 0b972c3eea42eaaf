// Reductions of tokens over their rows.
#pragma once

#include "rewardops/cpu/kernels.h"

namespace rewardops::cpu {
namespace REWARDOPS_ISA {

template <typename T>
void row_sums(const RowSumsArgs<T>& a, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const int64_t n = a.rows.size(b);
    const uint8_t* mask = a.mask.row(a.rows, b);
    const T* values = a.values.row(a.rows, b);
    double sum = 0;
    if (!values) {
      int64_t count = 0;
#pragma omp simd reduction(+ : count)
      for (int64_t t = 0; t < n; ++t) count += mask[t] != 0;
      sum = static_cast<double>(count);
    } else if (mask) {
#pragma omp simd reduction(+ : sum)
      for (int64_t t = 0; t < n; ++t) sum += mask[t] ? static_cast<double>(values[t]) : 0.0;
    } else {
#pragma omp simd reduction(+ : sum)
      for (int64_t t = 0; t < n; ++t) sum += static_cast<double>(values[t]);
    }
    a.out[b] = static_cast<T>(sum);
  }
}

}  // namespace REWARDOPS_ISA
}  // namespace rewardops::cpu
