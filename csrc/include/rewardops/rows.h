// Rows of tokens, padded [B, T] with a row stride or packed [N] with offsets; their arrays, and rows in groups.
#pragma once

#include <cstdint>

// Marks functions that run on the CPU and inside CUDA kernels.
#ifdef __CUDACC__
#define REWARDOPS_BOTH __host__ __device__
#else
#define REWARDOPS_BOTH
#endif

namespace rewardops {

struct Rows {
  int64_t batch;
  int64_t width;   // padded: T
  const void* cu;  // packed: [batch + 1]; null for padded rows
  int64_t total;   // packed: N
  bool wide;       // the offsets are int64, not int32

  REWARDOPS_BOTH int64_t offset(int64_t row) const {
    const int64_t at = wide ? static_cast<const int64_t*>(cu)[row] : static_cast<const int32_t*>(cu)[row];
    // Clamped, so that bad offsets never become an access out of bounds.
    return at < 0 ? 0 : at > total ? total : at;
  }
  REWARDOPS_BOTH int64_t size(int64_t row) const {
    if (!cu) return width;
    const int64_t begin = offset(row), end = offset(row + 1);
    return end > begin ? end - begin : 0;
  }
  // Offset of a row's first token in an array with this row stride (packed arrays have none).
  REWARDOPS_BOTH int64_t start(int64_t row, int64_t stride) const { return cu ? offset(row) : row * stride; }
};

// A per-token array; data is null for an optional array that is absent.
template <typename T>
struct Tokens {
  T* data;
  int64_t stride;  // between padded rows
  REWARDOPS_BOTH T* row(const Rows& rows, int64_t b) const { return data ? data + rows.start(b, stride) : nullptr; }
};

// Rows by group: members[offsets[g]:offsets[g + 1]] are the rows of group g, ascending.
struct Groups {
  int64_t count;
  const int64_t *members, *offsets;
};

}  // namespace rewardops
