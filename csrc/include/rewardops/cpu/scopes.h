// Tokens relative to a scope: sums of parts of rows, and the map of their tokens.
#pragma once

#include <cmath>

#include "rewardops/cpu/kernels.h"
#include "rewardops/cpu/simd.h"

namespace rewardops::cpu {
namespace REWARDOPS_ISA {
namespace {

// A part of a row: at most kScopeBlock tokens from `from` on.
template <typename T>
struct ScopePart {
  int64_t row, from, n;
  const T *values, *weights, *grad;
  const uint8_t* mask;
  T* out;

  ScopePart(const ScopesArgs<T>& a, int64_t item)
      : row(a.rows_of_parts[item]), from((item - a.first[row]) * kScopeBlock) {
    const int64_t left = a.rows.size(row) - from;
    n = left < 0 ? 0 : left < kScopeBlock ? left : kScopeBlock;
    const auto here = [&](const auto& t) { return t.data ? t.row(a.rows, row) + from : nullptr; };
    values = here(a.values), weights = here(a.weights), grad = here(a.grad), mask = here(a.mask), out = here(a.out);
  }

  bool valid(int64_t k) const { return !mask || mask[k]; }
};

// The sum of f(k) over the valid tokens of a part, in the order of lanes. f is also called where a token is masked.
template <typename T, typename F>
inline double part_sum(const ScopePart<T>& p, F f) {
  double sum = 0;
  if (p.mask) {
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < p.n; ++k) sum += p.mask[k] ? f(k) : 0.0;
  } else {
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < p.n; ++k) sum += f(k);
  }
  return sum;
}

// Writes f(k) to the valid tokens of a part, 0 to the others.
template <typename T, typename F>
inline void write_part(const ScopePart<T>& p, F f) {
  if (p.mask) {
#pragma omp simd
    for (int64_t k = 0; k < p.n; ++k) {
      const T y = static_cast<T>(f(k));
      p.out[k] = p.mask[k] ? y : T(0);
    }
  } else {
#pragma omp simd
    for (int64_t k = 0; k < p.n; ++k) p.out[k] = static_cast<T>(f(k));
  }
}

template <typename T>
REWARDOPS_ONCE Moments part_moments(const ScopePart<T>& p, bool unknown) {
  int64_t first = 0;
  while (first < p.n && !p.valid(first)) ++first;
  if (first == p.n) return {0, 0, 0, 0};
  const double origin = p.values[first];
  const auto above = [&](int64_t k) { return static_cast<double>(p.values[k]) - origin; };
  const auto weight = [&](int64_t k) { return static_cast<double>(p.weights[k]); };
  Moments m{0, origin, 0, 0};
  if (p.weights) {
    m.count = part_sum(p, weight);
    m.mean = part_sum(p, [&](int64_t k) { return weight(k) * above(k); }) / m.count;
    const double mean = m.mean;
    m.squares = part_sum(p, [&](int64_t k) { return weight(k) * (above(k) - mean) * (above(k) - mean); });
  } else {
    m.count = p.mask ? part_sum(p, [](int64_t) { return 1.0; }) : static_cast<double>(p.n);
    m.mean = part_sum(p, above) / m.count;
    const double mean = m.mean;
    m.squares = part_sum(p, [&](int64_t k) { return (above(k) - mean) * (above(k) - mean); });
  }
  if (unknown) m.squares = NAN;  // the class of the row
  return m;
}

// Exponentials of numbers of at most 0, in place.
template <typename T>
REWARDOPS_ONCE void exponentials(double* x, int64_t n) {
  if constexpr (sizeof(T) == 4) {
    // e^x = e^y (1 + (x - y)), y being x in float.
    constexpr int64_t kWidth = Lanes<float>::kWidth;
    float y[kScopeBlock];
    for (int64_t k = n; k % kWidth; ++k) y[k] = 0;
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) {
      const double e = x[k] < -1e4 ? -1e4 : x[k];
      y[k] = static_cast<float>(e);
      x[k] = e - y[k];
    }
    for (int64_t k = 0; k < n; k += kWidth) exp(Lanes<float>::load(y + k)).store(y + k);
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) x[k] = y[k] + y[k] * x[k];
  } else {
    for (int64_t k = 0; k < n; ++k) x[k] = std::exp(x[k]);
  }
}

// Raw weights of the tokens of a part, in `to`; arbitrary where masked, NaN where a value is not finite.
template <typename T>
REWARDOPS_ONCE void raw_weights(const ScopesArgs<T>& a, const ScopePart<T>& p, double top, double* to) {
  const T floor = static_cast<T>(a.floor);
  if (a.form == Form::linear) {
#pragma omp simd
    for (int64_t k = 0; k < p.n; ++k) to[k] = static_cast<double>(p.values[k]) + (p.values[k] - p.values[k]);
  } else if (a.form == Form::inverse) {
#pragma omp simd
    for (int64_t k = 0; k < p.n; ++k) {
      const T x = p.values[k];
      to[k] = 1 / static_cast<double>(x < floor ? floor : x) + (x - x);
    }
  } else {
#pragma omp simd
    for (int64_t k = 0; k < p.n; ++k) {
      const double x = a.rate * (static_cast<double>(p.values[k]) - top) + (p.values[k] - p.values[k]);
      to[k] = x > 0 ? 0 : x;  // masked tokens may be larger
    }
    exponentials<T>(to, p.n);
  }
}

// The valid token of a part whose rate x is the largest; NaN if one is not finite.
template <typename T>
REWARDOPS_ONCE double part_top(const ScopePart<T>& p, double rate) {
  const double sign = rate < 0 ? -1 : 1;
  double top = -INFINITY, doubt = 0;
#pragma omp simd reduction(max : top) reduction(+ : doubt)
  for (int64_t k = 0; k < p.n; ++k) {
    const bool valid = !p.mask || p.mask[k];
    const double x = sign * static_cast<double>(p.values[k]);
    top = valid && x > top ? x : top;
    doubt += valid ? x - x : 0.0;
  }
  return sign * top + doubt;
}

// The mean, in two parts, and the scale of a row's scope.
template <typename T>
struct Standard {
  double centre, rest, scale;
  Standard(const ScopesArgs<T>& a, int64_t row) {
    const double* s = a.statistics + (a.scopes > 1 ? row : 0) * 5;
    centre = s[0], rest = s[1], scale = s[2];
  }
  double operator()(T x) const { return ((static_cast<double>(x) - centre) - rest) * scale; }
};

template <typename T>
REWARDOPS_ONCE void weigh_part(const ScopesArgs<T>& a, const ScopePart<T>& p, double* to) {
  double f[kScopeBlock];
  to[0] = part_sum(p, [](int64_t) { return 1.0; });
  to[1] = a.form == Form::exponential && to[0] > 0 ? part_top(p, a.rate) : 0;
  raw_weights(a, p, to[1], f);
  to[2] = part_sum(p, [&](int64_t k) { return f[k]; });
}

template <typename T>
REWARDOPS_ONCE void map_weights(const ScopesArgs<T>& a, const ScopePart<T>& p) {
  double f[kScopeBlock];
  const int64_t scope = a.scopes > 1 ? p.row : 0;
  const double* s = a.statistics + scope * 5;
  const double inverse = s[0], base = s[1];
  raw_weights(a, p, s[2], f);
  if (a.op == Scoped::weigh) {
    write_part(p, [&](int64_t k) { return f[k] * inverse + base; });
    return;
  }
  const double through = a.found[scope * 2];
  const T floor = static_cast<T>(a.floor);
  const auto up = [&](int64_t k) { return static_cast<double>(p.grad[k]) - through; };
  if (a.form == Form::linear) {
    write_part(p, [&](int64_t k) { return inverse * up(k); });
  } else if (a.form == Form::inverse) {
    write_part(p, [&](int64_t k) { return p.values[k] <= floor ? inverse * 0.0 : -f[k] * f[k] * inverse * up(k); });
  } else {
    const double slope = a.rate * inverse;
    write_part(p, [&](int64_t k) { return slope * f[k] * up(k); });
  }
}

// a + min(alpha h, |a| / kappa), or its gradient in a; NaN where h is not finite.
template <typename T>
REWARDOPS_ONCE void map_bonus(const ScopesArgs<T>& a, const ScopePart<T>& p) {
  const double alpha = a.rate, inverse = 1 / a.floor;
  if (a.op == Scoped::bonus) {
    write_part(p, [&](int64_t k) {
      const double x = p.values[k], h = p.weights[k], most = std::fabs(x) * inverse;
      return x + (alpha * h < most ? alpha * h : most) + (h - h);
    });
    return;
  }
  write_part(p, [&](int64_t k) {
    const double x = p.values[k], h = p.weights[k], most = std::fabs(x) * inverse;
    const double sign = x > 0 ? inverse : x < 0 ? -inverse : 0;
    const double share = alpha * h < most ? 0.0 : alpha * h == most ? 0.5 : 1.0;
    return p.grad[k] * (1 + share * sign + (h - h));
  });
}

// The number of valid tokens, and the smallest and the largest; NaN if one is.
template <typename T>
REWARDOPS_ONCE void part_range(const ScopePart<T>& p, double* to) {
  double count = 0, low = INFINITY, high = -INFINITY, unordered = 0;
#pragma omp simd reduction(+ : count, unordered) reduction(min : low) reduction(max : high)
  for (int64_t k = 0; k < p.n; ++k) {
    const bool valid = !p.mask || p.mask[k];
    const double x = p.values[k];
    count += valid ? 1.0 : 0.0;
    unordered += valid && x != x ? 1.0 : 0.0;
    low = valid && x < low ? x : low;
    high = valid && x > high ? x : high;
  }
  const double doubt = unordered > 0 ? NAN : 0;
  to[0] = count, to[1] = low + doubt, to[2] = high + doubt;
}

template <typename T>
REWARDOPS_ONCE void map_steered(const ScopesArgs<T>& a, const ScopePart<T>& p) {
  const double least = a.statistics[0], slope = a.statistics[1], base = a.statistics[2];
  if (a.form == Form::linear) {
    write_part(p, [&](int64_t k) { return base - (p.values[k] - least) * slope; });
    return;
  }
  double f[kScopeBlock];
#pragma omp simd
  for (int64_t k = 0; k < p.n; ++k) {
    const double x = slope * p.values[k];
    f[k] = x > 0 ? 0 : x;  // at most 1
  }
  exponentials<T>(f, p.n);
  const double low = a.rate < 1 ? a.rate : 1;
  write_part(p, [&](int64_t k) { return f[k] < low ? low : f[k]; });
}

}  // namespace

// Items: parts of rows.
template <typename T>
void scope_parts(const ScopesArgs<T>& a, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const ScopePart<T> p(a, item);
    double* to = a.parts + item * kPartNumbers;
    if (a.op == Scoped::standardize) {
      const bool unknown = a.outcomes && a.outcomes[p.row] != a.outcomes[p.row];
      const Moments m = part_moments(p, unknown);
      to[0] = m.count, to[1] = m.origin, to[2] = m.mean, to[3] = m.squares;
    } else if (a.op == Scoped::weigh) {
      weigh_part(a, p, to);
    } else if (a.op == Scoped::steer) {
      part_range(p, to);
    } else if (a.op == Scoped::weigh_backward) {
      double f[kScopeBlock];
      raw_weights(a, p, a.statistics[(a.scopes > 1 ? p.row : 0) * 5 + 2], f);
      to[0] = part_sum(p, [&](int64_t k) { return static_cast<double>(p.grad[k]) * f[k]; });
    } else if (a.op == Scoped::covary) {
      to[0] = part_sum(p, [](int64_t) { return 1.0; });
      to[1] = part_sum(p, [&](int64_t k) { return static_cast<double>(p.values[k]); });
      to[2] = part_sum(p, [&](int64_t k) { return static_cast<double>(p.weights[k]); });
    } else {
      const Standard<T> z(a, p.row);
      to[0] = part_sum(p, [&](int64_t k) { return static_cast<double>(p.grad[k]); });
      to[1] = part_sum(p, [&](int64_t k) { return static_cast<double>(p.grad[k]) * z(p.values[k]); });
    }
  }
}

// Items: parts of rows.
template <typename T>
void scope_map(const ScopesArgs<T>& a, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const ScopePart<T> p(a, item);
    if (a.op == Scoped::weigh || a.op == Scoped::weigh_backward) {
      map_weights(a, p);
      continue;
    }
    if (a.op == Scoped::bonus || a.op == Scoped::bonus_backward) {
      map_bonus(a, p);
      continue;
    }
    if (a.op == Scoped::steer) {
      map_steered(a, p);
      continue;
    }
    const Standard<T> z(a, p.row);
    if (a.op == Scoped::covary) {
      const double* s = a.statistics;
      write_part(p, [&](int64_t k) {
        return ((p.values[k] - s[0]) - s[1]) * ((static_cast<double>(p.weights[k]) - s[2]) - s[3]);
      });
    } else if (a.op == Scoped::standardize) {
      const double centre = a.shifted ? 0.0 : z.centre, rest = a.shifted ? 0.0 : z.rest;
      write_part(p, [&](int64_t k) { return z(p.values[k]) + rest + centre; });
    } else {
      const double* c = a.found + (a.scopes > 1 ? p.row : 0) * 2;
      const double mean = c[0], slope = c[1];
      if (p.weights) {
        write_part(p, [&](int64_t k) {
          return z.scale * p.grad[k] + static_cast<double>(p.weights[k]) * (mean + slope * z(p.values[k]));
        });
      } else {
        write_part(p, [&](int64_t k) { return z.scale * p.grad[k] + (mean + slope * z(p.values[k])); });
      }
    }
  }
}

}  // namespace REWARDOPS_ISA
}  // namespace rewardops::cpu
