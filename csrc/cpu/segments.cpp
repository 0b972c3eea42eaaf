#include "segments.h"

#include <algorithm>
#include <vector>

#include "parallel.h"

namespace rewardops::cpu {
namespace {

// The running reduction of one step.
struct Reduced {
  double value = 0;
  double kept = 0;  // see SegmentsArgs::kept
  int64_t count = 0, zeros = 0;

  void take(Reduce op, double x, int64_t t) {
    const bool fresh = count++ == 0;
    switch (op) {
      case Reduce::sum:
      case Reduce::mean: value += x; return;
      // Ties go to the earliest token; a NaN stays.
      case Reduce::min:
        if (fresh || (value == value && !(x >= value))) value = x, kept = static_cast<double>(t);
        return;
      case Reduce::max:
        if (fresh || (value == value && !(x <= value))) value = x, kept = static_cast<double>(t);
        return;
      case Reduce::first:
        if (fresh) value = x, kept = static_cast<double>(t);
        return;
      case Reduce::last: value = x, kept = static_cast<double>(t); return;
      case Reduce::any: value = value != 0 || x != 0; return;
      case Reduce::prod:
        if (fresh) value = 1;
        if (x == 0) ++zeros;
        else value *= x;
        return;
    }
  }
  void finish(Reduce op) {
    if (count == 0) return;
    if (op == Reduce::mean) kept = static_cast<double>(count), value /= kept;
    if (op == Reduce::prod) {
      kept = zeros > 1 ? 0 : value;
      if (zeros) value = 0;
    }
  }
};

// Walks the tokens of a row from the left, and tells the step of each.
template <typename T>
struct Walk {
  const uint8_t *mask, *flags;
  const int64_t* ids;
  int64_t size;
  int64_t limit;       // steps from here on are left out
  int64_t number = 0;  // of step ends by flags so far

  Walk(const SegmentsArgs<T>& a, int64_t b)
      : mask(a.mask.row(a.rows, b)),
        flags(a.flags.row(a.rows, b)),
        ids(a.ids.row(a.rows, b)),
        size(a.rows.size(b)),
        limit(a.num_steps) {
    if (!flags) return;
    int64_t count = 0;
    for (int64_t t = 0; t < size; ++t) count += valid(t) && flags[t];
    limit = std::min(limit, count);
  }
  bool valid(int64_t t) const { return !mask || mask[t]; }
  // The step of a token, -1 for none; to be called for every token in order.
  int64_t step(int64_t t) {
    if (!valid(t)) return -1;
    int64_t s = ids ? ids[t] : 0;
    if (flags) {
      s = number;
      number += flags[t] != 0;
    }
    return s >= 0 && s < limit ? s : -1;
  }
};

// What a token has from its step: the gradient through the reduction.
template <typename T>
double of_token(const SegmentsArgs<T>& a, int64_t place, int64_t t, const T* values) {
  const double grad = a.grad[place];
  switch (a.op) {
    case Reduce::sum: return grad;
    case Reduce::mean: return grad / a.kept[place];
    case Reduce::prod:
      if (values[t] == 0) return grad * a.kept[place];
      return a.out[place] == 0 ? 0 : grad * a.kept[place] / static_cast<double>(values[t]);
    case Reduce::any: return 0;
    default: return static_cast<double>(t) == a.kept[place] ? grad : 0;
  }
}

}  // namespace

template <typename T>
void segment_reduce(const SegmentsArgs<T>& a, int threads) {
  const bool by_position = a.op != Reduce::mean && a.op != Reduce::prod;
  parallel_for(a.rows.batch, 8, threads, [&](int64_t begin, int64_t end) {
    std::vector<Reduced> reduced(a.num_steps);
    for (int64_t b = begin; b < end; ++b) {
      Reduced empty;
      if (by_position) empty.kept = -1;
      reduced.assign(a.num_steps, empty);
      Walk<T> walk(a, b);
      const T* values = a.values.row(a.rows, b);
      for (int64_t t = 0; t < walk.size; ++t) {
        const int64_t s = walk.step(t);
        if (s >= 0) reduced[s].take(a.op, static_cast<double>(values[t]), t);
      }
      for (int64_t s = 0; s < a.num_steps; ++s) {
        reduced[s].finish(a.op);
        a.out[b * a.num_steps + s] = static_cast<T>(reduced[s].value);
        if (a.kept) a.kept[b * a.num_steps + s] = reduced[s].kept;
      }
    }
  });
}

template <typename T>
void steps_to_tokens(const SegmentsArgs<T>& a, int threads) {
  parallel_for(a.rows.batch, 8, threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      Walk<T> walk(a, b);
      const T* values = a.values.row(a.rows, b);
      T* out = a.on_tokens.row(a.rows, b);
      uint8_t* ends = a.ends.row(a.rows, b);
      int64_t last = -1;  // the latest valid token, which ends a step unless the next one has its id
      for (int64_t t = 0; t < walk.size; ++t) {
        const int64_t s = walk.step(t);
        out[t] = s < 0 ? T{0} : static_cast<T>(of_token(a, b * a.num_steps + s, t, values));
        if (!ends) continue;
        ends[t] = s >= 0 && (!walk.flags || walk.flags[t]);
        if (walk.ids && walk.valid(t)) {
          if (last >= 0 && walk.ids[last] == walk.ids[t]) ends[last] = 0, out[last] = 0;
          last = t;
        }
        if (!ends[t]) out[t] = 0;
      }
    }
  });
}

template void segment_reduce<float>(const SegmentsArgs<float>&, int);
template void segment_reduce<double>(const SegmentsArgs<double>&, int);
template void steps_to_tokens<float>(const SegmentsArgs<float>&, int);
template void steps_to_tokens<double>(const SegmentsArgs<double>&, int);

}  // namespace rewardops::cpu
