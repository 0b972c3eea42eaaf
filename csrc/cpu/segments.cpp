#include "segments.h"

#include <vector>

#include "parallel.h"

namespace rewardops::cpu {
namespace {

// The running reduction of one segment.
struct Reduced {
  double value = 0;
  double kept = -1;  // see SegmentsArgs::kept
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

}  // namespace

template <typename T>
void segment_reduce(const SegmentsArgs<T>& a, int threads) {
  parallel_for(a.rows.batch, 8, threads, [&](int64_t begin, int64_t end) {
    std::vector<Reduced> reduced(a.num_steps);
    for (int64_t b = begin; b < end; ++b) {
      reduced.assign(a.num_steps, Reduced{});
      const uint8_t* mask = a.mask.row(a.rows, b);
      const int64_t* ids = a.ids.row(a.rows, b);
      const T* values = a.values.row(a.rows, b);
      const int64_t n = a.rows.size(b);
      for (int64_t t = 0; t < n; ++t)
        if ((!mask || mask[t]) && ids[t] >= 0 && ids[t] < a.num_steps)
          reduced[ids[t]].take(a.op, static_cast<double>(values[t]), t);
      for (int64_t s = 0; s < a.num_steps; ++s) {
        reduced[s].finish(a.op);
        a.out[b * a.num_steps + s] = static_cast<T>(reduced[s].value);
        a.kept[b * a.num_steps + s] = reduced[s].kept;
      }
    }
  });
}

template <typename T>
void segment_reduce_backward(const SegmentsArgs<T>& a, int threads) {
  parallel_for(a.rows.batch, 8, threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const uint8_t* mask = a.mask.row(a.rows, b);
      const int64_t* ids = a.ids.row(a.rows, b);
      const T* values = a.values.row(a.rows, b);
      T* out = a.grad_values.row(a.rows, b);
      const int64_t n = a.rows.size(b);
      for (int64_t t = 0; t < n; ++t) {
        out[t] = 0;
        if ((mask && !mask[t]) || ids[t] < 0 || ids[t] >= a.num_steps) continue;
        const int64_t s = b * a.num_steps + ids[t];
        const double grad = a.grad[s], kept = a.kept[s];
        double value = 0;
        switch (a.op) {
          case Reduce::sum: value = grad; break;
          case Reduce::mean: value = grad / kept; break;
          case Reduce::prod:
            if (values[t] == 0) value = grad * kept;
            else if (a.out[s] != 0) value = grad * kept / static_cast<double>(values[t]);
            break;
          case Reduce::any: break;
          default: value = static_cast<double>(t) == kept ? grad : 0;
        }
        out[t] = static_cast<T>(value);
      }
    }
  });
}

template void segment_reduce<float>(const SegmentsArgs<float>&, int);
template void segment_reduce<double>(const SegmentsArgs<double>&, int);
template void segment_reduce_backward<float>(const SegmentsArgs<float>&, int);
template void segment_reduce_backward<double>(const SegmentsArgs<double>&, int);

}  // namespace rewardops::cpu
