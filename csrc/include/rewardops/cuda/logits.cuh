// Statistics of rows of logits, and the gradient of a loss that is linear in them: a row is read once and written once.
//
// A row lies in the shared memory of the blocks of a cluster, each of which has a slice of it. Every warp sums its part
// relative to the part's largest logit and hands the sums to all blocks; each of them merges all parts in the same
// order, so all have the same bits, and writes its slice of the gradient from what it kept.
//
// Bytes: 2 e V for a row of V logits of e bytes, read and written; what is written per token is nothing beside that.
// 8192 rows of 151,936 are 4.98 GB in bfloat16 and 9.96 GB in float32: 1.16 and 2.32 ms at 4.3 TB/s. A forward and a
// backward pass read the row twice: 1.74 and 3.47 ms. Arithmetic: two powers of two an element, 20 instructions in
// all; while its 4 bytes in bfloat16 are moved, an H200 issues 28.
//
// Why not Triton: a row of 304 KB or 608 KB is in no block's reach, and Triton's programs do not share memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#include "rewardops/cuda/block.cuh"
#include "rewardops/logits.h"

namespace rewardops::cuda::logits {

constexpr int kMostThreads = 256, kPackBytes = 16;
constexpr int kInFlight = 8;  // packs that a thread asks for before it waits for one
constexpr double kLn2 = 0.6931471805599453;

// What is summed beside the total, and what the gradient is made of: the moments are those of p^2, and the mean logit.
enum class Terms : int { total, entropy, moments };

__device__ inline float widened(float x) { return x; }
__device__ inline float widened(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widened(__half x) { return __half2float(x); }

template <typename T>
__device__ T narrowed(float x) {
  if constexpr (sizeof(T) == sizeof(float)) return x;
  else if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(x);
  else return __float2half_rn(x);
}

// ---- a slice and its packs ---------------------------------------------------------------------------------

template <typename T>
constexpr int kPack = kPackBytes / static_cast<int>(sizeof(T));
template <typename T>
using Vector = Pack<T, kPack<T>>;

template <typename T>
__device__ const Vector<T>& pack_at(const T* at) { return *reinterpret_cast<const Vector<T>*>(at); }
template <typename T>
__device__ Vector<T>& pack_at(T* at) { return *reinterpret_cast<Vector<T>*>(at); }

__device__ inline int threads() { return static_cast<int>(blockDim.x); }

// Shares `count` columns among the block's threads: by packs, and one by one what is left or, where rows are not
// aligned, all. A column's pack is the same wherever the row lies, and so is the thread that has it.
template <typename T, typename OnPack, typename OnOne>
__device__ void share(int count, bool packed, OnPack on_pack, OnOne on_one) {
  int k = static_cast<int>(threadIdx.x);
  if (packed) {
    const int packs = count / kPack<T>;
    for (int at = k; at < packs; at += threads()) on_pack(at * kPack<T>);
    k += packs * kPack<T>;
  }
  for (; k < count; k += threads()) on_one(k);
}

template <typename T>
struct Widened {
  float at[kPack<T>];
  __device__ explicit Widened(const Vector<T> pack) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      // The upper half of a float: an instruction each, where the conversion function takes two for every second.
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
__device__ float larger(float top, const Vector<T>& pack) {
  const Widened<T> x(pack);
#pragma unroll
  for (int j = 0; j < kPack<T>; ++j) top = fmaxf(top, x.at[j]);
  return top;
}

// Copies a slice to shared memory; returns the largest of the columns that are the thread's own there, NaN aside.
template <typename T>
__device__ float keep(const T* row, int count, T* kept) {
  float top = -INFINITY;
  if (!aligned<kPack<T>>(row)) {
    __syncthreads();  // the columns are others' own
#pragma unroll 8
    for (int k = static_cast<int>(threadIdx.x); k < count; k += threads()) kept[k] = row[k];
    __syncthreads();
    share<T>(
        count, true, [&](int k) { top = larger<T>(top, pack_at(kept + k)); },
        [&](int k) { top = fmaxf(top, widened(kept[k])); });
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
      pack_at(kept + at(i)) = batch[i];
      top = larger<T>(top, batch[i]);
    }
  };
  int k = static_cast<int>(threadIdx.x);
  for (; k + (kInFlight - 1) * threads() < packs; k += kInFlight * threads()) take(k, true);
  if (k < packs) take(k, false);
  if (one < count) {
    kept[one] = row[one];
    top = fmaxf(top, widened(kept[one]));
  }
  return top;
}

// Zeros in a block's part of the columns [begin, end) of a row.
template <typename T>
__device__ void store_zeros(T* row, int64_t begin, int64_t end, int rank, int blocks) {
  const int64_t part = ((end - begin) / blocks / kPack<T> + 1) * kPack<T>, low = begin + rank * part;
  const int64_t count = end - low < part ? end - low : part;
  T* const at = row + low;
  share<T>(
      static_cast<int>(count), aligned<kPack<T>>(at), [&](int k) { pack_at(at + k) = Vector<T>{}; },
      [&](int k) { at[k] = T{}; });
}

// ---- from logits to exponents ------------------------------------------------------------------------------

template <bool kCapped>
struct Softcap {
  float cap;
  __device__ float operator()(float x) const {
    if constexpr (kCapped) return cap * tanhf(x / cap);
    else return x;
  }
  // 1 - tanh^2 (x / cap) to its own last places, where tanh has come near 1 too.
  __device__ float slope(float x) const {
    const float e = expf(-2.0f * fabsf(x / cap));
    return 4.0f * e / ((1.0f + e) * (1.0f + e));
  }
};

// (z - shift) / temperature, as a power of two. The factor is off by half a unit in the last place, but the same in
// both passes: probabilities are those at a temperature that is off by as much, and sum to 1. -inf stays -inf.
struct Exponent {
  float shift, scale;

  __device__ Exponent(float shift, float scale) : shift(shift == -INFINITY ? 0.0f : shift), scale(scale) {}
  __device__ float of(float z) const { return (z - shift) * scale; }
};

// An exponent as a factor: 0 times it is 0. A NaN is lost here, and kept by what it is the power of.
__device__ inline float bounded(float exponent) { return fmaxf(exponent, -2000.0f); }

// ---- sums --------------------------------------------------------------------------------------------------

// Of a part of a row, relative to its largest logit: with t the exponents of its columns.
struct alignas(16) Part {
  double total = 0;        // of 2^t
  double weighted = 0;     // of 2^t t
  double squares = 0;      // of 2^2t
  double square_logs = 0;  // of 2^2t t
  double logits = 0;       // of the logits themselves
  float shift = -INFINITY;
};

__device__ inline float largest_in_warp(float x) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(kAll, x, distance));
  return x;
}

// All lanes get the same bits.
__device__ inline double sum_in_warp(double x) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kAll, x, distance);
  return x;
}

template <Terms kTerms>
__device__ void sum_parts(Part& part) {
  part.total = sum_in_warp(part.total);
  if (kTerms >= Terms::entropy) part.weighted = sum_in_warp(part.weighted);
  if (kTerms < Terms::moments) return;
  part.squares = sum_in_warp(part.squares);
  part.square_logs = sum_in_warp(part.square_logs);
  part.logits = sum_in_warp(part.logits);
}

// The thread's own elements of a slice. The terms of the largest logit are exactly 1: where the thread has it, they are
// counted apart, and do not swallow the digits of a peaked row's tail, which are all that its entropy is made of.
template <Terms kTerms, bool kHasTop, typename T, bool kCapped>
__device__ void add_own(const T* kept, int count, const Exponent& exponent, const Softcap<kCapped>& capped,
                        Part& part) {
  float total = 0, weighted = 0, squares = 0, square_logs = 0;
  double logits = 0;  // which may cancel
  int ones = 0;
  const auto add = [&](float x) {
    const float z = capped(x), t = exponent.of(z), e = exp2f(t);
    const bool one = kHasTop && z == part.shift;
    ones += one;
    total += one ? 0.0f : e;
    if (kTerms >= Terms::entropy) weighted = fmaf(e, bounded(t), weighted);
    if (kTerms < Terms::moments) return;
    squares = fmaf(e, e, squares);
    square_logs = fmaf(e * e, bounded(t), square_logs);
    logits += static_cast<double>(z);
  };
  const auto add_pack = [&](int k) {
    const Widened<T> x(pack_at(kept + k));
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) add(x.at[j]);
  };
  share<T>(count, true, add_pack, [&](int k) { add(widened(kept[k])); });
  part.total = ones + static_cast<double>(total);
  part.weighted = weighted;
  part.squares = squares;
  part.square_logs = square_logs;
  part.logits = logits;
}

// The warp's part of a slice, known to all its lanes.
template <Terms kTerms, typename T, bool kCapped>
__device__ Part part_of(const T* kept, int count, float top, float scale, const Softcap<kCapped>& capped) {
  const float highest = largest_in_warp(top);
  Part part;
  part.shift = capped(highest);
  const Exponent exponent(part.shift, scale);
  if (top == highest) add_own<kTerms, true>(kept, count, exponent, capped, part);
  else add_own<kTerms, false>(kept, count, exponent, capped, part);
  sum_parts<kTerms>(part);
  return part;
}

// All parts of a row, by one warp, whose lanes all get the same.
template <Terms kTerms>
__device__ Part merged(const Part* parts, int count, double scale) {
  Part whole;
  for (int k = lane(); k < count; k += kWarp) whole.shift = fmaxf(whole.shift, parts[k].shift);
  whole.shift = largest_in_warp(whole.shift);
  for (int k = lane(); k < count; k += kWarp) {
    const Part& part = parts[k];
    // Without mass a part has nothing to say but NaN.
    const bool empty = part.shift == -INFINITY;
    const double gap = empty ? 0.0 : static_cast<double>(part.shift) - static_cast<double>(whole.shift);
    const double factor = empty ? 0.0 : exp2(gap * scale), square = factor * factor;
    whole.total += factor * part.total;
    if (kTerms >= Terms::entropy) whole.weighted += times(factor, part.weighted + gap * scale * part.total);
    if (kTerms < Terms::moments) continue;
    whole.squares += times(square, part.squares);
    whole.square_logs += times(square, part.square_logs + gap * scale * part.squares);
    whole.logits += part.logits;
  }
  sum_parts<kTerms>(whole);
  return whole;
}

// ---- statistics, and the coefficients of the gradient ------------------------------------------------------

// With e = 2^t the gradient in a logit is
//   e (on_e + on_t t + e (on_square + on_square_t t)) + on_one + [column = token] on_token
// times the slope of the softcap. 1 / temperature and the normalisers are in the coefficients, and with them the
// constants of log p = ln2 t - log total: near the largest logit, where the mass is, t and its rounding are small.
struct alignas(16) Gradient {
  float on_e, on_t, on_square, on_square_t, on_one, on_token, shift;

  template <Terms kTerms>
  __device__ float at(float e, float t) const {
    if constexpr (kTerms == Terms::total) return e * on_e;
    const float inner = fmaf(on_t, bounded(t), on_e);
    if constexpr (kTerms == Terms::entropy) return e * inner;
    return fmaf(e, fmaf(e, fmaf(on_square_t, bounded(t), on_square), inner), on_one);
  }
};

// What a row's token and options say.
struct Token {
  int64_t n;
  int column;   // -1 where it does not exist
  float logit;  // the softcap applied
  double temperature;
};

// By one warp: writes a row's statistics where `write`, and returns what its gradient is made of. Lane o has the
// coefficient of output o.
__device__ inline Gradient finish(const TokenStatsAndGradArgs& a, const Part& row, const Token& token,
                                  float coefficient, bool write) {
  const double none = NAN, t = token.temperature, shift = row.shift;
  const bool empty = row.shift == -INFINITY, found = token.column >= 0;
  const double total = empty ? none : row.total, log_total = log(total);
  const double entropy = log_total - kLn2 * row.weighted / total, sum_sq = row.squares / (total * total);
  const double sum_sq_logprob = kLn2 * row.square_logs / (total * total) - log_total * sum_sq;
  if (write) {
    const auto put = [&](Output o, double value) {
      if (a.outputs[o]) a.outputs[o][token.n] = static_cast<float>(value);
    };
    put(kLogprob, found ? (token.logit - shift) / t - log_total : none);
    put(kEntropy, entropy);
    put(kLogsumexp, shift / t + log_total);
    put(kSumSq, sum_sq);
    put(kSumSqLogprob, sum_sq_logprob);
    put(kMeanLogit, row.logits / (static_cast<double>(a.in.vocab) * t));
    put(kIsTop1, found && token.logit == row.shift && total == total);
  }
  const auto up = [&](Output o) { return static_cast<double>(__shfl_sync(kAll, coefficient, o)); };
  // Where the token's log-probability is NaN, so is its gradient.
  const double on_token = a.coefficients[kLogprob] && !found ? none : up(kLogprob);
  const double on_entropy = up(kEntropy), on_moment = up(kSumSqLogprob), on_square = 2 * up(kSumSq) + on_moment;
  const double on_p = up(kLogsumexp) - on_token - on_entropy * (entropy - log_total) - on_square * sum_sq -
                      2 * on_moment * sum_sq_logprob;
  const double each = 1 / (total * t), square = each / total;
  Gradient g;
  g.on_e = static_cast<float>(on_p * each);
  g.on_t = static_cast<float>(-kLn2 * on_entropy * each);
  g.on_square = static_cast<float>((on_square - 2 * on_moment * log_total) * square);
  g.on_square_t = static_cast<float>(2 * kLn2 * on_moment * square);
  g.on_one = static_cast<float>(up(kMeanLogit) / (static_cast<double>(a.in.vocab) * t));
  g.on_token = static_cast<float>(on_token / t);
  g.shift = row.shift;
  return g;
}

// The gradient of a slice; `token` is the token's column in it, or none of it.
template <Terms kTerms, typename T, bool kCapped>
__device__ void store_gradient(const T* kept, int count, T* out, int token, const Gradient& g, float scale,
                               const Softcap<kCapped>& capped) {
  const Exponent exponent(g.shift, scale);
  const auto slope = [&](float x) { return kCapped ? capped.slope(x) : 1.0f; };
  const auto gradient = [&](float x) {
    const float t = exponent.of(capped(x));
    return g.template at<kTerms>(exp2f(t), t) * slope(x);
  };
  const auto on_pack = [&](int k) {
    const Widened<T> x(pack_at(kept + k));
    float values[kPack<T>];
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) values[j] = gradient(x.at[j]);
    if (static_cast<unsigned>(token - k) < static_cast<unsigned>(kPack<T>)) {
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) values[j] += token == k + j ? g.on_token * slope(x.at[j]) : 0.0f;
    }
    Vector<T> pack;
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) pack.at[j] = narrowed<T>(values[j]);
    pack_at(out + k) = pack;
  };
  const auto on_one = [&](int k) {
    const float x = widened(kept[k]);
    out[k] = narrowed<T>(gradient(x) + (token == k ? g.on_token * slope(x) : 0.0f));
  };
  const bool packed = aligned<kPack<T>>(out);
  share<T>(count, packed, on_pack, on_one);
  if (!packed) __syncthreads();  // the columns were others' own
}

// ---- the kernel --------------------------------------------------------------------------------------------

// Shared memory: [Gradient][2 x blocks x warps of Part][slice of T].
REWARDOPS_BOTH inline int64_t shared_before_slice(int64_t blocks, int64_t warps) {
  return static_cast<int64_t>(sizeof(Gradient)) + 2 * blocks * warps * static_cast<int64_t>(sizeof(Part));
}

// A cluster takes rows as far apart as there are clusters; `slice` columns, a multiple of the pack, are a block's.
template <typename T, Terms kTerms, bool kCapped>
__global__ void __launch_bounds__(kMostThreads, 2)
    token_stats_and_grad_kernel(const __grid_constant__ TokenStatsAndGradArgs a, int slice) {
  const Cluster cluster;
  const int rank = cluster.rank(), blocks = cluster.size(), warps = static_cast<int>(blockDim.x) / kWarp;
  const int vocab = static_cast<int>(a.in.vocab);
  const Softcap<kCapped> capped{static_cast<float>(a.in.softcap)};
  auto* const shared = dynamic_shared<unsigned char>();
  auto& gradient = *reinterpret_cast<Gradient*>(shared);
  auto* parts = reinterpret_cast<Part*>(shared + sizeof(Gradient));  // of two rows in turn: one barrier a row
  auto* const kept = reinterpret_cast<T*>(shared + shared_before_slice(blocks, warps));
  int turn = 0;
  cluster.sync();  // nobody writes to a block that has not started
  for (int64_t n = blockIdx.x / blocks; n < a.count; n += gridDim.x / blocks) {
    T* const out = static_cast<T*>(const_cast<void*>(a.grad.data)) + a.grad.offset(n);
    const bool masked = a.in.masked(n);
    store_zeros(out, masked ? 0 : a.in.vocab, a.width, rank, blocks);
    if (masked) {
      if (rank == 0 && threadIdx.x < kPolicyOutputs && a.outputs[threadIdx.x]) a.outputs[threadIdx.x][n] = 0;
      continue;
    }
    const T* const row = static_cast<const T*>(a.in.logits.data) + a.in.logits.offset(n);
    const int64_t id = a.in.tokens[n];
    Token token{n, id >= 0 && id < a.in.vocab ? static_cast<int>(id) : -1, NAN, a.in.temperature_of(n)};
    const auto scale = static_cast<float>(1.4426950408889634 / token.temperature);
    float coefficient = 0;
    if (warp() == 0) {
      // Asked for here, so that they are there when the parts are. In place, the logits are gone by then.
      if (token.column >= 0) token.logit = widened(row[token.column]);
      if (lane() < kPolicyOutputs && a.coefficients[lane()]) coefficient = a.coefficients[lane()][n];
    }

    const int begin = rank * slice, left = vocab - begin, count = left < 0 ? 0 : left < slice ? left : slice;
    const float top = keep(row + begin, count, kept);
    // A thread sums what it has copied: no barrier in between.
    const Part part = part_of<kTerms>(kept, count, top, scale, capped);
    if (lane() < blocks) *cluster.at(parts + (turn * blocks + rank) * warps + warp(), lane()) = part;
    cluster.sync();
    if (warp() == 0) {
      token.logit = capped(token.logit);
      const Part whole = merged<kTerms>(parts + turn * blocks * warps, blocks * warps, scale);
      const Gradient found = finish(a, whole, token, coefficient, rank == 0 && lane() == 0);
      if (lane() == 0) gradient = found;
    }
    __syncthreads();
    store_gradient<kTerms>(kept, count, out + begin, token.column - begin, gradient, scale, capped);
    turn ^= 1;
  }
}

}  // namespace rewardops::cuda::logits
