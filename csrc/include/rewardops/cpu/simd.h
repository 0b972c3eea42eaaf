// Lanes<T>: as many numbers as a hot loop works on at once, on every instruction set by the same code.
//
// For the few loops that a compiler does not turn into good SIMD code by itself. 16 floats (one register of
// AVX-512, two of AVX2) or 8 doubles; where there are no such registers, arrays that the compiler splits.
#pragma once

#include "rewardops/cpu/math.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace rewardops::cpu {
namespace REWARDOPS_ISA {
namespace {

// While one is alive, results too small for a normal number are 0: some machines take a hundred cycles for each.
struct FlushSubnormals {
#if defined(__SSE__)
  unsigned before = _mm_getcsr();
  FlushSubnormals() { _mm_setcsr(before | 0x8000u); }
  ~FlushSubnormals() { _mm_setcsr(before); }
#else
  FlushSubnormals() {}
#endif
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;
};

// 2^f on |f| <= 1/2: minimax with the constant exactly 1, within 9.2e-8 before rounding.
constexpr float kExp2[] = {1.326465281e-3f, 9.671511129e-3f, 5.550733954e-2f, 2.402224243e-1f, 6.931470037e-1f, 1.0f};

template <typename T>
struct Lanes;

// ---- any machine --------------------------------------------------------------------------------------------

template <typename T, int N>
struct Array {
  static constexpr int64_t kWidth = N;
  T v[N];

  template <typename F>
  static Lanes<T> each(F f) {
    Lanes<T> r;
#pragma omp simd
    for (int i = 0; i < N; ++i) r.v[i] = f(i);
    return r;
  }
  static Lanes<T> splat(T x) { return each([=](int) { return x; }); }
  template <typename From>
  static Lanes<T> load(const From* x) { return each([=](int i) { return static_cast<T>(widen(x[i])); }); }
  // Bitwise: the sign of the result is set where it is in both.
  bool all_negative() const {
    bool all = true;
    for (int i = 0; i < N; ++i) all = all && std::signbit(v[i]);
    return all;
  }
  double sum() const {
    double total = 0;
    for (int i = 0; i < N; ++i) total += v[i];
    return total;
  }
  T largest() const {
    T top = v[0];
    for (int i = 1; i < N; ++i) top = v[i] > top ? v[i] : top;
    return top;
  }
};

#define REWARDOPS_ARRAY_LANES(T, N)                                                                           \
  template <>                                                                                                 \
  struct Lanes<T> : Array<T, N> {};                                                                           \
  inline Lanes<T> operator+(Lanes<T> a, Lanes<T> b) { return Lanes<T>::each([&](int i) { return a.v[i] + b.v[i]; }); } \
  inline Lanes<T> operator-(Lanes<T> a, Lanes<T> b) { return Lanes<T>::each([&](int i) { return a.v[i] - b.v[i]; }); } \
  inline Lanes<T> operator*(Lanes<T> a, Lanes<T> b) { return Lanes<T>::each([&](int i) { return a.v[i] * b.v[i]; }); } \
  inline Lanes<T> fma(Lanes<T> a, Lanes<T> b, Lanes<T> c) {                                                    \
    return Lanes<T>::each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });                                    \
  }                                                                                                           \
  inline Lanes<T> larger(Lanes<T> a, Lanes<T> b) {                                                            \
    return Lanes<T>::each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });                           \
  }                                                                                                           \
  inline Lanes<T> smaller(Lanes<T> a, Lanes<T> b) {                                                           \
    return Lanes<T>::each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });                           \
  }                                                                                                           \
  inline Lanes<T> both_negative(Lanes<T> a, Lanes<T> b) {                                                     \
    return Lanes<T>::each([&](int i) { return std::signbit(a.v[i]) ? b.v[i] : a.v[i]; });                      \
  }                                                                                                           \
  /* b where a is 0, else c */                                                                                \
  inline Lanes<T> if_zero(Lanes<T> a, Lanes<T> b, Lanes<T> c) {                                               \
    return Lanes<T>::each([&](int i) { return a.v[i] == 0 ? b.v[i] : c.v[i]; });                               \
  }

REWARDOPS_ARRAY_LANES(double, 8)

// 2^x for x <= 126, 0 for what is no normal number; NaN, or 0, for -inf.
inline Lanes<double> exp2(Lanes<double> x) {
  return Lanes<double>::each([&](int i) { return x.v[i] < -1021.0 ? 0.0 : std::exp2(x.v[i]); });
}

#if !defined(__AVX2__)

REWARDOPS_ARRAY_LANES(float, 16)

inline Lanes<float> exp2(Lanes<float> x) {
  return Lanes<float>::each([&](int i) {
    const float c = x.v[i] < -125.0f ? -125.0f : x.v[i];
    const float t = c + 12582912.0f;  // 1.5 * 2^23: leaves the rounded exponent in the low bits
    const float f = c - (t - 12582912.0f);
    float y = kExp2[0];
    for (int k = 1; k < 6; ++k) y = y * f + kExp2[k];
    const float e = bits<float>(bits<uint32_t>(y) + (bits<uint32_t>(t) << 23));
    return x.v[i] < -125.0f ? 0.0f : e;
  });
}

#elif defined(__AVX512F__)

// ---- AVX-512 ------------------------------------------------------------------------------------------------

template <>
struct Lanes<float> {
  static constexpr int64_t kWidth = 16;
  __m512 v;

  static Lanes splat(float x) { return {_mm512_set1_ps(x)}; }
  static Lanes load(const float* x) { return {_mm512_loadu_ps(x)}; }
  static Lanes load(const bfloat16* x) {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16))};
  }
  static Lanes load(const float16* x) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)))};
  }
  bool all_negative() const { return _mm512_movepi32_mask(_mm512_castps_si512(v)) == 0xffff; }
  double sum() const {
    return _mm512_reduce_add_pd(_mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(v)),
                                              _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1))));
  }
  float largest() const { return _mm512_reduce_max_ps(v); }
};

inline Lanes<float> operator+(Lanes<float> a, Lanes<float> b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Lanes<float> operator-(Lanes<float> a, Lanes<float> b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Lanes<float> operator*(Lanes<float> a, Lanes<float> b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Lanes<float> fma(Lanes<float> a, Lanes<float> b, Lanes<float> c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
inline Lanes<float> larger(Lanes<float> a, Lanes<float> b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Lanes<float> smaller(Lanes<float> a, Lanes<float> b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Lanes<float> both_negative(Lanes<float> a, Lanes<float> b) { return {_mm512_and_ps(a.v, b.v)}; }
inline Lanes<float> if_zero(Lanes<float> a, Lanes<float> b, Lanes<float> c) {
  return {_mm512_mask_mov_ps(c.v, _mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_EQ_OQ), b.v)};
}
inline Lanes<float> exp2(Lanes<float> x) {
  const __m512 n = _mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x.v, n);
  __m512 y = _mm512_set1_ps(kExp2[0]);
  for (int k = 1; k < 6; ++k) y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(kExp2[k]));
  return {_mm512_scalef_ps(y, n)};
}

#else

// ---- AVX2 ---------------------------------------------------------------------------------------------------

template <>
struct Lanes<float> {
  static constexpr int64_t kWidth = 16;
  __m256 a, b;

  static Lanes splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static Lanes load(const float* x) { return {_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)}; }
  static __m128i raw(const void* x) { return _mm_loadu_si128(static_cast<const __m128i*>(x)); }
  static __m256 shifted(__m128i raw) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
  }
  static Lanes load(const bfloat16* x) { return {shifted(raw(x)), shifted(raw(x + 8))}; }
  static Lanes load(const float16* x) { return {_mm256_cvtph_ps(raw(x)), _mm256_cvtph_ps(raw(x + 8))}; }
  bool all_negative() const { return _mm256_movemask_ps(_mm256_and_ps(a, b)) == 0xff; }
  double sum() const {
    const auto halves = [](__m256 x) {
      return _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(x)),
                           _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)));
    };
    alignas(32) double d[4];
    _mm256_store_pd(d, _mm256_add_pd(halves(a), halves(b)));
    return (d[0] + d[1]) + (d[2] + d[3]);
  }
  float largest() const {
    alignas(32) float x[8];
    _mm256_store_ps(x, _mm256_max_ps(a, b));
    float top = x[0];
    for (int i = 1; i < 8; ++i) top = x[i] > top ? x[i] : top;
    return top;
  }
};

inline Lanes<float> operator+(Lanes<float> x, Lanes<float> y) {
  return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)};
}
inline Lanes<float> operator-(Lanes<float> x, Lanes<float> y) {
  return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)};
}
inline Lanes<float> operator*(Lanes<float> x, Lanes<float> y) {
  return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)};
}
inline Lanes<float> fma(Lanes<float> x, Lanes<float> y, Lanes<float> z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline Lanes<float> larger(Lanes<float> x, Lanes<float> y) {
  return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)};
}
inline Lanes<float> smaller(Lanes<float> x, Lanes<float> y) {
  return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)};
}
inline Lanes<float> both_negative(Lanes<float> x, Lanes<float> y) {
  return {_mm256_and_ps(x.a, y.a), _mm256_and_ps(x.b, y.b)};
}
inline Lanes<float> if_zero(Lanes<float> x, Lanes<float> y, Lanes<float> z) {
  const __m256 zero = _mm256_setzero_ps();
  return {_mm256_blendv_ps(z.a, y.a, _mm256_cmp_ps(x.a, zero, _CMP_EQ_OQ)),
          _mm256_blendv_ps(z.b, y.b, _mm256_cmp_ps(x.b, zero, _CMP_EQ_OQ))};
}
inline __m256 exp2_half(__m256 x) {
  const __m256 low = _mm256_set1_ps(-125.0f), magic = _mm256_set1_ps(12582912.0f);  // 1.5 * 2^23
  const __m256 c = _mm256_max_ps(low, x);  // NaN passes
  const __m256 t = _mm256_add_ps(c, magic);
  const __m256 f = _mm256_sub_ps(c, _mm256_sub_ps(t, magic));
  __m256 y = _mm256_set1_ps(kExp2[0]);
  for (int k = 1; k < 6; ++k) y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(kExp2[k]));
  const __m256i e = _mm256_add_epi32(_mm256_castps_si256(y), _mm256_slli_epi32(_mm256_castps_si256(t), 23));
  return _mm256_andnot_ps(_mm256_cmp_ps(x, low, _CMP_LT_OQ), _mm256_castsi256_ps(e));
}
inline Lanes<float> exp2(Lanes<float> x) { return {exp2_half(x.a), exp2_half(x.b)}; }

#endif

}  // namespace
}  // namespace REWARDOPS_ISA
}  // namespace rewardops::cpu
