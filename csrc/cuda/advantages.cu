#include "cuda/advantages.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/launch.h"
#include "rewardops/cuda/advantages.cuh"

namespace rewardops::cuda {
namespace {

using namespace advantages;

// The number of blocks that the device runs at once.
template <typename T>
int64_t resident(void (*kernel)(AdvantagesArgs<T>, int)) {
  static const int blocks = [&] {
    int count = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, kThreads, 0), "group_advantages");
    return std::max(count, 1);
  }();
  return int64_t{blocks} * attribute(cudaDevAttrMultiProcessorCount);
}

int64_t checked_batch(const Rows& rows) {
  if (rows.batch <= kMostRows) return rows.batch;
  throw std::runtime_error("group_advantages: " + std::to_string(rows.batch) + " rows are too many");
}

// Rows per block: more than one if there are more rows than the device runs blocks at once. Neighbours share the
// search for members.
int rows_of_block(int64_t batch, int64_t blocks) {
  return static_cast<int>(std::clamp<int64_t>(batch / blocks, 1, kRows));
}

int64_t quotient_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

template <typename T>
void group_advantages(const AdvantagesArgs<T>& a, void* stream) {
  const int64_t batch = checked_batch(a.rows);
  if (batch == 0) return;
  const int64_t wanted = resident(group_advantages_kernel<T>);
  const int each = rows_of_block(batch, wanted);
  int64_t parts = 1;
  if (a.tokens_given) {
    const int64_t longest = a.rows.cu ? a.rows.total : a.rows.width;
    parts = std::clamp<int64_t>(quotient_up(longest, RowChunks<T>::kTokens * kWarps), 1, quotient_up(wanted, batch));
  }
  const Grid grid{quotient_up(batch, each), static_cast<unsigned>(parts), kThreads};
  launch("group_advantages", group_advantages_kernel<T>, grid, stream, a, each);
}

template <typename T>
void group_advantages_backward(const AdvantagesArgs<T>& a, void* stream) {
  const int64_t batch = checked_batch(a.rows);
  if (batch == 0) return;
  if (a.tokens_given && a.grad.data)
    launch("row_sums", row_sums_kernel<T>, Grid{batch, static_cast<unsigned>(a.parts), kThreads}, stream, a);
  const int each = rows_of_block(batch, resident(group_advantages_backward_kernel<T>));
  launch("group_advantages_backward", group_advantages_backward_kernel<T>, Grid{quotient_up(batch, each), 1, kThreads},
         stream, a, each);
}

template void group_advantages<float>(const AdvantagesArgs<float>&, void*);
template void group_advantages<double>(const AdvantagesArgs<double>&, void*);
template void group_advantages_backward<float>(const AdvantagesArgs<float>&, void*);
template void group_advantages_backward<double>(const AdvantagesArgs<double>&, void*);

}  // namespace rewardops::cuda
