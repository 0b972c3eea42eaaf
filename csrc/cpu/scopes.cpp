#include "scopes.h"

#include <cmath>
#include <limits>
#include <vector>

#include "groups.h"
#include "parallel.h"
#include "rewardops/cpu/kernels.h"

namespace rewardops::cpu {
namespace {

// The moments of both (Chan, Golub and LeVeque); of equal values exactly those of equal values.
Moments merged(const Moments& a, const Moments& b) {
  if (a.count == 0) return b;
  if (b.count == 0) return a;
  const double count = a.count + b.count, apart = (b.origin - a.origin) + (b.mean - a.mean);
  return {count, a.origin, a.mean + apart * (b.count / count),
          a.squares + b.squares + apart * apart * (a.count * (b.count / count))};
}

template <typename T>
void write_statistics(const ScopesArgs<T>& a, const Moments& m, double* to) {
  const double count = m.count > 0 ? m.count : 1;
  const double divisor = m.count > a.ddof ? m.count - a.ddof : count;
  const double var = m.squares / divisor, mean = m.origin + m.mean;
  const double noise = static_cast<double>(std::numeric_limits<T>::epsilon()) * mean;
  double scale, slope;
  bool flat;
  if (a.of_variance) {
    flat = var + a.eps <= 0;
    scale = 1 / std::sqrt(var + a.eps);
    slope = -scale / divisor;
  } else {
    flat = var <= 0;
    const double std = std::sqrt(var);
    scale = 1 / (std + a.eps);
    slope = -1 / (std * divisor);
  }
  if (flat || (a.rounded && var <= noise * noise)) scale = slope = 0;
  const double centre = static_cast<double>(static_cast<T>(mean));
  to[0] = centre, to[1] = (m.origin - centre) + m.mean, to[2] = scale, to[3] = slope, to[4] = 1 / count;
}

// Reduces the parts of the members of a scope, and writes what their tokens are mapped by to each.
template <typename T>
void reduce_scope(const ScopesArgs<T>& a, const std::vector<int64_t>& members) {
  if (members.empty()) return;
  const int64_t first = a.scopes > 1 ? members[0] : 0;
  const auto each_part = [&](const auto& add) {
    for (const int64_t row : members)
      for (int64_t k = a.first[row]; k < a.first[row + 1]; ++k) add(a.parts + k * kPartNumbers);
  };
  const auto copy = [&](double* table, int64_t columns) {
    if (a.scopes == 1) return;
    for (const int64_t row : members)
      for (int64_t k = 0; k < columns; ++k) table[row * columns + k] = table[first * columns + k];
  };
  if (a.op == Scoped::standardize) {
    Moments all{0, 0, 0, 0};
    each_part([&](const double* p) { all = merged(all, {p[0], p[1], p[2], p[3]}); });
    write_statistics(a, all, a.statistics + first * 5);
    copy(a.statistics, 5);
  } else if (a.op == Scoped::weigh) {
    double count = 0, top = 0, total = 0;
    each_part([&](const double* p) {
      if (p[0] > 0 && !(a.rate * p[1] <= a.rate * top && count > 0)) top = top == top ? p[1] : top;
      count += p[0];
    });
    const bool relative = a.form == Form::exponential;
    each_part([&](const double* p) {
      if (p[0] > 0) total += relative ? p[2] * std::exp(a.rate * (p[1] - top)) : p[2];
    });
    const double size = count > 0 ? count : 1, mean = total / size;
    double* to = a.statistics + first * 5;
    const bool none = mean <= 0;
    to[0] = none ? 0 : 1 / mean, to[1] = none, to[2] = top, to[3] = a.rate, to[4] = 1 / size;
    copy(a.statistics, 5);
  } else if (a.op == Scoped::weigh_backward) {
    double total = 0;
    each_part([&](const double* p) { total += p[0]; });
    const double* s = a.statistics + first * 5;
    a.found[first * 2] = total * s[0] * s[4];
    copy(a.found, 2);
  } else if (a.op == Scoped::steer) {
    double least = INFINITY, top = -INFINITY;
    each_part([&](const double* p) {
      if (p[0] > 0 && !(p[1] >= least)) least = least == least ? p[1] : least;
      if (p[0] > 0 && !(p[2] <= top)) top = top == top ? p[2] : top;
    });
    double* to = a.statistics;
    const double span = top - least;
    to[0] = least;
    if (a.form == Form::exponential) {
      to[1] = std::log(a.rate) / (top < 0.02 ? 0.02 : top);
    } else {
      to[1] = span == 0 ? 0 : (a.floor - a.rate) / span;
      to[2] = span == 0 ? (a.rate + a.floor) / 2 : a.floor;
    }
  } else if (a.op == Scoped::covary) {
    double count = 0, sums[2] = {0, 0};
    each_part([&](const double* p) { count += p[0], sums[0] += p[1], sums[1] += p[2]; });
    double* to = a.statistics;
    const double size = count > 0 ? count : 1;
    for (int k = 0; k < 2; ++k) {
      const double mean = sums[k] / size;
      to[2 * k] = static_cast<double>(static_cast<T>(mean)), to[2 * k + 1] = std::isfinite(mean) ? mean - to[2 * k] : 0;
    }
    to[4] = 1 / size;
  } else {
    double grad = 0, grad_z = 0;
    each_part([&](const double* p) { grad += p[0], grad_z += p[1]; });
    const double *s = a.statistics + first * 5, back = a.shifted ? 0 : 1;
    double* to = a.found + first * 2;
    to[0] = (back - s[2]) * s[4] * grad;
    to[1] = s[3] * grad_z;
    copy(a.found, 2);
  }
}

template <typename T>
void reduce_scopes(const ScopesArgs<T>& a, int threads) {
  if (!a.groups) {
    std::vector<int64_t> rows(a.rows.batch);
    for (int64_t b = 0; b < a.rows.batch; ++b) rows[b] = b;
    reduce_scope(a, rows);
    return;
  }
  const GroupIndex index(a.groups, a.rows.batch);
  parallel_for(index.view().count, 64, threads, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      std::vector<int64_t> members[2];  // by class
      for (int64_t m = index.offsets[g]; m < index.offsets[g + 1]; ++m) {
        const int64_t row = index.members[m];
        const bool right = a.outcomes && a.outcomes[row] > static_cast<T>(a.threshold);
        members[right].push_back(row);
      }
      for (const auto& rows : members) reduce_scope(a, rows);
    }
  });
}

}  // namespace

template <typename T>
void launch_scopes(ScopesArgs<T> a, int threads) {
  const TypedKernels<T>& k = kernels().of<T>();
  std::vector<int64_t> first(1, 0), rows;
  for (int64_t b = 0; b < a.rows.batch; ++b) {
    rows.insert(rows.end(), (a.rows.size(b) + kScopeBlock - 1) / kScopeBlock, b);
    first.push_back(static_cast<int64_t>(rows.size()));
  }
  const int64_t items = first.back(), grain = 16;
  std::vector<double> parts(items * kPartNumbers), found(a.scopes * 2);
  a.first = first.data(), a.rows_of_parts = rows.data(), a.parts = parts.data(), a.found = found.data();
  if (a.op != Scoped::bonus && a.op != Scoped::bonus_backward) {
    parallel_for(items, grain, threads, [&](int64_t begin, int64_t end) { k.scope_parts(a, begin, end); });
    reduce_scopes(a, threads);
  }
  parallel_for(items, grain, threads, [&](int64_t begin, int64_t end) { k.scope_map(a, begin, end); });
}

template void launch_scopes<float>(ScopesArgs<float>, int);
template void launch_scopes<double>(ScopesArgs<double>, int);

}  // namespace rewardops::cpu
