// What the kernels of every family use of a block and its warps.
#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace rewardops::cuda {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kWarp = 32;

__device__ inline int lane() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ inline int warp() { return static_cast<int>(threadIdx.x) / kWarp; }

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
  __device__ T* at(T* shared, int) const { return shared; }
#else
  __device__ int rank() const { return static_cast<int>(cooperative_groups::this_cluster().block_rank()); }
  __device__ int size() const { return static_cast<int>(cooperative_groups::this_cluster().num_blocks()); }
  __device__ void sync() const { cooperative_groups::this_cluster().sync(); }
  // The same place in the dynamic shared memory of the block of a rank.
  template <typename T>
  __device__ T* at(T* shared, int rank) const {
    return cooperative_groups::this_cluster().map_shared_rank(shared, static_cast<unsigned>(rank));
  }
#endif
};

// 0 where the factor is, whatever the value.
__device__ inline double times(double factor, double value) { return factor == 0 ? 0 : factor * value; }

// N numbers of one load or store, where the address is a multiple of their size.
template <typename T, int N>
struct alignas(sizeof(T) * N > 16 ? 16 : sizeof(T) * N) Pack {
  T at[N];
};

template <int N, typename T>
__device__ bool aligned(const T* address) {
  return reinterpret_cast<uintptr_t>(address) % alignof(Pack<T, N>) == 0;
}

}  // namespace rewardops::cuda
