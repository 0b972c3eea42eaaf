// Floating-point numbers of 16 bits, for include/cuda_bf16.h and include/cuda_fp16.h.
#pragma once

#include "cuda_on_host.h"

namespace cuda_on_host {

// The bits of the nearest number with so many bits of fraction and this bias, of two the even one; infinity beyond
// the largest; a NaN stays one.
template <int kFraction, int kBias>
uint16_t narrow(double value) {
  constexpr unsigned kInfinity = (2u * kBias + 1) << kFraction;
  const unsigned sign = std::signbit(value) ? 0x8000u : 0;
  if (std::isnan(value)) return 0x7fff;  // as CUDA has it
  const double size = std::fabs(value);
  const int exponent = size == 0 ? 1 - kBias : std::max(std::ilogb(std::min(size, 1e300)), 1 - kBias);
  if (exponent > kBias) return static_cast<uint16_t>(sign | kInfinity);
  // In units of the last place: with the leading one for normal numbers, which then adds one to the exponent, as does
  // a carry, up to infinity.
  const auto units = static_cast<unsigned>(std::nearbyint(std::ldexp(size, kFraction - exponent)));
  return static_cast<uint16_t>(sign | ((unsigned(exponent + kBias - 1) << kFraction) + units));
}

template <int kFraction, int kBias>
float widen(uint16_t bits) {
  const int exponent = (bits & 0x7fff) >> kFraction;
  const int fraction = bits & ((1 << kFraction) - 1), leading = 1 << kFraction;
  float size = std::ldexp(static_cast<float>(exponent ? fraction + leading : fraction),
                          std::max(exponent, 1) - kBias - kFraction);
  if (exponent == 2 * kBias + 1) size = fraction ? NAN : INFINITY;
  return bits & 0x8000 ? -size : size;
}

// A number as CUDA's classes are: made of any number, and used as a float.
template <int kFraction, int kBias>
class SmallFloat {
 public:
  SmallFloat() = default;
  template <typename T, typename = std::enable_if_t<std::is_arithmetic_v<T>>>
  SmallFloat(T value) : bits_(narrow<kFraction, kBias>(static_cast<double>(value))) {}
  operator float() const { return widen<kFraction, kBias>(bits_); }

  static SmallFloat from_bits(uint16_t bits) {
    SmallFloat made;
    made.bits_ = bits;
    return made;
  }
  uint16_t bits() const { return bits_; }

 private:
  uint16_t bits_;
};

// The larger of two numbers, of a number and a NaN the number. (Found by __hmax2 by the type of its arguments.)
template <int kFraction, int kBias>
SmallFloat<kFraction, kBias> larger(SmallFloat<kFraction, kBias> a, SmallFloat<kFraction, kBias> b) {
  return float(a) > float(b) || std::isnan(float(b)) ? a : b;
}

}  // namespace cuda_on_host
