// Slices of rows of logits in shared memory: copied there, read and written by packs.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#include "rewardops/cuda/rows.cuh"

namespace rewardops::cuda::logits {

constexpr int kPackBytes = 16;

// ---- numbers -----------------------------------------------------------------------------------------------

__device__ inline float widened(float x) { return x; }
__device__ inline float widened(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widened(__half x) { return __half2float(x); }

template <typename T>
__device__ T narrowed(float x) {
  if constexpr (sizeof(T) == sizeof(float)) return x;
  else if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(x);
  else return __float2half_rn(x);
}

// ---- packs of a slice --------------------------------------------------------------------------------------

template <typename T>
constexpr int kPack = kPackBytes / static_cast<int>(sizeof(T));
template <typename T>
using Vector = Pack<T, kPack<T>>;

template <typename T>
__device__ const Vector<T>& pack_at(const T* at) {
  return *reinterpret_cast<const Vector<T>*>(at);
}
template <typename T>
__device__ Vector<T>& pack_at(T* at) {
  return *reinterpret_cast<Vector<T>*>(at);
}

// Columns in front of the first whose address is a multiple of a pack's size, of `count`.
template <typename T>
__device__ int lead_of(const T* row, int count) {
  const auto off = static_cast<int>(reinterpret_cast<uintptr_t>(row) % kPackBytes);
  return min(count, (kPackBytes - off) % kPackBytes / static_cast<int>(sizeof(T)));
}

// A pack in float.
template <typename T>
struct Widened {
  float at[kPack<T>];
  __device__ explicit Widened(const Vector<T> pack) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      // bfloat16 is the upper half of a float: one instruction each. The conversion function takes two for every other
      // one.
      uint32_t words[kPack<T> / 2];
      memcpy(words, &pack, sizeof(pack));
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j)
        at[j] = __uint_as_float(j % 2 ? words[j / 2] & 0xffff0000u : words[j / 2] << 16);
    } else {
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) at[j] = widened(pack.at[j]);
    }
  }
};

// The numbers of a pack by words, which have two of 16 bits; the larger ones of two words, NaN ignored.
template <typename T>
using Word = std::conditional_t<std::is_same_v<T, __nv_bfloat16>, __nv_bfloat162,
                                std::conditional_t<std::is_same_v<T, __half>, __half2, float>>;
__device__ inline float larger(float a, float b) { return fmaxf(a, b); }
__device__ inline __nv_bfloat162 larger(__nv_bfloat162 a, __nv_bfloat162 b) { return __hmax2(a, b); }
__device__ inline __half2 larger(__half2 a, __half2 b) { return __hmax2(a, b); }

// The largest of the columns that for_packs deals to the thread, NaN ignored.
template <typename T>
__device__ float largest(const T* slice, int count) {
  constexpr int kWords = kPackBytes / static_cast<int>(sizeof(Word<T>));
  Vector<T> top;
#pragma unroll
  for (int j = 0; j < kPack<T>; ++j) top.at[j] = narrowed<T>(-INFINITY);
  Word<T> tops[kWords];
  memcpy(tops, &top, sizeof top);
  float one = -INFINITY;
  const auto on_pack = [&](int k) {
    const Vector<T> pack = pack_at(slice + k);
    Word<T> words[kWords];
    memcpy(words, &pack, sizeof pack);
#pragma unroll
    for (int j = 0; j < kWords; ++j) tops[j] = larger(tops[j], words[j]);
  };
  for_packs<kPack<T>>(count, 0, on_pack, [&](int k) { one = fmaxf(one, widened(slice[k])); });
  memcpy(&top, tops, sizeof top);
  const Widened<T> x(top);
#pragma unroll
  for (int j = 0; j < kPack<T>; ++j) one = fmaxf(one, x.at[j]);
  return one;
}

// ---- copies to a slice -------------------------------------------------------------------------------------

// Copies a pack to shared memory while the thread goes on.
template <typename T>
__device__ void copy_pack(T* to, const T* from) {
  __pipeline_memcpy_async(to, from, kPackBytes);
}
// Waits for the copies of the warp's lanes.
__device__ inline void wait_for_copies() {
  __pipeline_commit();
  __pipeline_wait_prior(0);
  __syncwarp();
}

// Copies `count` columns of a row to shared memory, the block's slice: where the row is aligned, each thread those that
// for_packs deals to it without a lead, and without waiting for them.
template <typename T>
__device__ void load_slice(const T* row, int count, T* slice) {
  const int lead = lead_of(row, count);
  const auto one = [&](int k) { slice[k] = row[k]; };
  if (!lead) return for_packs<kPack<T>>(count, 0, [&](int k) { copy_pack(slice + k, row + k); }, one);
  const auto apart = [&](int k) {
    const Vector<T> pack = pack_at(row + k);
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) slice[k + j] = pack.at[j];
  };
  __syncthreads();  // other threads may still read the columns of the previous row
  for_packs<kPack<T>>(count, lead, apart, one);
  __syncthreads();
}

// Writes zeros to a block's part of the columns [begin, end) of a row.
template <typename T>
__device__ void store_zeros(T* row, int64_t begin, int64_t end, int rank, int blocks) {
  const int64_t part = ((end - begin) / blocks / kPack<T> + 1) * kPack<T>, low = begin + rank * part;
  const auto count = static_cast<int>(max(min(end - low, part), int64_t{0}));
  T* const at = row + low;
  for_packs<kPack<T>>(
      count, lead_of(at, count), [&](int k) { pack_at(at + k) = Vector<T>{}; }, [&](int k) { at[k] = T{}; });
}

}  // namespace rewardops::cuda::logits
