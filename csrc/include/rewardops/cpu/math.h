// Scalar functions written without branches, so that loops over them become SIMD code.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace rewardops::cpu {
namespace REWARDOPS_ISA {
namespace {

template <typename To, typename From>
inline To bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}

template <typename T>
constexpr T infinity() {
  return std::numeric_limits<T>::infinity();
}

// ---- storage types ------------------------------------------------------------------------------------------

struct bfloat16 {
  uint16_t raw;
};
struct float16 {
  uint16_t raw;
};

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(bfloat16 x) { return bits<float>(static_cast<uint32_t>(x.raw) << 16); }
inline float widen(float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.raw & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.raw & 0x7fffu) << 13;
  // The multiplication rebiases the exponent and normalises subnormals; infinities and NaN keep theirs.
  const uint32_t finite = bits<uint32_t>(bits<float>(magnitude) * 5.192296858534828e33f);  // 2^112
  const uint32_t special = magnitude | 0x7f800000u;
  return bits<float>(sign | ((x.raw & 0x7c00u) == 0x7c00u ? special : finite));
}

template <typename T>
inline T narrow(float x);
template <>
inline float narrow<float>(float x) {
  return x;
}
template <>
inline bfloat16 narrow<bfloat16>(float x) {
  const uint32_t u = bits<uint32_t>(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(x != x ? 0x7fc0u : rounded)};
}
template <>
inline float16 narrow<float16>(float x) {
  const uint32_t u = bits<uint32_t>(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t a = u & 0x7fffffffu;
  const uint32_t normal = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
  // Adding 0.5 aligns the last place of a float with that of a subnormal half, and rounds.
  const uint32_t subnormal = bits<uint32_t>(bits<float>(a) + 0.5f) - 0x3f000000u;
  uint32_t h = a < 0x38800000u ? subnormal : normal;
  h = a >= 0x477ff000u ? 0x7c00u : h;  // rounds to infinity
  h = a > 0x7f800000u ? 0x7e00u : h;   // NaN
  return {static_cast<uint16_t>(sign | h)};
}

// ---- exponentials -------------------------------------------------------------------------------------------

// The smallest x whose exponential is a normal float; below it exp_flushed is 0.
constexpr float kFlush = -87.33654f;

// e^r - 1 - r on |r| <= ln 2 / 2 (Cephes).
inline float exp_remainder(float r) {
  float y = 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  return y * r * r;
}

// e^r on |r| <= ln 2 / 2, within one ulp.
inline float exp_reduced(float r) { return exp_remainder(r) + r + 1.0f; }

constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it moves an integer to the last bits

inline float round_to_integer(float x) { return (x + kMagic) - kMagic; }
// The integer in the last bits of x + kMagic; any integer for NaN, whose conversion would be undefined.
inline int32_t integer_of(float n) { return static_cast<int32_t>(bits<uint32_t>(n + kMagic) - 0x4b400000u); }

inline float reduce(float x, float n) { return (x - n * 0.693359375f) - n * -2.12194440e-4f; }

inline float power_of_two(int32_t n) { return bits<float>((static_cast<uint32_t>(n) + 127u) << 23); }

// e^x for x <= 0; results under the smallest normal float are 0, so that no subnormals reach hot loops.
inline float exp_flushed(float x) {
  const float c = x < kFlush ? kFlush : x;  // NaN passes
  const float n = round_to_integer(c * 1.44269504f);
  const float y = exp_reduced(reduce(c, n)) * power_of_two(integer_of(n));
  return x < kFlush ? 0.0f : y;
}
inline double exp_flushed(double x) { return std::exp(x); }

// e^x for any x, with subnormal and infinite results.
inline float exp_any(float x) {
  float c = x < -104.0f ? -104.0f : x;
  c = c > 89.0f ? 89.0f : c;
  const float n = round_to_integer(c * 1.44269504f);
  const int32_t k = integer_of(n);
  const int32_t half = k >> 1;
  return exp_reduced(reduce(c, n)) * power_of_two(half) * power_of_two(k - half);
}
inline double exp_any(double x) { return std::exp(x); }

// tanh x (Cephes), within two ulps: a polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel.
inline float tanh_any(float x) {
  const float a = x < 0.0f ? -x : x;
  const float c = a > 10.0f ? 10.0f : a;  // NaN passes
  const float far = 1.0f - 2.0f / (exp_any(2.0f * c) + 1.0f);
  const float z = c * c;
  float y = -5.70498872745e-3f;
  y = y * z + 2.06390887954e-2f;
  y = y * z - 5.37397155531e-2f;
  y = y * z + 1.33314422036e-1f;
  y = y * z - 3.33332819422e-1f;
  const float near = y * z * c + c;
  const float t = c < 0.625f ? near : far;
  return x < 0.0f ? -t : t;
}
inline double tanh_any(double x) { return std::tanh(x); }

// 1 - tanh^2 x to full relative accuracy, also where tanh x is near 1.
inline float tanh_slope(float x) {
  const float e = exp_flushed(x < 0.0f ? 2.0f * x : -2.0f * x);
  return 4.0f * e / ((1.0f + e) * (1.0f + e));
}
inline double tanh_slope(double x) {
  const double e = std::exp(-2.0 * std::fabs(x));
  return 4.0 * e / ((1.0 + e) * (1.0 + e));
}

// ln x for normal x > 0 (Cephes), within one ulp.
inline float log_positive(float x) {
  const uint32_t u = bits<uint32_t>(x);
  const int32_t k = static_cast<int32_t>(u - 0x3f3504f3u) >> 23;  // x / 2^k lies in [sqrt(1/2), sqrt(2))
  const float f = bits<float>(u - (static_cast<uint32_t>(k) << 23)) - 1.0f;
  const float n = static_cast<float>(k);
  const float z = f * f;
  float y = 7.0376836292e-2f;
  y = y * f - 1.1514610310e-1f;
  y = y * f + 1.1676998740e-1f;
  y = y * f - 1.2420140846e-1f;
  y = y * f + 1.4249322787e-1f;
  y = y * f - 1.6668057665e-1f;
  y = y * f + 2.0000714765e-1f;
  y = y * f - 2.4999993993e-1f;
  y = y * f + 3.3333331174e-1f;
  y = y * f * z;
  y = y + n * -2.12194440e-4f - 0.5f * z;
  return f + y + n * 0.693359375f;
}
inline double log_positive(double x) { return std::log(x); }

// e^x - 1 for x <= 0, accurate also where e^x is near 1; -1 for -inf.
inline float expm1_negative(float x) {
  const float c = x < -0.5f ? -0.5f : x;
  float y = 1.9875691500e-4f;
  y = y * c + 1.3981999507e-3f;
  y = y * c + 8.3334519073e-3f;
  y = y * c + 4.1665795894e-2f;
  y = y * c + 1.6666665459e-1f;
  y = y * c + 5.0000001201e-1f;
  const float near = y * c * c + c;
  return x < -0.35f ? exp_flushed(x) - 1.0f : near;
}
inline double expm1_negative(double x) { return std::expm1(x); }

// ln(1 + x) for x > -1, accurate also where x is small: the error of 1 + x is known (Kahan).
inline float log1p_any(float x) {
  const float u = 1.0f + x;
  const float off = u - 1.0f;
  return off == 0.0f ? x : log_positive(u) * (x / off);
}
inline double log1p_any(double x) { return std::log1p(x); }

// ln of the smallest value for which exp_flushed is not 0.
inline float flush_limit(float) { return kFlush; }
inline double flush_limit(double) { return -745.2; }

}  // namespace
}  // namespace REWARDOPS_ISA
}  // namespace rewardops::cpu
