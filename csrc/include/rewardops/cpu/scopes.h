// Tokens relative to a scope: sums of parts of rows, and the map of their tokens.
#pragma once

#include <cmath>

#include "rewardops/cpu/kernels.h"

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
    const Standard<T> z(a, p.row);
    if (a.op == Scoped::standardize) {
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
