// Returns on the GPU: scans along rows.
#pragma once

#include "rewardops/returns.h"

namespace rewardops::cuda {

// The launch of a scan.
struct ScanLaunch {
  int threads;     // threads per block
  int64_t chunks;  // tiles of the longest row, each a block that looks back; 0: one block walks a whole row
  void* state;     // scan_state bytes of zeros, if there are chunks
  void* stream;
};

// The number of multiprocessors of the current device.
int multiprocessors();
// The bytes of ScanLaunch::state.
int64_t scan_state(int64_t batch, int64_t chunks);
// Tokens of a tile.
int64_t scan_tile(int threads);

template <typename T>
void td_scan(const TdArgs<T>& a, const ScanLaunch& how);

enum class Returns : int { extremes, extremes_backward, softmin_returns, softmin_returns_backward };

template <typename T>
void returns(Returns which, const ReturnsArgs<T>& a, const ScanLaunch& how);

}  // namespace rewardops::cuda
