// Slices of rows of logits in shared memory: copied there, read and written by packs.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#include "rewardops/cuda/rows.cuh"

namespace rewardops::cuda::logits {

constexpr int kPackBytes = 16;
constexpr int kInFlight = 8;  // packs that a thread loads before it waits for the first

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

template <typename T>
__device__ float max_with(float top, const Vector<T>& pack) {
  const Widened<T> x(pack);
#pragma unroll
  for (int j = 0; j < kPack<T>; ++j) top = fmaxf(top, x.at[j]);
  return top;
}

// Copies `count` columns of a row to shared memory, the block's slice. Returns the largest of the columns that
// for_packs deals to the thread, NaN ignored.
template <typename T>
__device__ float load_slice(const T* row, int count, T* slice) {
  float top = -INFINITY;
  if (!aligned<kPack<T>>(row)) {
    __syncthreads();  // other threads may still read the columns of the previous row
#pragma unroll 8
    for (int k = static_cast<int>(threadIdx.x); k < count; k += threads()) slice[k] = row[k];
    __syncthreads();
    for_packs<kPack<T>>(
        count, true, [&](int k) { top = max_with<T>(top, pack_at(slice + k)); },
        [&](int k) { top = fmaxf(top, widened(slice[k])); });
    return top;
  }
  const int packs = count / kPack<T>, one = packs * kPack<T> + static_cast<int>(threadIdx.x);
  const auto take = [&](int first, bool whole) {
    const auto at = [&](int i) { return (first + i * threads()) * kPack<T>; };
    const auto there = [&](int i) { return whole || first + i * threads() < packs; };
    Vector<T> batch[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i)
      if (there(i)) batch[i] = pack_at(row + at(i));
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (!there(i)) continue;
      pack_at(slice + at(i)) = batch[i];
      top = max_with<T>(top, batch[i]);
    }
  };
  int k = static_cast<int>(threadIdx.x);
  for (; k + (kInFlight - 1) * threads() < packs; k += kInFlight * threads()) take(k, true);
  if (k < packs) take(k, false);
  if (one < count) {
    slice[one] = row[one];
    top = fmaxf(top, widened(slice[one]));
  }
  return top;
}

// Writes zeros to a block's part of the columns [begin, end) of a row.
template <typename T>
__device__ void store_zeros(T* row, int64_t begin, int64_t end, int rank, int blocks) {
  const int64_t part = ((end - begin) / blocks / kPack<T> + 1) * kPack<T>, low = begin + rank * part;
  const int64_t count = end - low < part ? end - low : part;
  T* const at = row + low;
  for_packs<kPack<T>>(
      static_cast<int>(count), aligned<kPack<T>>(at), [&](int k) { pack_at(at + k) = Vector<T>{}; },
      [&](int k) { at[k] = T{}; });
}

}  // namespace rewardops::cuda::logits
