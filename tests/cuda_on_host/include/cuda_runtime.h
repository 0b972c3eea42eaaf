// The part of the CUDA runtime that launchers use, on a device that is the host. Streams are in order of the calls.
#pragma once

#include "../cuda_on_host.h"

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNotSupported = 801,
  cudaErrorInvalidClusterSize = 912,
};

using cudaStream_t = struct CUstream_st*;

enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrWarpSize = 10,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 14,
};

enum cudaLaunchAttributeID {
  cudaLaunchAttributeCooperative = 2,
  cudaLaunchAttributeClusterDimension = 4,
  cudaLaunchAttributeProgrammaticStreamSerialization = 6,
};

union cudaLaunchAttributeValue {
  char pad[64];
  int cooperative;
  struct {
    unsigned x, y, z;
  } clusterDim;
  int programmaticStreamSerializationAllowed;
};

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace cuda_on_host {

// What an H100 has; of multiprocessors a few, so that small tests give each more than one block.
constexpr int kProcessors = 4, kMaxShared = 232448;

struct Allowed {
  int shared = 48 << 10;
  bool large_clusters = false;
};
CUDA_ON_HOST_STATE std::map<const void*, Allowed> allowed;  // by kernel
CUDA_ON_HOST_STATE std::mutex allowed_mutex;
CUDA_ON_HOST_STATE thread_local cudaError_t last_error = cudaSuccess;

inline cudaError_t done(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

inline Allowed allowed_of(const void* kernel) {
  const std::lock_guard lock(allowed_mutex);
  return allowed[kernel];
}

// The blocks of a cluster, or 0 where it goes along more than x.
inline unsigned cluster_of(const cudaLaunchConfig_t& config) {
  for (unsigned k = 0; k < config.numAttrs; ++k) {
    if (config.attrs[k].id != cudaLaunchAttributeClusterDimension) continue;
    const auto& cluster = config.attrs[k].val.clusterDim;
    return cluster.y == 1 && cluster.z == 1 ? cluster.x : 0;
  }
  return 1;
}

inline cudaError_t check(const cudaLaunchConfig_t& config, const void* kernel) {
  const auto product = [](dim3 d) { return double(d.x) * d.y * d.z; };
  const dim3 grid = config.gridDim, size = config.blockDim;
  if (product(grid) == 0 || grid.x > 0x7fffffffu || grid.y > 0xffff || grid.z > 0xffff || product(size) == 0 ||
      product(size) > 1024 || size.z > 64)
    return cudaErrorInvalidConfiguration;
  const Allowed may = allowed_of(kernel);
  if (config.dynamicSmemBytes > size_t(may.shared)) return cudaErrorInvalidValue;
  for (unsigned k = 0; k < config.numAttrs; ++k)
    if (config.attrs[k].id == cudaLaunchAttributeCooperative && config.attrs[k].val.cooperative)
      return cudaErrorNotSupported;  // blocks run one after another
  const unsigned cluster = cluster_of(config);
  if (cluster == 0) return cudaErrorNotSupported;
  if (cluster > (may.large_clusters ? 16u : 8u)) return cudaErrorInvalidClusterSize;
  return grid.x % cluster ? cudaErrorInvalidConfiguration : cudaSuccess;
}

}  // namespace cuda_on_host

template <typename... Expected, typename... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Actual&&... arguments) {
  using namespace cuda_on_host;
  if (const auto error = check(*config, reinterpret_cast<const void*>(kernel))) return done(error);
  [&](Expected... converted) {
    launch_clusters(kernel, cluster_of(*config), config->gridDim, config->blockDim, config->dynamicSmemBytes,
                    converted...);
  }(std::forward<Actual>(arguments)...);
  return cudaSuccess;
}

template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute, int value) {
  using namespace cuda_on_host;
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize && (value < 0 || value > kMaxShared))
    return done(cudaErrorInvalidValue);
  const std::lock_guard lock(allowed_mutex);
  Allowed& may = allowed[reinterpret_cast<const void*>(kernel)];
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) may.shared = value;
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) may.large_clusters = value != 0;
  return cudaSuccess;
}

template <typename... Parameters>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, void (*kernel)(Parameters...),
                                           const cudaLaunchConfig_t* config) {
  using namespace cuda_on_host;
  if (const auto error = check(*config, reinterpret_cast<const void*>(kernel))) return done(error);
  *clusters = std::max(kProcessors / static_cast<int>(cluster_of(*config)), 1);
  return cudaSuccess;
}

template <typename... Parameters>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(Parameters...), int threads, size_t) {
  *blocks = 2048 / threads;
  return cudaSuccess;
}

inline cudaError_t cudaPeekAtLastError() { return cuda_on_host::last_error; }
inline cudaError_t cudaGetLastError() { return std::exchange(cuda_on_host::last_error, cudaSuccess); }

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorNotSupported: return "operation not supported";
    case cudaErrorInvalidClusterSize: return "cluster misconfiguration";
  }
  return "unrecognized error code";
}

inline cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t = nullptr) {
  std::memset(at, value, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return cuda_on_host::done(cudaErrorInvalidValue);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 << 10; break;
    case cudaDevAttrWarpSize: *value = warpSize; break;
    case cudaDevAttrMultiProcessorCount: *value = cuda_on_host::kProcessors; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = cuda_on_host::kMaxShared; break;
    default: return cuda_on_host::done(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}
