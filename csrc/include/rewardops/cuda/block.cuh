// What the kernels of every family use of a block and its warps.
#pragma once

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
