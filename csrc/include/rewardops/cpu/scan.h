// Scans of a block in registers, eight numbers at a time, in either direction of time.
//
// A step of the scan is a map y -> x + a y, and maps compose: over distances 1, 2 and 4 within a register, then
// with the carry of the register before. Only the carry is sequential, so long rows are as fast as many short ones.
#pragma once

#include "rewardops/cpu/kernels.h"
#include "rewardops/cpu/simd.h"

namespace rewardops::cpu {
namespace REWARDOPS_ISA {
namespace {

constexpr int64_t kScanBlock = 1024;

typedef double Eight __attribute__((vector_size(64)));
typedef int64_t EightInts __attribute__((vector_size(64)));
constexpr int64_t kEight = 8;

inline Eight load_eight(const double* x) {
  Eight v;
  std::memcpy(&v, x, sizeof(v));
  return v;
}
inline void store_eight(double* x, Eight v) { std::memcpy(x, &v, sizeof(v)); }
inline Eight splat_eight(double x) { return Eight{x, x, x, x, x, x, x, x}; }

// Masks are bytes of 0 and 1.
inline bool all_valid(const uint8_t* mask, int64_t n) { return !mask || !n || !std::memchr(mask, 0, n); }
// One past the last valid token of n.
inline int64_t live_tokens(const uint8_t* mask, int64_t n) {
  if (!mask) return n;
  for (uint64_t word; n >= 8; n -= 8) {
    std::memcpy(&word, mask + n - 8, 8);
    if (word) break;
  }
  while (n > 0 && !mask[n - 1]) --n;
  return n;
}

// Prefetches the block to the left of the current one: the hardware prefetches upwards only.
template <typename T>
inline void prefetch_before(const T* block) {
  if (!block) return;
  const char* at = reinterpret_cast<const char*>(block);
  for (int64_t k = 64; k <= kScanBlock * static_cast<int64_t>(sizeof(T)); k += 64) __builtin_prefetch(at - k);
}

#if defined(__clang__)
#define REWARDOPS_PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define REWARDOPS_PICK(a, b, ...) __builtin_shuffle(a, b, EightInts{__VA_ARGS__})
#endif

// Direction of the carry: from later tokens, or from earlier ones.
struct FromRight {
  template <int k>
  static Eight moved(Eight v, Eight fill) {
    static_assert(k == 1 || k == 2 || k == 4, "");
    if (k == 1) return REWARDOPS_PICK(v, fill, 1, 2, 3, 4, 5, 6, 7, 8);
    if (k == 2) return REWARDOPS_PICK(v, fill, 2, 3, 4, 5, 6, 7, 8, 9);
    return REWARDOPS_PICK(v, fill, 4, 5, 6, 7, 8, 9, 10, 11);
  }
  static Eight last(Eight v) { return REWARDOPS_PICK(v, v, 0, 0, 0, 0, 0, 0, 0, 0); }
  static constexpr bool kReverse = true;
};
struct FromLeft {
  template <int k>
  static Eight moved(Eight v, Eight fill) {
    static_assert(k == 1 || k == 2 || k == 4, "");
    if (k == 1) return REWARDOPS_PICK(fill, v, 7, 8, 9, 10, 11, 12, 13, 14);
    if (k == 2) return REWARDOPS_PICK(fill, v, 6, 7, 8, 9, 10, 11, 12, 13);
    return REWARDOPS_PICK(fill, v, 4, 5, 6, 7, 8, 9, 10, 11);
  }
  static Eight last(Eight v) { return REWARDOPS_PICK(v, v, 7, 7, 7, 7, 7, 7, 7, 7); }
  static constexpr bool kReverse = false;
};

// n rounded up to full registers. The padding lies where the scan starts, and must hold x = 0 and a = 1.
inline int64_t padded_to_eight(int64_t n) { return (n + kEight - 1) / kEight * kEight; }

// m y, but 0 where m is 0, whatever y: a NaN behind a discount of 0 has no effect.
inline Eight weighed(Eight m, Eight y) {
  const EightInts none = m == splat_eight(0);
  return m * (none ? splat_eight(0) : y);
}

// y[i] = x[i] + a[i] y[i +- 1] over whole registers, in place; returns the last y, which is the next carry.
template <typename Way>
inline double scan_maps(double* x, const double* a, int64_t padded, double carry) {
  const Eight zero = splat_eight(0), one = splat_eight(1);
  Eight c = splat_eight(carry);
  for (int64_t k = 0; k < padded; k += kEight) {
    const int64_t at = Way::kReverse ? padded - kEight - k : k;
    Eight v = load_eight(x + at), m = load_eight(a + at);
    v += weighed(m, Way::template moved<1>(v, zero));
    m *= Way::template moved<1>(m, one);
    v += weighed(m, Way::template moved<2>(v, zero));
    m *= Way::template moved<2>(m, one);
    v += weighed(m, Way::template moved<4>(v, zero));
    m *= Way::template moved<4>(m, one);
    v += weighed(m, c);
    store_eight(x + at, v);
    c = Way::last(v);
  }
  return c[0];
}

// The same scan with one number for all a.
template <typename Way>
inline double scan_map(double* x, double a, int64_t padded, double carry) {
  if (a == 0) return x[Way::kReverse ? 0 : padded - 1];
  const Eight zero = splat_eight(0), a1 = splat_eight(a), a2 = a1 * a1, a4 = a2 * a2;
  Eight powers;
  double p = 1;
  for (int64_t k = 0; k < kEight; ++k) powers[Way::kReverse ? kEight - 1 - k : k] = p *= a;
  Eight c = splat_eight(carry);
  for (int64_t k = 0; k < padded; k += kEight) {
    const int64_t at = Way::kReverse ? padded - kEight - k : k;
    Eight v = load_eight(x + at);
    v += a1 * Way::template moved<1>(v, zero);
    v += a2 * Way::template moved<2>(v, zero);
    v += a4 * Way::template moved<4>(v, zero);
    v += powers * c;
    store_eight(x + at, v);
    c = Way::last(v);
  }
  return c[0];
}

// The product, but 0 where the factor is 0, whatever the value.
inline double times(double factor, double value) { return factor == 0 ? 0 : factor * value; }

// The tokens of an item, counted over rows x chunks.
struct Chunk {
  int64_t row, begin, end;
  template <typename Args>
  Chunk(const Args& a, int64_t item) : row(item / a.chunks), begin(item % a.chunks * kScanChunk) {
    const int64_t size = a.rows.size(row);
    end = begin + kScanChunk < size ? begin + kScanChunk : size;
  }
};

// Turns (value, factor) of every chunk of a row into the carry that the chunk starts with.
inline void linear_carries(double* state, int64_t chunks, bool reverse) {
  double carry = 0;
  for (int64_t k = 0; k < chunks; ++k) {
    double* s = state + 2 * (reverse ? chunks - 1 - k : k);
    const double value = s[0], factor = s[1];
    s[0] = carry;
    carry = value + times(factor, carry);
  }
}

inline double product_of(const double* a, int64_t padded) {
  Eight p = splat_eight(1);
  for (int64_t k = 0; k < padded; k += kEight) p *= load_eight(a + k);
  double product = 1;
  for (int64_t k = 0; k < kEight; ++k) product *= p[k];
  return product;
}

}  // namespace
}  // namespace REWARDOPS_ISA
}  // namespace rewardops::cpu
