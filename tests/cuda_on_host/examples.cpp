// Kernels that show what the harness runs, and faults that it finds. The first argument names the case.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#include <cuda_runtime.h>

#include <cuda/atomic>
#include <string>
#include <vector>

namespace {

constexpr unsigned kAll = 0xffffffffu;

void expect(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "wrong: %s\n", what);
  std::exit(1);
}

// ---- right kernels -----------------------------------------------------------------------------------------

template <typename T>
__device__ T warp_sum(T x) {
  for (int delta = 16; delta > 0; delta /= 2) x += __shfl_xor_sync(kAll, x, delta);
  return x;
}

// The sum of each block's part, and of all by an atomic.
template <typename T>
__global__ void sum_kernel(const T* in, int n, T* parts, T* total) {
  __shared__ T warps[32];
  T x = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) x += in[i];
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  if (threadIdx.x < 32) {
    x = warp_sum(threadIdx.x < blockDim.x / 32 ? warps[threadIdx.x] : T{0});
    if (threadIdx.x == 0) {
      parts[blockIdx.x] = x;
      atomicAdd(total, x);
    }
  }
}

// Running sums from the right, a row a block: shuffles in a warp, shared memory between them, a carry between tiles.
__global__ void scan_kernel(const float* in, float* out, int width) {
  float* warps = cuda_on_host::shared<float>();
  const float* row = in + blockIdx.x * width;
  float carry = 0;
  const int tiles = (width + blockDim.x - 1) / blockDim.x;
  for (int tile = tiles - 1; tile >= 0; --tile) {
    const int t = tile * blockDim.x + threadIdx.x;
    float x = t < width ? row[t] : 0.f;
    for (unsigned delta = 1; delta < 32; delta *= 2) {
      const float right = __shfl_down_sync(kAll, x, delta);
      if (threadIdx.x % 32 + delta < 32) x += right;
    }
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
    __syncthreads();
    for (unsigned w = threadIdx.x / 32 + 1; w < blockDim.x / 32; ++w) x += warps[w];
    if (t < width) out[blockIdx.x * width + t] = x + carry;
    float all = 0;
    for (unsigned w = 0; w < blockDim.x / 32; ++w) all += warps[w];
    carry += all;
    __syncthreads();
  }
}

// Votes under a mask that is not the whole warp, equal values, and counts over the block.
__global__ void votes_kernel(unsigned* out) {
  const unsigned lane = threadIdx.x % 32;
  if (threadIdx.x < 8) {
    const unsigned odd = __ballot_sync(0xffu, lane & 1);
    const unsigned same = __match_any_sync(0xffu, lane / 2);
    if (lane == 0) out[0] = odd;
    if (lane == 5) out[1] = same;
  }
  const int count = __syncthreads_count(threadIdx.x % 3 == 0);
  const int any = __syncthreads_or(threadIdx.x == 41), all = __syncthreads_and(threadIdx.x != 41);
  if (threadIdx.x == 0) {
    out[2] = count;
    out[3] = any * 2 + all;
  }
  const float up = __shfl_up_sync(kAll, static_cast<float>(lane), 3), of = __shfl_sync(kAll, float(lane), 9, 8);
  if (threadIdx.x == 7) out[4] = static_cast<unsigned>(up * 100 + of);
}

// A block waits for what the one before it leaves, as in a look-back; blocks run in order.
__global__ void chain_kernel(int* values, int* ready) {
  using flag = cuda::atomic_ref<int, cuda::thread_scope_device>;
  if (threadIdx.x == 0) {
    while (blockIdx.x > 0 && !flag(ready[blockIdx.x - 1]).load(cuda::std::memory_order_acquire)) {}
    values[blockIdx.x] = blockIdx.x ? values[blockIdx.x - 1] * 2 : 1;
    flag(ready[blockIdx.x]).store(1, cuda::std::memory_order_release);
  }
}

// A row on the blocks of a cluster: each reduces a part, and reads the others' sums from their shared memory.
__global__ void cluster_kernel(const float4* in, int quarters, float* out) {
  auto cluster = cooperative_groups::this_cluster();
  float* sums = cuda_on_host::shared<float>();
  float x = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < quarters; i += gridDim.x * blockDim.x) {
    const float4 four = in[i];
    x += four.x + four.y + four.z + four.w;
  }
  x = warp_sum(x);
  if (threadIdx.x == 0) sums[0] = x;
  cluster.sync();
  if (threadIdx.x == 0) {
    float total = 0;
    for (unsigned rank = 0; rank < cluster.num_blocks(); ++rank) total += *cluster.map_shared_rank(sums, rank);
    out[blockIdx.x] = total;
  }
  cluster.sync();  // nobody leaves while its memory is read
}

// A copy that a thread waits for: what is in its place before and after that.
__global__ void copy_kernel(const float4* in, float4* before, float4* after) {
  float4* kept = cuda_on_host::shared<float4>() + threadIdx.x;
  *kept = make_float4(0, 0, 0, 0);
  __pipeline_memcpy_async(kept, in + threadIdx.x, sizeof(float4));
  __pipeline_commit();
  before[threadIdx.x] = *kept;
  __pipeline_wait_prior(0);
  after[threadIdx.x] = *kept;
}

// One shuffle and one count right after the other: what a lane has left stays until the slowest has read it. The
// quarters of a warp come by turns under one mask each.
__global__ void relay_kernel(unsigned* wrong) {
  const unsigned lane = threadIdx.x % 32, first = lane / 8 * 8, quarter = 0xffu << first;
  for (unsigned round = 0; round < 40; ++round) {
    if (__shfl_sync(kAll, lane * round, round % 32) != round % 32 * round) atomicAdd(wrong, 1);
    if (__shfl_sync(quarter, lane + round, round % 8, 8) != first + round % 8 + round) atomicAdd(wrong, 1);
    if (__syncthreads_count(threadIdx.x < round) != int(round)) atomicAdd(wrong, 1);
  }
}

// Threads of one block that wait for one another without a barrier: for a flag, for a lock, for a counter.
__global__ void poll_kernel(int* flag, int* lock, int* counter) {
  using ref = cuda::atomic_ref<int, cuda::thread_scope_block>;
  if (threadIdx.x < 32) {
    while (!ref(*flag).load(cuda::std::memory_order_acquire)) __nanosleep(20);
  } else if (threadIdx.x == 40) {
    ref(*flag).store(1, cuda::std::memory_order_release);
  }
  if (threadIdx.x % 32 == 0) {
    while (atomicCAS(lock, 0, 1) != 0) {}
    atomicAdd(counter, 1);
    atomicExch(lock, 0);
  }
  while (atomicAdd(counter, 0) < 3) {}
}

// Arguments by value, of any size, as launchers hand them on.
struct Arguments {
  const float* in;
  float* out;
  int n;
  float weights[200];
};

template <int kBlock>
__global__ void __launch_bounds__(kBlock, 2) weigh_kernel(const __grid_constant__ Arguments a, double scale) {
  float* tile = cuda_on_host::shared<float>();
  const int i = blockIdx.x * kBlock + threadIdx.x;
  tile[threadIdx.x] = i < a.n ? __ldg(a.in + i) : 0.f;
  __syncthreads();
  if (i < a.n) __stcs(a.out + i, tile[kBlock - 1 - threadIdx.x] * a.weights[i % 200] * static_cast<float>(scale));
}

template <int kBlock>
cudaError_t weigh(const Arguments& a, size_t shared_bytes) {
  cudaLaunchConfig_t config = {};
  config.gridDim = (a.n + kBlock - 1) / kBlock;
  config.blockDim = kBlock;
  config.dynamicSmemBytes = shared_bytes;
  return cudaLaunchKernelEx(&config, weigh_kernel<kBlock>, a, 2);
}

__global__ void functions_kernel(unsigned* right) {
  const int lane = threadIdx.x;
  bool all = __reduce_add_sync(kAll, lane) == 496 && __reduce_min_sync(kAll, 5 - lane) == -26;
  all &= __reduce_max_sync(kAll, unsigned(lane)) == 31 && __reduce_or_sync(kAll, 1u << lane) == kAll;
  all &= min(-1, 2u) == 2 && max(3LL, 4) == 4 && min(1.f, 2.) == 1 && max(NAN, 2.f) == 2;
  all &= __clz(1) == 31 && __clzll(0) == 64 && __ffs(8) == 4 && __brev(6) == 0x60000000u && __popcll(~0ull) == 64;
  all &= __float_as_int(1.f) == 0x3f800000 && __uint_as_float(0x40000000u) == 2 && __expf(0.f) == 1;
  atomicAnd(right, all ? kAll : 0);
}

// ---- faults ------------------------------------------------------------------------------------------------

// All are there, but half of a warp at one barrier and half at another.
__global__ void deadlock_kernel() {
  if (threadIdx.x < 16) __syncthreads();
  else __syncwarp();
}

// Nobody ever sets it.
__global__ void poll_in_vain_kernel(int* flag) {
  while (!cuda::atomic_ref<int>(*flag).load()) {}
}

// No barrier between what one warp writes and another reads.
__global__ void race_kernel(int* out) {
  __shared__ int value;
  if (threadIdx.x == 0) value = 7;
  if (threadIdx.x == 40) *out = value;
}

__global__ void left_kernel() {
  if (threadIdx.x == 3) return;
  __syncthreads();
}

__global__ void left_warp_kernel(int* out) {
  if (threadIdx.x == 3) return;
  out[threadIdx.x] = __shfl_sync(kAll, int(threadIdx.x), 0);
}

// Two blocks of a cluster without a barrier between them.
__global__ void cluster_race_kernel(int* out) {
  auto cluster = cooperative_groups::this_cluster();
  int* value = cuda_on_host::shared<int>();
  if (threadIdx.x == 0) *value = blockIdx.x;
  if (threadIdx.x == 1) out[blockIdx.x] = *cluster.map_shared_rank(value, 1 - cluster.block_rank());
}

__global__ void lane_kernel() { __syncwarp(0xfffffffeu); }

__global__ void bounds_kernel() { cuda_on_host::shared<int>()[threadIdx.x + 1] = 1; }

// ---- numbers of 16 bits ------------------------------------------------------------------------------------

// Every number comes back; what lies between two goes to the nearer one, and to the even one from the middle.
template <typename T>
void expect_rounding(unsigned infinity) {
  for (unsigned bits = 0; bits < 0x10000; ++bits) {
    const float x = T::from_bits(static_cast<uint16_t>(bits));
    const bool nan = (bits & 0x7fff) > infinity;
    expect(std::isnan(x) == nan, "a NaN is one");
    expect(nan ? std::isnan(float(T(x))) : T(x).bits() == bits, "there and back");
    if ((bits & 0x7fff) + 1 >= infinity) continue;
    const double next = float(T::from_bits(static_cast<uint16_t>(bits + 1))), middle = (x + next) / 2;
    expect(T(middle).bits() == bits + bits % 2, "of two as near, the even one");
    expect(T(middle + (x - next) * 1e-9).bits() == bits && T(middle - (x - next) * 1e-9).bits() == bits + 1, "nearest");
  }
  expect(T(INFINITY).bits() == infinity && T(-1e300).bits() == (infinity | 0x8000), "infinity");
}

}  // namespace

int main(int, char** argv) {
  using cuda_on_host::launch;
  using cuda_on_host::launch_clusters;
  const std::string name = argv[1];
  if (name == "sum") {
    std::vector<double> in(1000), parts(3);
    double want = 0, total = 0;
    for (size_t i = 0; i < in.size(); ++i) want += in[i] = i * 0.25 - 60;
    launch(sum_kernel<double>, {3}, {96}, 0, in.data(), 1000, parts.data(), &total);
    expect(parts[0] + parts[1] + parts[2] == want, "parts");
    expect(total == want, "total");
  } else if (name == "scan") {
    const int width = 150;
    std::vector<float> in(2 * width), out(2 * width);
    for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i % 7) - 2;
    launch(scan_kernel, {2}, {64}, 2 * sizeof(float), in.data(), out.data(), width);
    for (int row = 0; row < 2; ++row) {
      float want = 0;
      for (int t = width - 1; t >= 0; --t) {
        want += in[row * width + t];
        expect(out[row * width + t] == want, "scan");
      }
    }
  } else if (name == "votes") {
    std::vector<unsigned> out(5);
    launch(votes_kernel, {1}, {64}, 0, out.data());
    expect(out[0] == 0xaau, "ballot");
    expect(out[1] == 0x30u, "match");
    expect(out[2] == 22, "count");
    expect(out[3] == 2, "or, and");
    expect(out[4] == 401, "shuffles");
  } else if (name == "chain") {
    std::vector<int> values(6), ready(6);
    launch(chain_kernel, {6}, {32}, 0, values.data(), ready.data());
    expect(values[5] == 32, "chain");
  } else if (name == "cluster") {
    std::vector<float4> in(300);
    float want = 0, out[4];
    for (int i = 0; i < 300; ++i) {
      in[i] = make_float4(i, 1, 2, -i);
      want += 3;
    }
    launch_clusters(cluster_kernel, 4, {4}, {32}, sizeof(float), in.data(), 300, out);
    for (const float total : out) expect(total == want, "cluster");
  } else if (name == "copy") {
    std::vector<float4> in(64), before(64), after(64);
    for (int i = 0; i < 64; ++i) in[i] = make_float4(i, 1, 2, 3);
    launch(copy_kernel, {1}, {64}, 64 * sizeof(float4), in.data(), before.data(), after.data());
    for (int i = 0; i < 64; ++i) expect(before[i].y == 0 && after[i].x == i && after[i].w == 3, "copy");
  } else if (name == "relay") {
    unsigned wrong = 0;
    launch(relay_kernel, {2}, {64}, 0, &wrong);
    expect(wrong == 0, "shuffles and counts");
  } else if (name == "poll") {
    int flag = 0, lock = 0, counter = 0;
    launch(poll_kernel, {1}, {96}, 0, &flag, &lock, &counter);
    expect(counter == 3, "lock");
  } else if (name == "launch") {
    std::vector<float> in(300, 3.f), out(300);
    Arguments a = {in.data(), out.data(), 300, {}};
    for (int k = 0; k < 200; ++k) a.weights[k] = static_cast<float>(k);
    expect(weigh<64>(a, 64 * sizeof(float)) == cudaSuccess, "launch");
    for (int i = 0; i < 256; ++i) expect(out[i] == 6.f * (i % 200), "weigh");
    expect(weigh<64>(a, 50000) == cudaErrorInvalidValue, "too much shared memory");
    expect(cudaGetLastError() == cudaErrorInvalidValue && cudaGetLastError() == cudaSuccess, "last error");
    cudaFuncSetAttribute(weigh_kernel<64>, cudaFuncAttributeMaxDynamicSharedMemorySize, 50000);
    expect(weigh<64>(a, 50000) == cudaSuccess, "allowed more shared memory");
    expect(weigh<2048>(a, 8192) == cudaErrorInvalidConfiguration, "too many threads");
    a.n = 0;
    expect(weigh<64>(a, 256) == cudaErrorInvalidConfiguration, "no blocks");
  } else if (name == "launch_cluster") {
    std::vector<float4> in(300, make_float4(1, 2, 3, 4));
    float out[4];
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {4, 1, 1};
    cudaLaunchConfig_t config = {4, 32, sizeof(float), nullptr, &attribute, 1};
    expect(cudaLaunchKernelEx(&config, cluster_kernel, in.data(), 300, out) == cudaSuccess, "launch");
    for (const float total : out) expect(total == 3000, "cluster");
    config.gridDim = 6;
    expect(cudaLaunchKernelEx(&config, cluster_kernel, in.data(), 300, out) != cudaSuccess, "no multiple");
  } else if (name == "functions") {
    unsigned right = 1;
    launch(functions_kernel, {1}, {32}, 0, &right);
    expect(right == 1, "functions");
  } else if (name == "numbers") {
    expect_rounding<__nv_bfloat16>(0x7f80);
    expect_rounding<__half>(0x7c00);
    expect(__half2float(__float2half(65519.f)) == 65504 && std::isinf(__half2float(65520)), "the largest half");
    expect(__bfloat162float(__float2bfloat16(1.00390625f)) == 1 && float(__nv_bfloat16(3)) == 3, "bfloat16");
    expect(sizeof(__half) == 2 && alignof(__half2) == 4, "sizes");
  } else if (name == "deadlock") {
    launch(deadlock_kernel, {1}, {32}, 0);
  } else if (name == "poll_in_vain") {
    int flag = 0;
    launch(poll_in_vain_kernel, {1}, {1}, 0, &flag);
  } else if (name == "cluster_race") {
    int out[2];
    launch_clusters(cluster_race_kernel, 2, {2}, {32}, sizeof(int), out);
  } else if (name == "race") {
    int out = 0;
    launch(race_kernel, {1}, {64}, 0, &out);
  } else if (name == "left") {
    launch(left_kernel, {1}, {64}, 0);
  } else if (name == "left_warp") {
    int out[32];
    launch(left_warp_kernel, {1}, {32}, 0, out);
  } else if (name == "lane") {
    launch(lane_kernel, {1}, {32}, 0);
  } else if (name == "bounds") {
    launch(bounds_kernel, {1}, {32}, 32 * sizeof(int));
  } else {
    return 2;
  }
  std::puts("ok");
  return 0;
}
