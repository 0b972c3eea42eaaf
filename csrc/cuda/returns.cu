#include "cuda/returns.h"

#include "cuda/launch.h"
#include "rewardops/cuda/returns.cuh"
#include "rewardops/cuda/td.cuh"

namespace rewardops::cuda {
namespace {

template <typename P, typename Args>
void scan(const char* name, const Args& a, const ScanLaunch& how) {
  const ScanGrid grid{a.rows.batch, how.chunks, how.state};
  const int64_t blocks = a.rows.batch * (how.chunks > 0 ? how.chunks : 1);
  launch(name, scan_kernel<P, Args>, Grid{blocks, 1, static_cast<unsigned>(how.threads)}, how.stream, a, grid);
}

}  // namespace

int multiprocessors() { return attribute(cudaDevAttrMultiProcessorCount); }
int64_t scan_state(int64_t batch, int64_t chunks) { return (1 + batch * chunks) * kSlotBytes; }
int64_t scan_tile(int threads) { return static_cast<int64_t>(threads) * kItems; }

template <typename T, bool kSimple>
void td_scan_by(const TdArgs<T>& a, const ScanLaunch& how) {
  if (a.backward) scan<TdBackward<T, kSimple>>("td_scan_backward", a, how);
  else if (a.values.data) scan<TdForward<T, true, kSimple>>("td_scan", a, how);
  else scan<TdForward<T, false, kSimple>>("td_scan", a, how);
}

// The usual case, with one gamma and lambda per row and no importance weights, has kernels with fewer registers. In
// double it uses the general kernels.
template <typename T>
void td_scan(const TdArgs<T>& a, const ScanLaunch& how) {
  if constexpr (sizeof(T) == sizeof(float))
    if (!a.rho.data && !a.trace.data && !a.gammas.data && !a.lambdas.data) return td_scan_by<T, true>(a, how);
  td_scan_by<T, false>(a, how);
}

template <typename T>
void returns(Returns which, const ReturnsArgs<T>& a, const ScanLaunch& how) {
  switch (which) {
    case Returns::extremes: return scan<ExtremesForward<T>>("extreme_returns", a, how);
    case Returns::extremes_backward: return scan<ExtremesBackward<T>>("extreme_returns_backward", a, how);
    case Returns::softmin_returns: return scan<SoftminForward<T>>("softmin_returns", a, how);
    case Returns::softmin_returns_backward: return scan<SoftminBackward<T>>("softmin_returns_backward", a, how);
  }
}

template void td_scan<float>(const TdArgs<float>&, const ScanLaunch&);
template void td_scan<double>(const TdArgs<double>&, const ScanLaunch&);
template void returns<float>(Returns, const ReturnsArgs<float>&, const ScanLaunch&);
template void returns<double>(Returns, const ReturnsArgs<double>&, const ScanLaunch&);

}  // namespace rewardops::cuda
