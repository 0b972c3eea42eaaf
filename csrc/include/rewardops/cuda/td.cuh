// Discounted sums of rewards and of temporal differences: discounted returns, GAE, lambda-returns, V-trace.
//
// Contract: as td_scan and td_scan_backward of rewardops/reference/returns.py, sums in double, equal bits for equal
// input.
//
// Bytes of a float32 token, forward: reward 4, value 4, mask 1 read, advantage 4 and return 4 written: 17. For GAE of
// B = 1024, T = 8192 that is 143 MB, 33 us at 4.3 TB/s; for B = 4, T = 131072 (8.9 MB) 2.1 us, less than a launch
// takes. Backward: two gradients 8 and mask 1 read, two gradients 8 written: 17 as well.
//
// Why not Triton alone: there a few long rows take three passes and two reads, a row's values are read twice (shifted),
// and the backward writes and reads its sums once more in double. Here every array is read once, and written once.
#pragma once

#include "rewardops/cuda/scan.cuh"
#include "rewardops/cuda/search.cuh"
#include "rewardops/returns.h"

namespace rewardops::cuda {

// y -> x + a y, where y is the carried sum.
struct Linear {
  using State = double;
  double a, x;

  __device__ static Linear identity() { return {1, 0}; }
  __device__ static Linear then(const Linear& first, const Linear& second) {
    return {first.a * second.a, second.x + times(second.a, first.x)};
  }
  __device__ static State apply(State y, const Linear& m) { return m.x + times(m.a, y); }
};

// (y, v) -> (x + a y + c v, w), where y is the carried sum and v the value of the next token; v stays if no token
// was `seen`.
struct Differences {
  struct State {
    double y, v;
  };
  double a, x, c, w;
  int seen, none;

  __device__ static Differences identity() { return {1, 0, 0, 0, 0, 0}; }
  __device__ static Differences then(const Differences& first, const Differences& second) {
    const double ahead = first.seen ? times(second.c, first.w) : 0, through = first.seen ? 0 : second.c;
    return {first.a * second.a,
            second.x + times(second.a, first.x) + ahead,
            times(second.a, first.c) + through,
            second.seen ? second.w : first.w,
            first.seen | second.seen,
            0};
  }
  __device__ static State apply(const State& s, const Differences& m) {
    return {m.x + times(m.a, s.y) + times(m.c, s.v), m.seen ? m.w : s.v};
  }
};

// (s, p) -> (x + a s, q + b s), where s is the carried gradient of the sum and p that of the value after it; p stays
// if no token was `seen`.
struct Adjoints {
  struct State {
    double s, p;
  };
  double a, x, b, q;
  int seen, none;

  __device__ static Adjoints identity() { return {1, 0, 0, 0, 0, 0}; }
  __device__ static Adjoints then(const Adjoints& first, const Adjoints& second) {
    return {first.a * second.a,
            second.x + times(second.a, first.x),
            second.seen ? times(second.b, first.a) : first.b,
            second.seen ? second.q + times(second.b, first.x) : first.q,
            first.seen | second.seen,
            0};
  }
  __device__ static State apply(const State& s, const Adjoints& m) {
    return {m.x + times(m.a, s.s), m.seen ? m.q + times(m.b, s.s) : s.p};
  }
};

// A row, and the factors of the thread's tokens of a tile. kSimple: one gamma and lambda for the row, and no importance
// weights.
template <typename T, bool kSimple>
struct TdRow {
  const uint8_t* mask;
  const T *rho_row, *trace_row;
  const double *gammas, *lambdas;  // per token, or null
  double gamma, lambda;            // values of the whole row
  int64_t size, valid_end;         // valid_end: one past the last valid token, if masked tokens before it are steps
  bool decay;
  unsigned valid, steps;  // bits of the thread's tokens
  T rho[kItems], trace[kItems];

  __device__ TdRow(const TdArgs<T>& a, int64_t b)
      : mask(a.mask.row(a.rows, b)),
        rho_row(a.rho.row(a.rows, b)),
        trace_row(a.trace.row(a.rows, b)),
        gammas(a.gammas.row(a.rows, b)),
        lambdas(a.lambdas.row(a.rows, b)),
        gamma(a.row_gammas ? a.row_gammas[b] : a.gamma),
        lambda(a.row_lambdas ? a.row_lambdas[b] : a.lam),
        size(a.rows.size(b)),
        valid_end(0),
        decay(a.decay && mask) {
    if (decay) valid_end = end_of_valid(mask, size);
  }

  __device__ bool aligned_at(int64_t h) const {
    return (!mask || aligned<kItems>(mask + h)) && (!rho_row || aligned<kItems>(rho_row + h)) &&
           (!trace_row || aligned<kItems>(trace_row + h));
  }
  __device__ void load(const Tile& tile) {
    valid = steps = load_valid(mask, tile);
    if (decay) {
      steps = 0;
#pragma unroll
      for (int i = 0; i < kItems; ++i) steps |= (tile.inside(i) && tile.first + i < valid_end) << i;
    }
    if constexpr (!kSimple) {
      if (rho_row) load_items(rho_row, tile, valid, T{1}, rho);
      if (trace_row) load_items(trace_row, tile, valid, T{1}, trace);
    }
  }

  __device__ bool is_valid(int i) const { return valid >> i & 1; }
  __device__ bool is_step(int i) const { return steps >> i & 1; }
  __device__ double gamma_at(const Tile& tile, int i) const {
    return !kSimple && gammas && is_valid(i) ? gammas[tile.first + i] : gamma;
  }
  __device__ double rho_at(int i) const { return !kSimple && rho_row ? static_cast<double>(rho[i]) : 1; }
  // The factor of the carried sum in a token's own sum.
  __device__ double factor_at(const Tile& tile, int i) const {
    if constexpr (kSimple) return gamma * lambda;
    const double own = gamma_at(tile, i) * (lambdas && is_valid(i) ? lambdas[tile.first + i] : lambda);
    return trace_row ? own * static_cast<double>(trace[i]) : own;
  }
};

template <typename T, bool kValues, bool kSimple>
struct TdForward : TdRow<T, kSimple> {
  static constexpr bool kReverse = true;
  using Map = ::std::conditional_t<kValues, Differences, Linear>;
  using State = typename Map::State;
  using Row = TdRow<T, kSimple>;

  const T *rewards_row, *values_row;
  T *out, *returns;
  double bootstrap;
  T rewards[kItems], values[kItems];

  __device__ TdForward(const TdArgs<T>& a, int64_t b)
      : Row(a, b),
        rewards_row(a.rewards.row(a.rows, b)),
        values_row(a.values.row(a.rows, b)),
        out(a.out.row(a.rows, b)),
        returns(a.returns.row(a.rows, b)),
        bootstrap(a.bootstrap ? static_cast<double>(a.bootstrap[b]) : 0) {}

  __device__ bool aligned_at(int64_t h) const {
    return Row::aligned_at(h) && aligned<kItems>(rewards_row + h) && aligned<kItems>(out + h) &&
           (!kValues || (aligned<kItems>(values_row + h) && aligned<kItems>(returns + h)));
  }
  __device__ State start() const {
    if constexpr (kValues) return {0, bootstrap};
    else return 0;
  }
  // delta = rho (r + gamma V' - V), added to factor times the carry.
  __device__ Map map(const Tile& tile, int i) const {
    const double rho = this->rho_at(i), reward = static_cast<double>(rewards[i]);
    if constexpr (kValues) {
      const double value = static_cast<double>(values[i]);
      return {this->factor_at(tile, i), times(rho, reward - value), rho * this->gamma_at(tile, i), value, 1, 0};
    } else {
      return {this->factor_at(tile, i), times(rho, reward)};
    }
  }
  __device__ Map load(const Tile& tile) {
    Row::load(tile);
    load_items(rewards_row, tile, this->valid, T{0}, rewards);
    if constexpr (kValues) load_items(values_row, tile, this->valid, T{0}, values);
    Map all = Map::identity();
#pragma unroll
    for (int i = kItems - 1; i >= 0; --i)
      if (this->is_step(i)) all = Map::then(all, map(tile, i));
    return all;
  }
  __device__ void store(const Tile& tile, State before) {
    T sums[kItems], with_value[kItems];
#pragma unroll
    for (int i = kItems - 1; i >= 0; --i) {
      if (this->is_step(i)) before = Map::apply(before, map(tile, i));
      if constexpr (kValues) {
        sums[i] = static_cast<T>(before.y);
        with_value[i] = static_cast<T>(before.y + static_cast<double>(values[i]));
      } else {
        sums[i] = static_cast<T>(before);
      }
    }
    store_items(out, tile, this->valid, sums);
    if constexpr (kValues) store_items(returns, tile, this->valid, with_value);
  }
  __device__ void end(const State&) const {}
};

// With g the sum of the upstream gradients of a token and u = g + s: the gradient of its reward is rho u; that of its
// value is p - rho u plus the gradient of the return.
template <typename T, bool kSimple>
struct TdBackward : TdRow<T, kSimple> {
  static constexpr bool kReverse = false;
  using Map = Adjoints;
  using State = Map::State;
  using Row = TdRow<T, kSimple>;

  const T *grad_row, *through_row;
  T *on_rewards, *on_values, *on_bootstrap;
  T grad[kItems], through[kItems];

  __device__ TdBackward(const TdArgs<T>& a, int64_t b)
      : Row(a, b),
        grad_row(a.grad.row(a.rows, b)),
        through_row(a.grad_returns.row(a.rows, b)),
        on_rewards(a.grad_rewards.row(a.rows, b)),
        on_values(a.grad_values.row(a.rows, b)),
        on_bootstrap(a.grad_bootstrap ? a.grad_bootstrap + b : nullptr) {}

  __device__ bool aligned_at(int64_t h) const {
    return Row::aligned_at(h) && (!grad_row || aligned<kItems>(grad_row + h)) &&
           (!through_row || aligned<kItems>(through_row + h)) && aligned<kItems>(on_rewards + h) &&
           (!on_values || aligned<kItems>(on_values + h));
  }
  __device__ State start() const { return {0, 0}; }
  __device__ double up(int i) const {
    return (grad_row ? static_cast<double>(grad[i]) : 0) + (through_row ? static_cast<double>(through[i]) : 0);
  }
  __device__ Map map(const Tile& tile, int i) const {
    const double factor = this->factor_at(tile, i), gamma = this->gamma_at(tile, i), rho = this->rho_at(i);
    return {factor, times(factor, up(i)), gamma * rho, times(gamma, times(rho, up(i))), 1, 0};
  }
  __device__ Map load(const Tile& tile) {
    Row::load(tile);
    if (grad_row) load_items(grad_row, tile, this->valid, T{0}, grad);
    if (through_row) load_items(through_row, tile, this->valid, T{0}, through);
    Map all = Map::identity();
#pragma unroll
    for (int i = 0; i < kItems; ++i)
      if (this->is_step(i)) all = Map::then(all, map(tile, i));
    return all;
  }
  __device__ void store(const Tile& tile, State before) {
    T rewards[kItems], values[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const double own = times(this->rho_at(i), up(i) + before.s);
      rewards[i] = static_cast<T>(own);
      values[i] = static_cast<T>(before.p - own + (through_row ? static_cast<double>(through[i]) : 0));
      if (this->is_step(i)) before = Map::apply(before, map(tile, i));
    }
    store_items(on_rewards, tile, this->valid, rewards);
    if (on_values) store_items(on_values, tile, this->valid, values);
  }
  __device__ void end(const State& last) const {
    if (on_bootstrap && threadIdx.x == 0) *on_bootstrap = static_cast<T>(last.p);
  }
};

}  // namespace rewardops::cuda
