// Statistics of rows of logits, and the gradient of a loss that is linear in them: a row is read once and written once.
//
// The blocks of a cluster hold a row in shared memory, a slice each. Every warp finds the largest logit of its part,
// sums relative to it and writes the sums to the shared memory of all blocks. Each block merges all parts in the same
// order, so all have the same bits, and computes its slice of the gradient from the logits in shared memory. A logit
// that has been read gives way to one of the cluster's next row, which arrives meanwhile. Five small blocks share a
// multiprocessor: while some sum and wait for one another, others move memory.
//
// Bytes: 2 e V for a row of V logits of e bytes, read and written; the outputs per token are negligible.
// 8192 rows of 151,936 are 4.98 GB in bfloat16 and 9.96 GB in float32: 1.16 and 2.32 ms at 4.3 TB/s. A forward and a
// backward pass read the row twice: 1.74 and 3.47 ms. Arithmetic: two powers of two an element, 22 instructions in
// all with the entropy; while its 4 bytes in bfloat16 are moved, an H200 issues 28. Nothing but the sum of logits is in
// float64, which some devices execute at a 64th of float32's rate.
//
// Why not Triton: a row of 304 KB or 608 KB does not fit into one block, and Triton's programs do not share memory.
#pragma once

#include "rewardops/cuda/logits_slice.cuh"
#include "rewardops/logits.h"

namespace rewardops::cuda::logits {

constexpr float kLn2 = 0.693147181f, kLog2E = 1.44269504f;

// The sums that are computed besides the total, and that the gradient depends on. moments: sums of p^2 and of logits.
enum class Terms : int { total, entropy, moments };

// ---- from logits to exponents ------------------------------------------------------------------------------

// cap tanh (x / cap) = cap - 2 cap / (1 + e), e = 2^(rate x), to the absolute accuracy of numbers as large as the cap.
template <bool kCapped>
struct Softcap {
  float cap, rate;

  __device__ explicit Softcap(float cap) : cap(cap), rate(2 * kLog2E / cap) {}
  __device__ float operator()(float x) const {
    if constexpr (kCapped) return fmaf(-2 * cap, __fdividef(1.0f, 1.0f + exp2f(rate * x)), cap);
    else return x;
  }
  // 1 - tanh^2 (x / cap), with a small relative error even where tanh is close to 1.
  __device__ float slope(float x) const {
    if constexpr (!kCapped) return 1.0f;
    const float e = exp2f(rate * x), inverse = __fdividef(1.0f, 1.0f + e);
    return 4.0f * fminf(e, 1e30f) * inverse * inverse;
  }
};

// (z - shift) / temperature, as an exponent of two. The rounded scale is the same in both passes: probabilities are
// those of a temperature that is off by a unit or two in the last place, and sum to 1. -inf stays -inf.
struct Exponent {
  float shift, scale;

  __device__ Exponent(float shift, float scale) : shift(shift == -INFINITY ? 0.0f : shift), scale(scale) {}
  __device__ float of(float z) const { return (z - shift) * scale; }
};

// An exponent as a factor: finite, so that 0 times it is 0. It drops NaN, which the power of two propagates.
__device__ inline float bounded(float exponent) { return fmaxf(exponent, -2000.0f); }

// ---- sums --------------------------------------------------------------------------------------------------

// The sums of a part of a row, relative to its largest logit; t is the exponent of a column.
//
// The terms of the largest are exactly 1. One thread's are counted apart, to keep the digits of the tail: in a peaked
// row the entropy depends on the tail alone.
struct alignas(16) Sums {
  float tail = 0;         // sum of 2^t, without those ones
  float weighted = 0;     // sum of 2^t t
  float squares = 0;      // sum of 2^2t
  float square_logs = 0;  // sum of 2^2t t
  float shift = -INFINITY;
  int ones = 0;
  double logits = 0;  // sum of the logits themselves, which may cancel
};

// Adds up the lanes' sums of the same shift, for all lanes.
template <Terms kTerms>
__device__ void add_lanes(Sums& part) {
  part.ones = reduce_lanes(part.ones, Add());
  part.tail = reduce_lanes(part.tail, Add());
  if (kTerms >= Terms::entropy) part.weighted = reduce_lanes(part.weighted, Add());
  if (kTerms < Terms::moments) return;
  part.squares = reduce_lanes(part.squares, Add());
  part.square_logs = reduce_lanes(part.square_logs, Add());
  part.logits = reduce_lanes(part.logits, Add());
}

// The sums of the thread's columns of a slice, with all terms in the tail.
template <Terms kTerms, typename T, bool kCapped>
__device__ Sums sum_columns(const T* slice, int count, const Exponent& exponent, const Softcap<kCapped>& capped) {
  Sums part;
  float logits = 0;
  const auto add = [&](float x, float& logits) {
    const float z = capped(x), t = exponent.of(z), e = exp2f(t);
    part.tail += e;
    if (kTerms >= Terms::entropy) part.weighted = fmaf(e, bounded(t), part.weighted);
    if (kTerms < Terms::moments) return;
    part.squares = fmaf(e, e, part.squares);
    part.square_logs = fmaf(e * e, bounded(t), part.square_logs);
    logits += z;
  };
  const auto add_pack = [&](int k) {
    const Widened<T> x(pack_at(slice + k));
    float of_pack = 0;
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) add(x.at[j], of_pack);
    logits += of_pack;
  };
  for_packs<kPack<T>>(count, 0, add_pack, [&](int k) { add(widened(slice[k]), logits); });
  part.logits = logits;
  return part;
}

// Sums the tail of the columns of lane `owner` again, by all lanes: without the `highest`, which are counted.
template <typename T, bool kCapped>
__device__ void sum_tail(const T* slice, int count, int owner, float highest, const Exponent& exponent,
                         const Softcap<kCapped>& capped, Sums& part) {
  if (lane() == owner) part.tail = 0;
  const auto add = [&](int k) {
    const float x = widened(slice[k]);
    part.ones += x == highest;
    part.tail += x == highest ? 0.0f : exp2f(exponent.of(capped(x)));
  };
  const int packs = count / kPack<T>, thread = warp() * kWarp + owner;
  for (int i = lane(); thread + i / kPack<T> * threads() < packs; i += kWarp)
    add((thread + i / kPack<T> * threads()) * kPack<T> + i % kPack<T>);
  const int one = packs * kPack<T> + thread;
  if (lane() == 0 && one < count) add(one);
}

// The sums of the warp's columns of a slice, for all its lanes.
template <Terms kTerms, typename T, bool kCapped>
__device__ Sums sums_of_warp(const T* slice, int count, float scale, const Softcap<kCapped>& capped) {
  const float top = largest(slice, count), highest = reduce_lanes(top, MaxNumber()), shift = capped(highest);
  const Exponent exponent(shift, scale);
  Sums part = sum_columns<kTerms>(slice, count, exponent, capped);
  sum_tail(slice, count, __ffs(static_cast<int>(__ballot_sync(kAll, top == highest))) - 1, highest, exponent, capped,
           part);
  add_lanes<kTerms>(part);
  part.shift = shift;
  return part;
}

// The sums of a row from those of its parts, by one warp, for all its lanes.
template <Terms kTerms>
__device__ Sums merged(const Sums* parts, int count, float scale) {
  Sums whole;
  for (int k = lane(); k < count; k += kWarp) whole.shift = fmaxf(whole.shift, parts[k].shift);
  whole.shift = reduce_lanes(whole.shift, MaxNumber());
  for (int k = lane(); k < count; k += kWarp) {
    const Sums& part = parts[k];
    // The sums of a part without mass would be NaN.
    const bool empty = part.shift == -INFINITY, highest = part.shift == whole.shift;
    const float gap = empty ? 0.0f : (part.shift - whole.shift) * scale, factor = empty ? 0.0f : exp2f(gap);
    const float total = part.tail + static_cast<float>(part.ones), square = factor * factor;
    whole.ones += highest ? part.ones : 0;
    whole.tail += factor * (highest ? part.tail : total);
    if (kTerms >= Terms::entropy) whole.weighted += factor * fmaf(bounded(gap), total, part.weighted);
    if (kTerms < Terms::moments) continue;
    whole.squares += square * part.squares;
    whole.square_logs += square * fmaf(bounded(gap), part.squares, part.square_logs);
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
  float temperature;
};

// Writes a row's statistics if `write`, and returns the coefficients of its gradient; called by one warp.
// `coefficient` in lane o: the loss's coefficient of output o.
__device__ inline Side finish(const TokenStatsAndGradArgs& a, const Sums& row, const Token& token, float coefficient,
                              bool write) {
  const float none = NAN, t = token.temperature, ones = row.shift == -INFINITY ? none : static_cast<float>(row.ones);
  const float columns = static_cast<float>(a.in.vocab);
  const bool exists = token.column >= 0;
  // No digits of the tail are lost, as none of these terms is negative.
  const float total = ones + row.tail, log_total = logf(ones) + log1pf(row.tail / ones);
  const float below = kLn2 * row.weighted / total, entropy = log_total - below, sum_sq = row.squares / (total * total);
  const float sum_sq_logprob = kLn2 * row.square_logs / (total * total) - log_total * sum_sq;
  if (write) {
    const auto put = [&](Output o, float value) {
      if (a.outputs[o]) a.outputs[o][token.n] = value;
    };
    put(kLogprob, exists ? (token.logit - row.shift) / t - log_total : none);
    put(kEntropy, entropy);
    put(kLogsumexp, row.shift / t + log_total);
    put(kSumSq, sum_sq);
    put(kSumSqLogprob, sum_sq_logprob);
    put(kMeanLogit, static_cast<float>(row.logits) / (columns * t));
    put(kIsTop1, exists && token.logit == row.shift && total == total);
  }
  const auto up = [&](Output o) { return __shfl_sync(kAll, coefficient, o); };
  // The gradient of a log-probability that is NaN is NaN.
  const float on_token = a.coefficients[kLogprob] && !exists ? none : up(kLogprob);
  const float on_entropy = up(kEntropy), on_moment = up(kSumSqLogprob), on_square = 2 * up(kSumSq) + on_moment;
  const float on_p =
      up(kLogsumexp) - on_token + on_entropy * below - on_square * sum_sq - 2 * on_moment * sum_sq_logprob;
  const float each = 1 / (total * t), square = each / total;
  Side g;
  g.on_e = on_p * each;
  g.on_t = -kLn2 * on_entropy * each;
  g.on_square = (on_square - 2 * on_moment * log_total) * square;
  g.on_square_t = 2 * kLn2 * on_moment * square;
  g.on_one = up(kMeanLogit) / (columns * t);
  g.on_token = on_token / t;
  g.shift = row.shift;
  return g;
}

// Writes the gradient of a slice; `token` is the token's column in the slice, if it has one. Columns that have been
// read give way to those of the `next` row, unless that is null.
template <Terms kTerms, typename T, bool kCapped>
__device__ void store_gradient(T* slice, int count, T* out, int token, const Side g, float scale,
                               const Softcap<kCapped>& capped, const T* next) {
  const Exponent exponent(g.shift, scale);
  const auto gradient = [&](float x) {
    const float t = exponent.of(capped(x));
    return g.template at<kTerms>(exp2f(t), t) * capped.slope(x);
  };
  const auto on_pack = [&](int k, const Vector<T> logits) {
    const Widened<T> x(logits);
    float values[kPack<T>];
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) values[j] = gradient(x.at[j]);
    if (static_cast<unsigned>(token - k) < static_cast<unsigned>(kPack<T>)) {
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) values[j] += token == k + j ? g.on_token * capped.slope(x.at[j]) : 0.0f;
    }
    Vector<T> pack;
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) pack.at[j] = narrowed<T>(values[j]);
    pack_at(out + k) = pack;
  };
  const auto on_one = [&](int k) {
    const float x = widened(slice[k]);
    if (next) slice[k] = next[k];
    out[k] = narrowed<T>(gradient(x) + (token == k ? g.on_token * capped.slope(x) : 0.0f));
  };
  const int lead = lead_of(out, count);
  if (!lead) {
    const auto in_place = [&](int k) {
      const Vector<T> logits = pack_at(slice + k);
      if (next) copy_pack(slice + k, next + k);
      on_pack(k, logits);
    };
    return for_packs<kPack<T>>(count, 0, in_place, on_one);
  }
  const auto apart = [&](int k) {
    Vector<T> logits;
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) logits.at[j] = slice[k + j];
    on_pack(k, logits);
  };
  for_packs<kPack<T>>(count, lead, apart, on_one);
  __syncthreads();  // other threads have read the columns than those that copy the next ones
}

// ---- the kernel --------------------------------------------------------------------------------------------

// Shared memory: [Side][2 x blocks x warps of Sums][slice of T].
REWARDOPS_BOTH inline int64_t shared_before_slice(int64_t blocks, int64_t warps) {
  return static_cast<int64_t>(sizeof(Side)) + 2 * blocks * warps * static_cast<int64_t>(sizeof(Sums));
}

// Cluster i: rows i, i + clusters, ...; block j of it: columns [j * width, (j + 1) * width), a multiple of the pack.
// Bounded to 80 registers, with which five blocks of half as many threads fit.
template <typename T, Terms kTerms, bool kCapped>
__global__ void __launch_bounds__(kThreads, 3)
    token_stats_and_grad_kernel(const __grid_constant__ TokenStatsAndGradArgs a, int width) {
  const Cluster cluster;
  const int rank = cluster.rank(), blocks = cluster.size(), warps = threads() / kWarp;
  const int vocab = static_cast<int>(a.in.vocab);
  const int begin = rank * width, left = vocab - begin, count = left < 0 ? 0 : left < width ? left : width;
  const int64_t clusters = gridDim.x / blocks;
  const Softcap<kCapped> capped(static_cast<float>(a.in.softcap));
  auto* const shared = dynamic_shared<unsigned char>();
  auto& side = *reinterpret_cast<Side*>(shared);
  auto* parts = reinterpret_cast<Sums*>(shared + sizeof(Side));  // two rows in turn: one barrier a row suffices
  auto* const slice = reinterpret_cast<T*>(shared + shared_before_slice(blocks, warps));
  // The block's columns of a row and of its gradient.
  const auto row_of = [&](int64_t n) {
    return static_cast<const T*>(a.in.logits.data) + a.in.logits.offset(n) + begin;
  };
  const auto grad_of = [&](int64_t n) {
    return static_cast<T*>(const_cast<void*>(a.grad.data)) + a.grad.offset(n) + begin;
  };
  // The first of the cluster's rows from n on that is not masked; those that are become zeros.
  const auto valid_row = [&](int64_t n) {
    for (; n < a.count && a.in.masked(n); n += clusters) {
      store_zeros(grad_of(n) - begin, 0, a.width, rank, blocks);
      if (rank == 0 && threadIdx.x < kPolicyOutputs && a.outputs[threadIdx.x]) a.outputs[threadIdx.x][n] = 0;
    }
    return n;
  };
  int turn = 0;
  bool copied = false;  // the row is on its way to the slice
  cluster.sync();       // all blocks have started: their shared memory may be written
  int64_t n = valid_row(blockIdx.x / blocks), next;
  const T* row = row_of(n);
  T* out = grad_of(n);
  for (; n < a.count; n = next) {
    if (!copied) load_slice(row, count, slice);
    const int64_t id = a.in.tokens[n];
    Token token{n, id >= 0 && id < a.in.vocab ? static_cast<int>(id) : -1, NAN,
                static_cast<float>(a.in.temperature_of(n))};
    const float scale = kLog2E / token.temperature;
    float coefficient = 0;
    if (warp() == 0) {
      // Loaded early, to arrive before the parts are summed. In place, the gradient overwrites the logits later.
      if (token.column >= 0) token.logit = widened(row[token.column - begin]);
      if (lane() < kPolicyOutputs && a.coefficients[lane()]) coefficient = a.coefficients[lane()][n];
    }
    if (a.width > a.in.vocab) store_zeros(out - begin, a.in.vocab, a.width, rank, blocks);
    next = valid_row(n + clusters);
    row = row_of(next);

    wait_for_copies();  // a warp sums the columns that it has copied: no barrier in between
    const Sums part = sums_of_warp<kTerms>(slice, count, scale, capped);
    if (lane() < blocks) *cluster.at(parts + (turn * blocks + rank) * warps + warp(), lane()) = part;
    cluster.sync();
    if (warp() == 0) {
      token.logit = capped(token.logit);
      const Sums whole = merged<kTerms>(parts + turn * blocks * warps, blocks * warps, scale);
      const Side result = finish(a, whole, token, coefficient, rank == 0 && lane() == 0);
      if (lane() == 0) side = result;
    }
    __syncthreads();
    copied = next < a.count && aligned<kPack<T>>(row) && aligned<kPack<T>>(out);
    store_gradient<kTerms>(slice, count, out, token.column - begin, side, scale, capped, copied ? row : nullptr);
    out = grad_of(next);
    turn ^= 1;
  }
}

}  // namespace rewardops::cuda::logits
