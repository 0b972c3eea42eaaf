// Blocks and warps: lanes, shared memory, clusters, reductions, vector loads. Every family uses it.
#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace rewardops::cuda {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kWarp = 32;
constexpr int kThreads = 256;  // threads per block; scans and logits launch fewer where rows are short
constexpr int kWarps = kThreads / kWarp;

__device__ inline int lane() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ inline int warp() { return static_cast<int>(threadIdx.x) / kWarp; }
__device__ inline int threads() { return static_cast<int>(blockDim.x); }

// The block's dynamic shared memory, aligned for 16-byte accesses.
template <typename T>
__device__ T* dynamic_shared() {
#ifdef __CUDACC__
  extern __shared__ __align__(128) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
#else
  return cuda_on_host::shared<T>();
#endif
}

// The block's cluster; on architectures before 9, which have none, the block alone.
struct Cluster {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  __device__ int rank() const { return 0; }
  __device__ int size() const { return 1; }
  __device__ void sync() const { __syncthreads(); }
  template <typename T>
  __device__ T* at(T* shared, int) const {
    return shared;
  }
#else
  __device__ int rank() const { return static_cast<int>(cooperative_groups::this_cluster().block_rank()); }
  __device__ int size() const { return static_cast<int>(cooperative_groups::this_cluster().num_blocks()); }
  __device__ void sync() const { cooperative_groups::this_cluster().sync(); }
  // The same address in the dynamic shared memory of another block of the cluster.
  template <typename T>
  __device__ T* at(T* shared, int rank) const {
    return cooperative_groups::this_cluster().map_shared_rank(shared, static_cast<unsigned>(rank));
  }
#endif
};

// ---- reductions --------------------------------------------------------------------------------------------

struct Add {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
// The larger of two integers.
struct Max {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};
// The larger of two numbers; a NaN is ignored.
struct MaxNumber {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};
// The smaller of two numbers; NaN if either is NaN.
struct MinOrNan {
  __device__ double operator()(double a, double b) const { return b < a || b != b ? b : a; }
};

// The reduction of every kLanes lanes; all of them get the same bits.
template <int kLanes = kWarp, typename T, typename Op>
__device__ T reduce_lanes(T x, Op op) {
#pragma unroll
  for (int distance = kLanes / 2; distance; distance /= 2) x = op(x, __shfl_xor_sync(kAll, x, distance));
  return x;
}

// The order in which the results of warps are reduced. Both are deterministic, but the last bits of a sum depend on it:
// advantages are `pairwise`, trees and sums over a row's tokens `in_turn`, so that their results do not change.
enum class WarpOrder { pairwise, in_turn };

// The reduction of N values of each of kThreads threads; all threads get the same bits. `partial` is shared memory, and
// free again on return.
template <WarpOrder kOrder, int N, int kSlots, typename T, typename Op>
__device__ void reduce_block(T (&x)[N], T (&partial)[kWarps][kSlots], Op op) {
  static_assert(N <= kSlots);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    x[k] = reduce_lanes(x[k], op);
    if (lane() == 0) partial[warp()][k] = x[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < N; ++k) {
    if constexpr (kOrder == WarpOrder::pairwise) {
      x[k] = reduce_lanes<kWarps>(partial[lane() % kWarps][k], op);
    } else {
      x[k] = partial[0][k];
#pragma unroll
      for (int w = 1; w < kWarps; ++w) x[k] = op(x[k], partial[w][k]);
    }
  }
  __syncthreads();
}

template <typename T, typename Op>
__device__ T reduce_block(T x, Op op) {
  __shared__ T partial[kWarps][1];
  T one[1] = {x};
  reduce_block<WarpOrder::in_turn>(one, partial, op);
  return one[0];
}

// ---- numbers -----------------------------------------------------------------------------------------------

// The product, but 0 where the factor is 0, whatever the value.
__device__ inline double times(double factor, double value) { return factor == 0 ? 0 : factor * value; }

// N numbers, moved by one load or store. Its address is a multiple of their size, or of 16 bytes if that is more.
template <typename T, int N>
struct alignas(sizeof(T) * N > 16 ? 16 : sizeof(T) * N) Pack {
  T at[N];
};

template <int N, typename T>
__device__ bool aligned(const T* address) {
  return reinterpret_cast<uintptr_t>(address) % alignof(Pack<T, N>) == 0;
}

}  // namespace rewardops::cuda
