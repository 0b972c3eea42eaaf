// Steps of a row: flags of valid tokens and of step ends.
#pragma once

#include "rewardops/cpu/kernels.h"
#include "rewardops/cpu/scan.h"

namespace rewardops::cpu {
namespace REWARDOPS_ISA {
namespace {

// Walks the tokens of one row from the right, and tells valid tokens and step ends.
template <typename T>
struct StepRow {
  const uint8_t *mask, *flags;
  const int64_t* ids;
  int64_t size;
  int64_t following = -1;  // the id of the next valid token

  StepRow(const ReturnsArgs<T>& a, int64_t b)
      : mask(a.mask.row(a.rows, b)),
        flags(a.kind == Steps::flags ? a.flags.row(a.rows, b) : nullptr),
        ids(a.kind == Steps::ids ? a.ids.row(a.rows, b) : nullptr),
        size(a.rows.size(b)) {}

  bool valid(int64_t t) const { return !mask || mask[t]; }

  // Call for every t of the row, in decreasing order.
  bool ends_step(int64_t t) {
    if (!valid(t)) return false;
    if (flags) return flags[t];
    if (!ids) return true;
    const bool end = ids[t] >= 0 && ids[t] != following;
    following = ids[t];
    return end;
  }

  // Starts the walk at any token `end`: sets `following` to the id of the valid token there or after it.
  void start(int64_t end) {
    following = -1;
    if (!ids) return;
    while (end < size && !valid(end)) ++end;
    if (end < size) following = ids[end];
  }

  // Flags of step ends for [begin, begin + n), a block to the left of the last one.
  void ends_of(int64_t begin, int64_t n, uint8_t* ends) {
    if (flags || !ids) {  // bytes of 0 and 1
      if (flags) std::memcpy(ends, flags + begin, n);
      else std::memset(ends, 1, n);
      if (mask) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) ends[i] &= mask[begin + i];
      }
    } else if (!mask) {
      for (int64_t i = 0; i + 1 < n; ++i) ends[i] = (ids[begin + i] >= 0) & (ids[begin + i] != ids[begin + i + 1]);
      if (n) ends[n - 1] = ends_step(begin + n - 1);
      if (n) following = ids[begin];
    } else {
      for (int64_t i = n - 1; i >= 0; --i) ends[i] = ends_step(begin + i);
    }
  }
};

}  // namespace
}  // namespace REWARDOPS_ISA
}  // namespace rewardops::cpu
