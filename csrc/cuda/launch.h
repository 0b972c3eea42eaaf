// Kernel launches: on the caller's stream, checked, with the kernel's name in error messages.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace rewardops::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// A grid. Its first dimension, the only one of unlimited length, may be cut into clusters of `cluster` blocks.
struct Grid {
  int64_t x;
  unsigned y = 1;
  unsigned threads = 256;
  size_t shared = 0;  // bytes of dynamic shared memory
  unsigned cluster = 1;
};

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const Grid& grid, void* stream, Arguments&&... arguments) {
  constexpr int64_t kMost = 2147483647;
  if (grid.x == 0 || grid.y == 0) return;
  if (grid.x > kMost) throw std::runtime_error(std::string(name) + ": too many blocks, " + std::to_string(grid.x));
  constexpr size_t kWithoutAsking = 48 << 10;
  if (grid.shared > kWithoutAsking)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(grid.shared)),
          name);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3{static_cast<unsigned>(grid.x), grid.y, 1};
  config.blockDim = dim3{grid.threads, 1, 1};
  config.dynamicSmemBytes = grid.shared;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = grid.cluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = grid.cluster > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), name);
}

// An attribute of the current device; callers have selected the device.
inline int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

}  // namespace rewardops::cuda
