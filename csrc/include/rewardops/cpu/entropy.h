// GTPO's token rewards: sums over the rows of a group at one position, a block of positions at a time.
#pragma once

#include "rewardops/cpu/kernels.h"

namespace rewardops::cpu {
namespace REWARDOPS_ISA {
namespace {

template <typename T>
struct GtpoBlock {
  double count[2][kGtpoBlock];    // rows of the class still running: [wrong, right]
  double total[2][kGtpoBlock];    // their weights
  double through[2][kGtpoBlock];  // upstream gradient times weight
};

// In place of a mask that is not given: one loop serves both.
struct NoMask {
  uint8_t valid[kGtpoBlock];
  constexpr NoMask() : valid() {
    for (uint8_t& token : valid) token = 1;
  }
};
constexpr NoMask kNoMask;

// Weights of a row's tokens: the entropy, at least 0, in a right row; in a wrong row the inverse of the entropy, raised
// to the floor first. NaN where the entropy is not finite, or the class of the row not known.
template <typename T>
struct GtpoWeight {
  bool right;
  T at_least;
  T doubt;  // 0, or NaN for a reward that is NaN

  GtpoWeight(T reward, double threshold, T floor)
      : right(static_cast<double>(reward) > threshold),
        at_least(right ? T(0) : floor),
        doubt(reward == reward ? T(0) : reward) {}

  T operator()(T entropy) const {
    const T h = entropy < at_least ? at_least : entropy;
    return (right ? h : 1 / h) + (entropy - entropy) + doubt;
  }

  // Whether the weight does not depend on the entropy.
  bool constant(T entropy) const {
    const bool below = (entropy < at_least) | (!right & (entropy == at_least));
    return below & (entropy - entropy + doubt == 0);  // without a branch: a vector of tokens at once
  }
};

template <bool kBackward, typename T>
void gtpo_sums(const GtpoArgs<T>& a, int64_t group, int64_t from, GtpoBlock<T>& block) {
  for (int c = 0; c < 2; ++c)
    for (int64_t k = 0; k < kGtpoBlock; ++k) block.count[c][k] = block.total[c][k] = block.through[c][k] = 0;
  const T floor = static_cast<T>(a.floor);
  for (int64_t m = a.groups.offsets[group]; m < a.groups.offsets[group + 1]; ++m) {
    const int64_t b = a.groups.members[m];
    const int64_t left = a.rows.size(b) - from;
    const int64_t n = left < kGtpoBlock ? left : kGtpoBlock;
    if (n <= 0) continue;
    const GtpoWeight<T> weight_of(a.rewards[b], a.threshold, floor);
    const T* entropy = a.entropy.row(a.rows, b) + from;
    const T* grad = kBackward ? a.grad.row(a.rows, b) + from : nullptr;
    const uint8_t* mask = a.mask.data ? a.mask.row(a.rows, b) + from : kNoMask.valid;
    double* count = block.count[weight_of.right];
    double* total = block.total[weight_of.right];
    double* through = block.through[weight_of.right];
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) {
      const bool valid = mask[k];
      const double weight = valid ? static_cast<double>(weight_of(entropy[k])) : 0.0;
      count[k] += valid ? 1.0 : 0.0;
      total[k] += weight;
      if (kBackward) through[k] += valid ? weight * static_cast<double>(grad[k]) : 0.0;
    }
  }
}

template <bool kBackward, typename T>
void gtpo_blocks(const GtpoArgs<T>& a, int64_t begin, int64_t end) {
  GtpoBlock<T> block;
  const T floor = static_cast<T>(a.floor);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t group = item / a.blocks, from = item % a.blocks * kGtpoBlock;
    bool any = false;
    for (int64_t m = a.groups.offsets[group]; m < a.groups.offsets[group + 1]; ++m)
      any = any || a.rows.size(a.groups.members[m]) > from;
    if (!any) continue;
    gtpo_sums<kBackward>(a, group, from, block);
    for (int64_t m = a.groups.offsets[group]; m < a.groups.offsets[group + 1]; ++m) {
      const int64_t b = a.groups.members[m];
      const int64_t left = a.rows.size(b) - from;
      const int64_t n = left < kGtpoBlock ? left : kGtpoBlock;
      if (n <= 0) continue;
      const GtpoWeight<T> weight_of(a.rewards[b], a.threshold, floor);
      const bool right = weight_of.right;
      const T* entropy = a.entropy.row(a.rows, b) + from;
      const T* grad = kBackward ? a.grad.row(a.rows, b) + from : nullptr;
      const uint8_t* mask = a.mask.data ? a.mask.row(a.rows, b) + from : kNoMask.valid;
      T* out = a.out.row(a.rows, b) + from;
      const double* count = block.count[right];
      const double* total = block.total[right];
      const double* through = block.through[right];
      const double base = right ? a.alpha1 * static_cast<double>(a.rewards[b]) : -a.alpha1;
      const double gain = right ? a.alpha2 : -a.alpha2;
#pragma omp simd
      for (int64_t k = 0; k < n; ++k) {
        const bool valid = mask[k];
        const double weight = weight_of(entropy[k]);
        const bool even = total[k] == 0;  // every entropy of the class is 0: all have the same share
        const double sum = even ? 1.0 : total[k];
        double v;
        if (kBackward) {
          const double d_weight = a.alpha2 * count[k] * (grad[k] - through[k] / sum) / sum;
          // d weight / d H is 1, or -1 / H^2 against the minus sign of a wrong row's share.
          const double d_entropy = right ? d_weight : d_weight * weight * weight;
          v = (even | weight_of.constant(entropy[k])) ? 0.0 : d_entropy;
        } else {
          v = base + gain * (even ? 1.0 : count[k] * weight / sum);
        }
        out[k] = static_cast<T>(valid ? v : 0.0);
      }
    }
  }
}

}  // namespace

template <typename T>
void gtpo(const GtpoArgs<T>& a, int64_t begin, int64_t end) {
  gtpo_blocks<false>(a, begin, end);
}

template <typename T>
void gtpo_backward(const GtpoArgs<T>& a, int64_t begin, int64_t end) {
  gtpo_blocks<true>(a, begin, end);
}

}  // namespace REWARDOPS_ISA
}  // namespace rewardops::cpu
