// The minimum, maximum or soft minimum of the step rewards still to come, and their gradients.
//
// Contract: as extreme_returns, softmin_returns and their backward ops in rewardops/reference/returns.py.
//
// Bytes of a float32 token: reward 4 and mask 1 read (and flags 1 or step ids 8), return 4 written: 9. For B = 1024,
// T = 8192 that is 75 MB, 18 us at 4.3 TB/s. Backward: gradient, reward, return 12 and mask 1 read, 4 written: 17,
// 33 us. The soft minimum writes, and reads back, 8 bytes more: the logarithm of its sum.
//
// Why not Triton alone: a few long rows are one pass here and not two, and the backward passes are one kernel each,
// where Triton needs a scan or two and a handful of tensor operations.
#pragma once

#include "rewardops/cuda/scan.cuh"
#include "rewardops/cuda/search.cuh"
#include "rewardops/returns.h"

namespace rewardops::cuda {

// A row of step rewards, and the tokens of the tile that end a step.
template <typename T, bool kReversed>
struct StepRow {
  static constexpr bool kReverse = kReversed;

  Steps kind;
  const uint8_t *mask, *flags;
  const int64_t* ids;
  const T* rewards_row;
  int64_t size;
  unsigned valid, ends;  // bits of the thread's tokens
  T rewards[kItems];     // rewards of step ends; 0 elsewhere

  __device__ StepRow(const ReturnsArgs<T>& a, int64_t b)
      : kind(a.kind),
        mask(a.mask.row(a.rows, b)),
        flags(a.flags.row(a.rows, b)),
        ids(a.ids.row(a.rows, b)),
        rewards_row(a.rewards.row(a.rows, b)),
        size(a.rows.size(b)) {}

  __device__ bool aligned_at(int64_t h) const {
    return (!mask || aligned<kItems>(mask + h)) && (!flags || aligned<kItems>(flags + h)) &&
           (!ids || aligned<kItems>(ids + h)) && aligned<kItems>(rewards_row + h);
  }
  __device__ void load(const Tile& tile) {
    valid = ends = load_valid(mask, tile);
    if (kind == Steps::flags) ends &= load_valid(flags, tile);
    if (kind == Steps::ids) ends = id_ends(tile);
    load_items(rewards_row, tile, ends, T{0}, rewards);
  }
  __device__ bool is_valid(int i) const { return valid >> i & 1; }
  __device__ bool is_end(int i) const { return ends >> i & 1; }

 private:
  // A step ends at the last valid token in front of another id. Tokens with an id below 0 belong to no step.
  __device__ unsigned id_ends(const Tile& tile) {
    __shared__ int64_t leftmost[kWarps];  // the id of a warp's leftmost valid token
    __shared__ int any[kWarps];           // 1 if the warp has a valid token
    int64_t id[kItems];
    load_items(ids, tile, valid, int64_t{-1}, id);
    const int64_t next = first_valid(mask, tile.high, size);
    int64_t following = next < size ? ids[next] : -1;  // id of the next valid token to the right of the tile
    int64_t first = -1;
#pragma unroll
    for (int i = kItems - 1; i >= 0; --i)
      if (is_valid(i)) first = id[i];
    // Where tiles are walked from the right (kReversed), lanes and warps to the right have lower numbers.
    const unsigned some = __ballot_sync(kAll, valid != 0);
    const int outer = kReversed ? 31 - __clz(static_cast<int>(some)) : __ffs(static_cast<int>(some)) - 1;
    const int64_t of_warp = __shfl_sync(kAll, first, outer < 0 ? 0 : outer);
    if (lane() == 0) leftmost[warp()] = of_warp, any[warp()] = some != 0;
    const unsigned right = kReversed ? some & ((1u << lane()) - 1) : some & ~((2u << lane()) - 1);
    const int nearest = kReversed ? 31 - __clz(static_cast<int>(right)) : __ffs(static_cast<int>(right)) - 1;
    const int64_t of_lane = __shfl_sync(kAll, first, nearest < 0 ? 0 : nearest);
    __syncthreads();
    const int count = threads() / kWarp;
    if (kReversed) {
      for (int w = 0; w < warp(); ++w)
        if (any[w]) following = leftmost[w];
    } else {
      for (int w = count - 1; w > warp(); --w)
        if (any[w]) following = leftmost[w];
    }
    if (right) following = of_lane;
    unsigned result = 0;
#pragma unroll
    for (int i = kItems - 1; i >= 0; --i) {
      if (!is_valid(i)) continue;
      result |= (id[i] >= 0 && id[i] != following) << i;
      following = id[i];
    }
    __syncthreads();  // the next tile overwrites the shared memory that is read here
    return result;
  }
};

// ---- extremes ----------------------------------------------------------------------------------------------

// The smallest reward so far, if any; NaN if any reward is NaN. The largest is the smallest of the negated ones.
template <typename T>
struct Smallest {
  T value;
  int any;

  __device__ static Smallest identity() { return {T{0}, 0}; }
  __device__ static Smallest apply(const Smallest& state, const Smallest& map) { return then(state, map); }
  __device__ static Smallest then(const Smallest& first, const Smallest& second) {
    const bool take = second.any && (!first.any || second.value <= first.value || second.value != second.value);
    return {take ? second.value : first.value, first.any | second.any};
  }
};

template <typename T>
struct ExtremesForward : StepRow<T, true> {
  using Map = Smallest<T>;
  using State = Map;
  using Row = StepRow<T, true>;

  T* out;
  T sign;

  __device__ ExtremesForward(const ReturnsArgs<T>& a, int64_t b)
      : Row(a, b), out(a.out.row(a.rows, b)), sign(a.largest ? T{-1} : T{1}) {}

  __device__ bool aligned_at(int64_t h) const { return Row::aligned_at(h) && aligned<kItems>(out + h); }
  __device__ State start() const { return Map::identity(); }
  __device__ Map load(const Tile& tile) {
    Row::load(tile);
    Map all = Map::identity();
#pragma unroll
    for (int i = kItems - 1; i >= 0; --i)
      if (this->is_end(i)) all = Map::then(all, Map{sign * this->rewards[i], 1});
    return all;
  }
  __device__ void store(const Tile& tile, State before) {
    T result[kItems];
#pragma unroll
    for (int i = kItems - 1; i >= 0; --i) {
      if (this->is_end(i)) before = Map::then(before, Map{sign * this->rewards[i], 1});
      result[i] = before.any ? sign * before.value : T{0};
    }
    store_items(out, tile, this->valid, result);
  }
  __device__ void end(const State&) const {}
};

// The sum of the gradients since the last step end that received it.
struct Pending {
  double sum;
  int taken, none;

  __device__ static Pending identity() { return {0, 0, 0}; }
  __device__ static Pending apply(const Pending& state, const Pending& map) { return then(state, map); }
  __device__ static Pending then(const Pending& first, const Pending& second) {
    return {second.taken ? second.sum : first.sum + second.sum, first.taken | second.taken, 0};
  }
};

// The gradient at a step end that attains the minimum is the sum of the upstream gradients since the previous such end;
// ties go to the earliest.
template <typename T>
struct ExtremesBackward : StepRow<T, false> {
  using Map = Pending;
  using State = Map;
  using Row = StepRow<T, false>;

  const T *grad_row, *returns_row;
  T* out;
  unsigned takes;
  T grad[kItems];

  __device__ ExtremesBackward(const ReturnsArgs<T>& a, int64_t b)
      : Row(a, b), grad_row(a.grad.row(a.rows, b)), returns_row(a.returns.row(a.rows, b)), out(a.out.row(a.rows, b)) {}

  __device__ bool aligned_at(int64_t h) const {
    return Row::aligned_at(h) && aligned<kItems>(grad_row + h) && aligned<kItems>(returns_row + h) &&
           aligned<kItems>(out + h);
  }
  __device__ State start() const { return Map::identity(); }
  __device__ Map load(const Tile& tile) {
    Row::load(tile);
    T returns[kItems];
    load_items(grad_row, tile, this->valid, T{0}, grad);
    load_items(returns_row, tile, this->ends, T{0}, returns);
    takes = 0;
    Map all = Map::identity();
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const T r = this->rewards[i], g = returns[i];
      const bool equal = r == g || (r != r && g != g);
      takes |= (this->is_end(i) && equal) << i;
      all = Map::then(all, map(i));
    }
    return all;
  }
  __device__ Map map(int i) const { return takes >> i & 1 ? Map{0, 1, 0} : Map{static_cast<double>(grad[i]), 0, 0}; }
  __device__ void store(const Tile& tile, State before) {
    T result[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      result[i] = static_cast<T>(before.sum + static_cast<double>(grad[i]));
      before = Map::then(before, map(i));
    }
    store_items(out, tile, takes, result);
  }
  __device__ void end(const State&) const {}
};

// ---- soft minima -------------------------------------------------------------------------------------------

// A sum of exponentials, mass * e^top, and the number of its terms.
struct LogSum {
  double top, mass, count;

  __device__ static LogSum identity() { return {-INFINITY, 0, 0}; }
  __device__ static LogSum apply(const LogSum& state, const LogSum& map) { return then(state, map); }
  __device__ static LogSum then(const LogSum& first, const LogSum& second) {
    const bool broken = first.top != first.top || second.top != second.top;
    const double top = broken ? NAN : first.top > second.top ? first.top : second.top;
    return {top, moved(first, top) + moved(second, top), first.count + second.count};
  }
  __device__ double log() const { return top == -INFINITY ? top : top + ::log(mass); }

 private:
  __device__ static double moved(const LogSum& part, double top) {
    return part.mass == 0 ? 0 : part.top == top ? part.mass : part.mass * ::exp(part.top - top);
  }
};

template <typename T>
struct SoftminForward : StepRow<T, true> {
  using Map = LogSum;
  using State = Map;
  using Row = StepRow<T, true>;

  double temperature;
  bool mean;
  T* out;
  double* log_sums;

  __device__ SoftminForward(const ReturnsArgs<T>& a, int64_t b)
      : Row(a, b),
        temperature(a.temperature),
        mean(a.mean),
        out(a.out.row(a.rows, b)),
        log_sums(a.log_sums.row(a.rows, b)) {}

  __device__ bool aligned_at(int64_t h) const {
    return Row::aligned_at(h) && aligned<kItems>(out + h) && aligned<kItems>(log_sums + h);
  }
  __device__ State start() const { return Map::identity(); }
  __device__ Map map(int i) const { return {-static_cast<double>(this->rewards[i]) / temperature, 1, 1}; }
  __device__ Map load(const Tile& tile) {
    Row::load(tile);
    Map all = Map::identity();
#pragma unroll
    for (int i = kItems - 1; i >= 0; --i)
      if (this->is_end(i)) all = Map::then(all, map(i));
    return all;
  }
  __device__ void store(const Tile& tile, State before) {
    T result[kItems];
    double logs[kItems];
#pragma unroll
    for (int i = kItems - 1; i >= 0; --i) {
      if (this->is_end(i)) before = Map::then(before, map(i));
      const bool some = before.count > 0;
      logs[i] = some ? before.log() : 0;
      result[i] = some ? static_cast<T>(-temperature * (logs[i] - (mean ? ::log(before.count) : 0.0))) : T{0};
    }
    store_items(out, tile, this->valid, result);
    store_items(log_sums, tile, this->valid, logs);
  }
  __device__ void end(const State&) const {}
};

// A sum relative to e^log, where log falls from token to token. A part that has underflowed to 0 stays 0.
struct Falling {
  double sum, log;
  int any, none;

  __device__ static Falling identity() { return {0, 0, 0, 0}; }
  __device__ static Falling apply(const Falling& state, const Falling& map) { return then(state, map); }
  __device__ static Falling then(const Falling& first, const Falling& second) {
    if (!second.any) return first;
    if (!first.any) return second;
    const double apart = second.log - first.log;
    double earlier = first.sum;
    if (second.log != first.log) earlier = apart < 0 ? times(::exp(apart), first.sum) : apart == apart ? first.sum : 0;
    return {second.sum + earlier, second.log, 1, 0};
  }
};

// grad r[j] = sum over the tokens t up to step j of grad[t] exp(-r[j] / T - log_sum[t]).
template <typename T>
struct SoftminBackward : StepRow<T, false> {
  using Map = Falling;
  using State = Map;
  using Row = StepRow<T, false>;

  double temperature;
  const T* grad_row;
  const double* log_sums;
  T* out;
  T grad[kItems];
  double logs[kItems];

  __device__ SoftminBackward(const ReturnsArgs<T>& a, int64_t b)
      : Row(a, b),
        temperature(a.temperature),
        grad_row(a.grad.row(a.rows, b)),
        log_sums(a.log_sums.row(a.rows, b)),
        out(a.out.row(a.rows, b)) {}

  __device__ bool aligned_at(int64_t h) const {
    return Row::aligned_at(h) && aligned<kItems>(grad_row + h) && aligned<kItems>(log_sums + h) &&
           aligned<kItems>(out + h);
  }
  __device__ State start() const { return Map::identity(); }
  __device__ Map map(int i) const { return {static_cast<double>(grad[i]), logs[i], this->is_valid(i), 0}; }
  __device__ Map load(const Tile& tile) {
    Row::load(tile);
    load_items(grad_row, tile, this->valid, T{0}, grad);
    load_items(log_sums, tile, this->valid, 0.0, logs);
    Map all = Map::identity();
#pragma unroll
    for (int i = 0; i < kItems; ++i) all = Map::then(all, map(i));
    return all;
  }
  __device__ void store(const Tile& tile, State before) {
    T result[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      before = Map::then(before, map(i));
      const double u = -static_cast<double>(this->rewards[i]) / temperature;
      result[i] = ::isinf(logs[i]) ? T{0} : static_cast<T>(before.sum * ::exp(u - logs[i]));
    }
    store_items(out, tile, this->ends, result);
  }
  __device__ void end(const State&) const {}
};

}  // namespace rewardops::cuda
