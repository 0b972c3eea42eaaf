// Statistics of rows of logits, and the gradient of a loss that is linear in them: a row is read once and written once.
//
// The blocks of a cluster hold a row in shared memory, a slice each. Every warp sums its part relative to the part's
// largest logit and writes the sums to the shared memory of all blocks. Each block merges all parts in the same order,
// so all have the same bits, and computes its slice of the gradient from the logits in shared memory.
//
// Bytes: 2 e V for a row of V logits of e bytes, read and written; the outputs per token are negligible.
// 8192 rows of 151,936 are 4.98 GB in bfloat16 and 9.96 GB in float32: 1.16 and 2.32 ms at 4.3 TB/s. A forward and a
// backward pass read the row twice: 1.74 and 3.47 ms. Arithmetic: two powers of two an element, 20 instructions in
// all; while its 4 bytes in bfloat16 are moved, an H200 issues 28.
//
// Why not Triton: a row of 304 KB or 608 KB does not fit into one block, and Triton's programs do not share memory.
#pragma once

#include "rewardops/cuda/logits_slice.cuh"
#include "rewardops/logits.h"

namespace rewardops::cuda::logits {

constexpr double kLn2 = 0.6931471805599453;

// The sums that are computed besides the total, and that the gradient depends on. moments: sums of p^2 and of logits.
enum class Terms : int { total, entropy, moments };

// ---- from logits to exponents ------------------------------------------------------------------------------

template <bool kCapped>
struct Softcap {
  float cap;
  __device__ float operator()(float x) const {
    if constexpr (kCapped) return cap * tanhf(x / cap);
    else return x;
  }
  // 1 - tanh^2 (x / cap), with a small relative error even where tanh is close to 1.
  __device__ float slope(float x) const {
    const float e = expf(-2.0f * fabsf(x / cap));
    return 4.0f * e / ((1.0f + e) * (1.0f + e));
  }
};

// (z - shift) / temperature, as an exponent of two. The rounded scale is the same in both passes: probabilities are
// those of a temperature that is off by half a unit in the last place, and sum to 1. -inf stays -inf.
struct Exponent {
  float shift, scale;

  __device__ Exponent(float shift, float scale) : shift(shift == -INFINITY ? 0.0f : shift), scale(scale) {}
  __device__ float of(float z) const { return (z - shift) * scale; }
};

// An exponent as a factor: finite, so that 0 times it is 0. It drops NaN, which the power of two propagates.
__device__ inline float bounded(float exponent) { return fmaxf(exponent, -2000.0f); }

// ---- sums --------------------------------------------------------------------------------------------------

// The sums of a part of a row, relative to its largest logit; t is the exponent of a column.
struct alignas(16) Sums {
  double total = 0;        // sum of 2^t
  double weighted = 0;     // sum of 2^t t
  double squares = 0;      // sum of 2^2t
  double square_logs = 0;  // sum of 2^2t t
  double logits = 0;       // sum of the logits themselves
  float shift = -INFINITY;
};

// Adds up the lanes' sums of the same shift, for all lanes.
template <Terms kTerms>
__device__ void add_lanes(Sums& part) {
  part.total = reduce_lanes(part.total, Add());
  if (kTerms >= Terms::entropy) part.weighted = reduce_lanes(part.weighted, Add());
  if (kTerms < Terms::moments) return;
  part.squares = reduce_lanes(part.squares, Add());
  part.square_logs = reduce_lanes(part.square_logs, Add());
  part.logits = reduce_lanes(part.logits, Add());
}

// The sums of the thread's columns of a slice. The terms of the largest logit are exactly 1. Its thread
// counts them apart from the float sums, to keep the digits of the tail: in a peaked row the entropy depends on the
// tail alone.
template <Terms kTerms, bool kHasTop, typename T, bool kCapped>
__device__ void sum_columns(const T* slice, int count, const Exponent& exponent, const Softcap<kCapped>& capped,
                            Sums& part) {
  float total = 0, weighted = 0, squares = 0, square_logs = 0;
  double logits = 0;  // in double: logits may cancel
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
    const Widened<T> x(pack_at(slice + k));
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) add(x.at[j]);
  };
  for_packs<kPack<T>>(count, true, add_pack, [&](int k) { add(widened(slice[k])); });
  part.total = ones + static_cast<double>(total);
  part.weighted = weighted;
  part.squares = squares;
  part.square_logs = square_logs;
  part.logits = logits;
}

// The sums of the warp's columns of a slice, for all its lanes; `top` is the thread's largest logit.
template <Terms kTerms, typename T, bool kCapped>
__device__ Sums sums_of_warp(const T* slice, int count, float top, float scale, const Softcap<kCapped>& capped) {
  const float highest = reduce_lanes(top, MaxNumber());
  Sums part;
  part.shift = capped(highest);
  const Exponent exponent(part.shift, scale);
  if (top == highest) sum_columns<kTerms, true>(slice, count, exponent, capped, part);
  else sum_columns<kTerms, false>(slice, count, exponent, capped, part);
  add_lanes<kTerms>(part);
  return part;
}

// The sums of a row from those of its parts, by one warp, for all its lanes.
template <Terms kTerms>
__device__ Sums merged(const Sums* parts, int count, double scale) {
  Sums whole;
  for (int k = lane(); k < count; k += kWarp) whole.shift = fmaxf(whole.shift, parts[k].shift);
  whole.shift = reduce_lanes(whole.shift, MaxNumber());
  for (int k = lane(); k < count; k += kWarp) {
    const Sums& part = parts[k];
    // The sums of a part without mass would be NaN.
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
  add_lanes<kTerms>(whole);
  return whole;
}

// ---- statistics, and the coefficients of the gradient ------------------------------------------------------

// With e = 2^t the gradient in a logit is
//   e (on_e + on_t t + e (on_square + on_square_t t)) + on_one + [column = token] on_token
// times the slope of the softcap. The coefficients include 1 / temperature, the normalisers and the constant of
// log p = ln2 t - log total: near the largest logit, where the mass is, t and its rounding are small.
struct alignas(16) Side {
  float on_e, on_t, on_square, on_square_t, on_one, on_token, shift;

  template <Terms kTerms>
  __device__ float at(float e, float t) const {
    if constexpr (kTerms == Terms::total) return e * on_e;
    const float inner = fmaf(on_t, bounded(t), on_e);
    if constexpr (kTerms == Terms::entropy) return e * inner;
    return fmaf(e, fmaf(e, fmaf(on_square_t, bounded(t), on_square), inner), on_one);
  }
};

// The token of a row.
struct Token {
  int64_t n;
  int column;   // -1 where the token is not in the vocabulary
  float logit;  // logit of that column, after the softcap
  double temperature;
};

// Writes a row's statistics if `write`, and returns the coefficients of its gradient; called by one warp.
// `coefficient` in lane o: the loss's coefficient of output o.
__device__ inline Side finish(const TokenStatsAndGradArgs& a, const Sums& row, const Token& token, float coefficient,
                              bool write) {
  const double none = NAN, t = token.temperature, shift = row.shift;
  const bool empty = row.shift == -INFINITY, exists = token.column >= 0;
  const double total = empty ? none : row.total, log_total = log(total);
  const double entropy = log_total - kLn2 * row.weighted / total, sum_sq = row.squares / (total * total);
  const double sum_sq_logprob = kLn2 * row.square_logs / (total * total) - log_total * sum_sq;
  if (write) {
    const auto put = [&](Output o, double value) {
      if (a.outputs[o]) a.outputs[o][token.n] = static_cast<float>(value);
    };
    put(kLogprob, exists ? (token.logit - shift) / t - log_total : none);
    put(kEntropy, entropy);
    put(kLogsumexp, shift / t + log_total);
    put(kSumSq, sum_sq);
    put(kSumSqLogprob, sum_sq_logprob);
    put(kMeanLogit, row.logits / (static_cast<double>(a.in.vocab) * t));
    put(kIsTop1, exists && token.logit == row.shift && total == total);
  }
  const auto up = [&](Output o) { return static_cast<double>(__shfl_sync(kAll, coefficient, o)); };
  // The gradient of a log-probability that is NaN is NaN.
  const double on_token = a.coefficients[kLogprob] && !exists ? none : up(kLogprob);
  const double on_entropy = up(kEntropy), on_moment = up(kSumSqLogprob), on_square = 2 * up(kSumSq) + on_moment;
  const double on_p = up(kLogsumexp) - on_token - on_entropy * (entropy - log_total) - on_square * sum_sq -
                      2 * on_moment * sum_sq_logprob;
  const double each = 1 / (total * t), square = each / total;
  Side g;
  g.on_e = static_cast<float>(on_p * each);
  g.on_t = static_cast<float>(-kLn2 * on_entropy * each);
  g.on_square = static_cast<float>((on_square - 2 * on_moment * log_total) * square);
  g.on_square_t = static_cast<float>(2 * kLn2 * on_moment * square);
  g.on_one = static_cast<float>(up(kMeanLogit) / (static_cast<double>(a.in.vocab) * t));
  g.on_token = static_cast<float>(on_token / t);
  g.shift = row.shift;
  return g;
}

// Writes the gradient of a slice; `token` is the token's column in the slice, if it has one.
template <Terms kTerms, typename T, bool kCapped>
__device__ void store_gradient(const T* slice, int count, T* out, int token, const Side& g, float scale,
                               const Softcap<kCapped>& capped) {
  const Exponent exponent(g.shift, scale);
  const auto slope = [&](float x) { return kCapped ? capped.slope(x) : 1.0f; };
  const auto gradient = [&](float x) {
    const float t = exponent.of(capped(x));
    return g.template at<kTerms>(exp2f(t), t) * slope(x);
  };
  const auto on_pack = [&](int k) {
    const Widened<T> x(pack_at(slice + k));
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
    const float x = widened(slice[k]);
    out[k] = narrowed<T>(gradient(x) + (token == k ? g.on_token * slope(x) : 0.0f));
  };
  const bool packed = aligned<kPack<T>>(out);
  for_packs<kPack<T>>(count, packed, on_pack, on_one);
  if (!packed) __syncthreads();  // other threads than those of load_slice have read the columns
}

// ---- the kernel --------------------------------------------------------------------------------------------

// Shared memory: [Side][2 x blocks x warps of Sums][slice of T].
REWARDOPS_BOTH inline int64_t shared_before_slice(int64_t blocks, int64_t warps) {
  return static_cast<int64_t>(sizeof(Side)) + 2 * blocks * warps * static_cast<int64_t>(sizeof(Sums));
}

// Cluster i: rows i, i + clusters, ...; block j of it: columns [j * width, (j + 1) * width), a multiple of the pack.
template <typename T, Terms kTerms, bool kCapped>
__global__ void __launch_bounds__(kThreads, 2)
    token_stats_and_grad_kernel(const __grid_constant__ TokenStatsAndGradArgs a, int width) {
  const Cluster cluster;
  const int rank = cluster.rank(), blocks = cluster.size(), warps = threads() / kWarp;
  const int vocab = static_cast<int>(a.in.vocab);
  const Softcap<kCapped> capped{static_cast<float>(a.in.softcap)};
  auto* const shared = dynamic_shared<unsigned char>();
  auto& side = *reinterpret_cast<Side*>(shared);
  auto* parts = reinterpret_cast<Sums*>(shared + sizeof(Side));  // two rows in turn: one barrier a row suffices
  auto* const slice = reinterpret_cast<T*>(shared + shared_before_slice(blocks, warps));
  int turn = 0;
  cluster.sync();  // all blocks have started: their shared memory may be written
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
      // Loaded early, to arrive before the parts are summed. In place, the gradient overwrites the logits later.
      if (token.column >= 0) token.logit = widened(row[token.column]);
      if (lane() < kPolicyOutputs && a.coefficients[lane()]) coefficient = a.coefficients[lane()][n];
    }

    const int begin = rank * width, left = vocab - begin, count = left < 0 ? 0 : left < width ? left : width;
    const float top = load_slice(row + begin, count, slice);
    // A thread sums the columns that it has copied: no barrier in between.
    const Sums part = sums_of_warp<kTerms>(slice, count, top, scale, capped);
    if (lane() < blocks) *cluster.at(parts + (turn * blocks + rank) * warps + warp(), lane()) = part;
    cluster.sync();
    if (warp() == 0) {
      token.logit = capped(token.logit);
      const Sums whole = merged<kTerms>(parts + turn * blocks * warps, blocks * warps, scale);
      const Side result = finish(a, whole, token, coefficient, rank == 0 && lane() == 0);
      if (lane() == 0) side = result;
    }
    __syncthreads();
    store_gradient<kTerms>(slice, count, out + begin, token.column - begin, side, scale, capped);
    turn ^= 1;
  }
}

}  // namespace rewardops::cuda::logits
