// Returns on the GPU: scans along rows.
#pragma once

#include "rewardops/returns.h"

namespace rewardops::cuda {

// How a scan is run: threads of a block, and tiles of the longest row that are blocks of their own, with memory for
// them to look back to (zeros), or 0: a block walks its row.
struct ScanLaunch {
  int threads;
  int64_t chunks;
  void* state;
  void* stream;
};

// Of the current device.
int multiprocessors();
// Bytes of state for so many rows and chunks.
int64_t scan_state(int64_t batch, int64_t chunks);
// Tokens of a tile.
int64_t scan_tile(int threads);

template <typename T>
void td_scan(const TdArgs<T>& a, const ScanLaunch& how);

enum class Returns : int { extremes, extremes_backward, softmin_returns, softmin_returns_backward };

template <typename T>
void returns(Returns which, const ReturnsArgs<T>& a, const ScanLaunch& how);

}  // namespace rewardops::cuda
