// Discounted sums of rewards and of temporal differences: discounted returns, GAE, lambda-returns, V-trace.
//
// Definition over the valid tokens of a row, with t+ the next valid token:
//   delta[t] = rho[t] (r[t] + gamma[t] V[t+] - V[t]),  y[t] = delta[t] + gamma[t] lambda[t] trace[t] y[t+]
// With `decay` a masked token before the last valid one is a step as well, of reward and value 0.
#pragma once

#include "rewardops/cpu/kernels.h"
#include "rewardops/cpu/scan.h"

namespace rewardops::cpu {
namespace REWARDOPS_ISA {
namespace {

// A row, and its coefficients for a block.
template <typename T>
struct TdRow {
  const TdArgs<T>& a;
  int64_t b;
  const uint8_t* mask;
  const T *rewards, *values, *rho, *trace;
  const double *gammas, *lambdas;  // per token, or null
  double gamma, lambda;            // values of the whole row
  double decay;                    // gamma * lambda

  TdRow(const TdArgs<T>& args, int64_t row)
      : a(args),
        b(row),
        mask(a.mask.row(a.rows, b)),
        rewards(a.rewards.row(a.rows, b)),
        values(a.values.row(a.rows, b)),
        rho(a.rho.row(a.rows, b)),
        trace(a.trace.row(a.rows, b)),
        gammas(a.gammas.row(a.rows, b)),
        lambdas(a.lambdas.row(a.rows, b)),
        gamma(a.row_gammas ? a.row_gammas[b] : a.gamma),
        lambda(a.row_lambdas ? a.row_lambdas[b] : a.lam),
        decay(gamma * lambda) {}

  bool simple() const { return !rho && !trace && !gammas && !lambdas; }
  bool valid(int64_t t) const { return !mask || mask[t]; }

  // One past the last valid token, where the row ends.
  int64_t live() const { return live_tokens(mask, a.rows.size(b)); }
  // Next value V[t+] of token `end - 1`.
  double value_after(int64_t end, int64_t live) const {
    if (!values) return 0;
    if (end >= live) return a.bootstrap ? static_cast<double>(a.bootstrap[b]) : 0;
    if (a.decay) return valid(end) ? static_cast<double>(values[end]) : 0;
    while (!valid(end)) ++end;
    return values[end];
  }
  double gamma_at(int64_t t) const { return gammas ? gammas[t] : gamma; }
  double rho_at(int64_t t) const { return rho ? static_cast<double>(rho[t]) : 1; }
  // Factor of y[t+] in y[t].
  double factor_at(int64_t t) const {
    return gamma_at(t) * (lambdas ? lambdas[t] : lambda) * (trace ? static_cast<double>(trace[t]) : 1);
  }
};

struct TdBlock {
  alignas(64) double x[kScanBlock];
  alignas(64) double factor[kScanBlock];
  alignas(64) double next[kScanBlock + kEight];  // V[t+], shifted by one place
};

// Fills a block's factors; returns true if all are `decay`.
template <typename T>
inline bool fill_factors(const TdRow<T>& row, int64_t begin, int64_t n, bool full, TdBlock& s) {
  const bool uniform = row.simple() && (full || row.a.decay);
  if (uniform && n % kEight == 0) return true;
  const double hole = row.a.decay ? row.decay : 1.0;
  if (row.simple()) {
    const uint8_t* m = full ? nullptr : row.mask + begin;
    for (int64_t i = 0; i < n; ++i) s.factor[i] = !m || m[i] ? row.decay : hole;
  } else {
    for (int64_t i = 0; i < n; ++i) s.factor[i] = full || row.valid(begin + i) ? row.factor_at(begin + i) : hole;
  }
  for (int64_t i = n; i < padded_to_eight(n); ++i) s.factor[i] = 1;
  return false;
}

template <typename Way, typename T>
inline double scan_block(const TdRow<T>& row, bool uniform, int64_t n, TdBlock& s, double carry) {
  for (int64_t i = n; i < padded_to_eight(n); ++i) s.x[i] = 0;
  return uniform ? scan_map<Way>(s.x, row.decay, n, carry) : scan_maps<Way>(s.x, s.factor, padded_to_eight(n), carry);
}

// Computes the temporal differences of a block; `ahead` is the value after the block, and becomes that after the block
// before.
template <typename T>
inline void fill_differences(const TdRow<T>& row, int64_t begin, int64_t n, bool full, TdBlock& s, double* ahead) {
  const T* r = row.rewards + begin;
  const T* v = row.values ? row.values + begin : nullptr;
  const uint8_t* m = full ? nullptr : row.mask + begin;
  if (!v) {
    if (full)
      for (int64_t i = 0; i < n; ++i) s.x[i] = static_cast<double>(r[i]);
    else
      for (int64_t i = 0; i < n; ++i) {
        const double reward = r[i];
        s.x[i] = m[i] ? reward : 0.0;
      }
    if (row.rho)
      for (int64_t i = 0; i < n; ++i)
        if (full || m[i]) s.x[i] = times(row.rho_at(begin + i), s.x[i]);
  } else if (full && row.simple() && row.gamma != 0) {
    const double gamma = row.gamma, after = *ahead;
    for (int64_t i = 0; i + 1 < n; ++i)
      s.x[i] = static_cast<double>(r[i]) + gamma * static_cast<double>(v[i + 1]) - static_cast<double>(v[i]);
    s.x[n - 1] = static_cast<double>(r[n - 1]) + gamma * after - static_cast<double>(v[n - 1]);
    *ahead = v[0];
  } else if (row.simple() && row.gamma != 0) {
    // The value of the next valid token: a scan that restarts at each valid token. With `decay`: of the next token.
    for (int64_t i = 0; i < n; ++i) {
      const double value = v[i];
      s.next[i] = m[i] ? value : 0.0;
      s.factor[i] = m[i] ? 0.0 : 1.0;
    }
    for (int64_t i = n; i < padded_to_eight(n); ++i) s.next[i] = 0, s.factor[i] = 1;
    if (!row.a.decay) scan_maps<FromRight>(s.next, s.factor, padded_to_eight(n), *ahead);
    s.next[n] = *ahead;
    *ahead = s.next[0];
    const double gamma = row.gamma;
    if (row.a.decay)
      for (int64_t i = 0; i < n; ++i) {
        const double reward = r[i];
        s.x[i] = (m[i] ? reward : 0.0) + gamma * s.next[i + 1] - s.next[i];
      }
    else
      for (int64_t i = 0; i < n; ++i) {
        const double delta = static_cast<double>(r[i]) + gamma * s.next[i + 1] - static_cast<double>(v[i]);
        s.x[i] = m[i] ? delta : 0.0;
      }
  } else {
    double after = *ahead;
    for (int64_t i = n - 1; i >= 0; --i) {
      const bool valid = !m || m[i];
      const double gain = row.rho_at(begin + i), here = valid ? static_cast<double>(v[i]) : 0.0;
      const double gamma = valid ? row.gamma_at(begin + i) : row.gamma;
      const double reward = valid ? static_cast<double>(r[i]) : 0.0;
      s.x[i] = valid ? times(gain, reward + times(gamma, after) - here) : row.a.decay ? times(gamma, after) : 0.0;
      if (valid || row.a.decay) after = here;
    }
    *ahead = after;
  }
}

template <typename T>
inline void store_tokens(const TdRow<T>& row, Tokens<T> out, int64_t begin, int64_t n, bool full, const double* y,
                         const T* plus) {
  if (!out.data) return;
  alignas(64) T buffer[kScanBlock];
  const uint8_t* m = full ? nullptr : row.mask + begin;
  if (plus) {
    for (int64_t i = 0; i < n; ++i) buffer[i] = static_cast<T>(y[i] + static_cast<double>(plus[i]));
  } else {
    for (int64_t i = 0; i < n; ++i) buffer[i] = static_cast<T>(y[i]);
  }
  if (m)
    for (int64_t i = 0; i < n; ++i) buffer[i] = m[i] ? buffer[i] : T{0};
  store_out(out.row(row.a.rows, row.b) + begin, buffer, n, row.a.stream);
}

template <typename T>
inline void store_zeros(const TdRow<T>& row, Tokens<T> out, int64_t begin, int64_t end) {
  if (out.data && end > begin) std::memset(out.row(row.a.rows, row.b) + begin, 0, (end - begin) * sizeof(T));
}

// Tokens [begin, end) of a row of `live` tokens, from the carry y[end]. Without `store` only the aggregate is computed:
// y[begin] for a carry of 0, and the factor by which the carry is multiplied.
template <typename T>
REWARDOPS_ONCE double td_range(const TdRow<T>& row, int64_t begin, int64_t end, int64_t live, double carry, bool store,
                               double* product) {
  TdBlock s;
  double ahead = row.value_after(end, live);
  // The partial block comes first, so that all others consist of full registers.
  for (int64_t stop = end; stop > begin;) {
    const int64_t left = stop - begin, n = left % kScanBlock ? left % kScanBlock : kScanBlock, at = stop - n;
    prefetch_before(row.rewards + at);
    prefetch_before(row.values ? row.values + at : nullptr);
    prefetch_before(row.mask ? row.mask + at : nullptr);
    const bool full = all_valid(row.mask ? row.mask + at : nullptr, n);
    fill_differences(row, at, n, full, s, &ahead);
    const bool uniform = fill_factors(row, at, n, full, s);
    carry = scan_block<FromRight>(row, uniform, n, s, carry);
    if (product)
      *product *= uniform ? std::pow(row.decay, static_cast<double>(n)) : product_of(s.factor, padded_to_eight(n));
    if (store) {
      store_tokens<T>(row, row.a.out, at, n, full, s.x, nullptr);
      if (row.values) store_tokens(row, row.a.returns, at, n, full, s.x, row.values + at);
    }
    stop = at;
  }
  return carry;
}

// ---- backward: the same sums, from the left -----------------------------------------------------------------
//
// u[t] = g[t] + factor[t-] u[t-], with t- the valid token before, g the upstream gradient of y:
//   grad r[t] = rho[t] u[t],  grad V[t] = gamma[t-] rho[t-] u[t-] - rho[t] u[t] + (the gradient of the return).

// s.x becomes u of [begin, end) from the carry factor[t-] u[t-]; `passed` is gamma[t-] rho[t-] u[t-], before and after.
template <typename T>
REWARDOPS_ONCE double td_backward_range(const TdRow<T>& row, int64_t begin, int64_t end, double carry, bool store,
                                        double* product, double* passed) {
  TdBlock s;
  alignas(64) double up[kScanBlock];
  alignas(64) double on_value[kScanBlock];
  const T* g = row.a.grad.row(row.a.rows, row.b);
  const T* h = row.a.grad_returns.row(row.a.rows, row.b);
  for (int64_t at = begin; at < end;) {
    const int64_t n = end - at < kScanBlock ? end - at : kScanBlock;
    const bool full = all_valid(row.mask ? row.mask + at : nullptr, n);
    for (int64_t i = 0; i < n; ++i) {
      const bool valid = full || row.valid(at + i);
      const double sum = (g ? static_cast<double>(g[at + i]) : 0) + (h ? static_cast<double>(h[at + i]) : 0);
      up[i] = valid ? sum : 0;
    }
    const bool uniform = fill_factors(row, at, n, full, s);
    // s[t] = factor[t] (g[t] + s[t-]): the carry from token t to the next.
    if (uniform)
      for (int64_t i = 0; i < n; ++i) s.x[i] = times(row.decay, up[i]);
    else
      for (int64_t i = 0; i < n; ++i) s.x[i] = times(s.factor[i], up[i]);
    const double before = carry;
    carry = scan_block<FromLeft>(row, uniform, n, s, carry);
    if (product)
      *product *= uniform ? std::pow(row.decay, static_cast<double>(n)) : product_of(s.factor, padded_to_eight(n));
    if (store) {
      // up becomes rho u, on_value the gradient in the value.
      for (int64_t i = n - 1; i > 0; --i) up[i] += s.x[i - 1];
      up[0] += before;
      double held = *passed;
      if (full && row.simple()) {
        const double gamma = row.gamma;
        on_value[0] = held - up[0];
        for (int64_t i = 1; i < n; ++i) on_value[i] = times(gamma, up[i - 1]) - up[i];
        held = times(gamma, up[n - 1]);
      } else {
        for (int64_t i = 0; i < n; ++i) {
          const bool valid = row.valid(at + i);
          if (valid) up[i] = times(row.rho_at(at + i), up[i]);
          on_value[i] = held - up[i];
          if (valid) held = times(row.gamma_at(at + i), up[i]);
          else if (row.a.decay) held = times(row.gamma, up[i]);
        }
      }
      *passed = held;
      store_tokens<T>(row, row.a.grad_rewards, at, n, full, up, nullptr);
      store_tokens<T>(row, row.a.grad_values, at, n, full, on_value, h ? h + at : nullptr);
    }
    at += n;
  }
  return carry;
}

// ---- items: rows, or rows times chunks ----------------------------------------------------------------------

// Writes tokens [begin, end) of a row that ends at `live`, from their carry. Returns the carry of a backward pass.
template <typename T>
REWARDOPS_ONCE double td_stretch(const TdRow<T>& row, int64_t live, int64_t begin, int64_t end, double carry) {
  const TdArgs<T>& a = row.a;
  const int64_t to = end < live ? end : live, rest = to > begin ? to : begin;
  double passed = 0;
  if (begin < to) {
    if (a.backward) td_backward_range<T>(row, begin, to, carry, true, nullptr, &passed);
    else td_range(row, begin, to, live, carry, true, nullptr);
  }
  const Tokens<T> outputs[] = {a.out, a.returns, a.grad_rewards, a.grad_values};
  for (const Tokens<T>& out : outputs) store_zeros(row, out, rest, end);
  return passed;
}

}  // namespace

template <typename T>
void td_rows(const TdArgs<T>& a, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const TdRow<T> row(a, b);
    const double passed = td_stretch(row, row.live(), 0, a.rows.size(b), 0.0);
    if (a.grad_bootstrap) a.grad_bootstrap[b] = static_cast<T>(passed);
  }
}

// A few long rows, in chunks: `a.state` holds the aggregate of each chunk, then its carry. Items: rows x chunks.
template <typename T>
void td_aggregates(const TdArgs<T>& a, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const Chunk c(a, item);
    const TdRow<T> row(a, c.row);
    const int64_t live = row.live(), to = c.end < live ? c.end : live;
    double product = 1, value = 0;
    if (c.begin < to)
      value = a.backward ? td_backward_range<T>(row, c.begin, to, 0, false, &product, nullptr)
                         : td_range(row, c.begin, to, live, 0.0, false, &product);
    a.state[2 * item] = value;
    a.state[2 * item + 1] = product;
  }
}

// td_joins adds the value gradient that a chunk's first valid token gets from the token before the chunk.
template <typename T>
void td_chunks(const TdArgs<T>& a, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const Chunk c(a, item);
    const TdRow<T> row(a, c.row);
    a.state[2 * item + 1] = td_stretch(row, row.live(), c.begin, c.end, a.state[2 * item]);
  }
}

template <typename T>
void td_carries(const TdArgs<T>& a, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) linear_carries(a.state + 2 * b * a.chunks, a.chunks, !a.backward);
}

// Adds the values' gradients across borders of chunks, and the bootstrap's. Items: rows.
template <typename T>
void td_joins(const TdArgs<T>& a, int64_t begin, int64_t end) {
  if (!a.backward) return;
  for (int64_t b = begin; b < end; ++b) {
    const TdRow<T> row(a, b);
    const double* state = a.state + 2 * b * a.chunks;
    const int64_t live = row.live();
    double passed = state[1];
    for (int64_t c = 1; c < a.chunks && c * kScanChunk < live; ++c) {
      int64_t t = c * kScanChunk;
      const int64_t to = t + kScanChunk < live ? t + kScanChunk : live;
      if (!a.decay)
        while (t < to && !row.valid(t)) ++t;
      if (t == to) continue;  // a chunk without valid tokens passes its carry on
      if (a.grad_values.data && row.valid(t)) {
        T& value = a.grad_values.row(a.rows, b)[t];
        value = static_cast<T>(static_cast<double>(value) + passed);
      }
      passed = state[2 * c + 1];
    }
    if (a.grad_bootstrap) a.grad_bootstrap[b] = static_cast<T>(passed);
  }
}

}  // namespace REWARDOPS_ISA
}  // namespace rewardops::cpu
