// A launcher as the package would have one: nvcc compiles it for a GPU, and the harness, as it is, for the host.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cuda/atomic>

namespace {

template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
#ifdef CUDA_ON_HOST
  return cuda_on_host::shared<T>();
#else
  extern __shared__ __align__(16) unsigned char bytes[];
  return reinterpret_cast<T*>(bytes);
#endif
}

struct Rows {
  const __nv_bfloat16* in;
  float* out;
  unsigned* done;
  int width;
};

// The sum of each row, on a cluster of two blocks.
template <int kBlock>
__global__ void __launch_bounds__(kBlock) sum_rows(const __grid_constant__ Rows rows) {
  const auto cluster = cooperative_groups::this_cluster();
  float* sums = dynamic_shared<float>();
  __shared__ __align__(16) float unused[4];  // for both blocks on the host, so nothing may be kept in it
  const int row = blockIdx.x / cluster.num_blocks();
  float x = 0;
#pragma unroll 4
  for (int i = cluster.block_rank() * kBlock + threadIdx.x; i < rows.width; i += cluster.num_blocks() * kBlock)
    x += __bfloat162float(rows.in[static_cast<size_t>(row) * rows.width + i]);
#pragma unroll
  for (int delta = 16; delta > 0; delta /= 2) x += __shfl_xor_sync(0xffffffffu, x, delta);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  cluster.sync();
  if (cluster.block_rank() == 0 && threadIdx.x == 0) {
    float total = 0;
    for (unsigned rank = 0; rank < cluster.num_blocks(); ++rank)
      for (int w = 0; w < kBlock / 32; ++w) total += cluster.map_shared_rank(sums, rank)[w];
    rows.out[row] = total;
    cuda::atomic_ref<unsigned, cuda::thread_scope_device>(*rows.done).fetch_add(1, cuda::std::memory_order_relaxed);
  }
  cluster.sync();
  (void)unused;
}

}  // namespace

extern "C" int sum_rows_bf16(const void* in, float* out, unsigned* done, int rows, int width, cudaStream_t stream) {
  constexpr int kBlock = 256;
  if (const cudaError_t error = cudaMemsetAsync(done, 0, sizeof *done, stream)) return error;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = 2;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(2 * rows);
  config.blockDim = dim3(kBlock);
  config.dynamicSmemBytes = kBlock / 32 * sizeof(float);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  const Rows arguments = {static_cast<const __nv_bfloat16*>(in), out, done, width};
  return cudaLaunchKernelEx(&config, sum_rows<kBlock>, arguments);
}
