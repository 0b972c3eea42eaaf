// Rows of tokens: padded [B, T] with a row stride, or packed [N] with offsets.
#pragma once

#include <cstdint>

namespace rewardops::cpu {

struct Rows {
  int64_t batch;
  int64_t width;         // padded: T
  const int64_t* cu;     // packed: [batch + 1]; null for padded rows
  int64_t total;         // packed: N

  // Clamped, so that bad offsets never become a read out of bounds.
  int64_t size(int64_t row) const {
    if (!cu) return width;
    const int64_t begin = start(row, 0);
    const int64_t end = cu[row + 1] > total ? total : cu[row + 1];
    return end > begin ? end - begin : 0;
  }
  // Where a row starts in an array of the given row stride (packed arrays have none).
  int64_t start(int64_t row, int64_t stride) const {
    if (!cu) return row * stride;
    const int64_t begin = cu[row] < 0 ? 0 : cu[row];
    return begin > total ? total : begin;
  }
};

// A per-token array; a null pointer stands for "not given".
template <typename T>
struct Tokens {
  T* data;
  int64_t stride;  // between padded rows
  T* row(const Rows& rows, int64_t b) const { return data ? data + rows.start(b, stride) : nullptr; }
};

}  // namespace rewardops::cpu
