// Lanes<T>: the numbers that a hot loop processes at once, with the same code on every instruction set.
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

// Scope in which subnormal results become 0: some machines take a hundred cycles for each.
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

template <typename T>
struct Lanes;

// ---- any machine --------------------------------------------------------------------------------------------

template <typename T, int N>
struct Array {
  static constexpr int64_t kWidth = N;
  static constexpr bool kFused = false;  // fma rounds once
  T v[N];

  template <typename F>
  static Lanes<T> each(F f) {
    Lanes<T> r;
#pragma omp simd
    for (int i = 0; i < N; ++i) r.v[i] = f(i);
    return r;
  }
  static Lanes<T> splat(T x) {
    return each([=](int) { return x; });
  }
  template <typename From>
  static Lanes<T> load(const From* x) {
    return each([=](int i) { return static_cast<T>(widen(x[i])); });
  }
  // Loads two at once, in any order that is the same for every row.
  template <typename From>
  static void load_two(const From* x, Lanes<T>* a, Lanes<T>* b) {
    *a = load(x);
    *b = load(x + N);
  }
  void store(T* x) const { std::memcpy(x, v, sizeof(v)); }
  // Bitwise and: the sign of the result is set where both signs are.
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

#define REWARDOPS_ARRAY_LANES(T, N)                                                       \
  template <>                                                                             \
  struct Lanes<T> : Array<T, N> {};                                                       \
  inline Lanes<T> operator+(Lanes<T> a, Lanes<T> b) {                                     \
    return Lanes<T>::each([&](int i) { return a.v[i] + b.v[i]; });                        \
  }                                                                                       \
  inline Lanes<T> operator-(Lanes<T> a, Lanes<T> b) {                                     \
    return Lanes<T>::each([&](int i) { return a.v[i] - b.v[i]; });                        \
  }                                                                                       \
  inline Lanes<T> operator*(Lanes<T> a, Lanes<T> b) {                                     \
    return Lanes<T>::each([&](int i) { return a.v[i] * b.v[i]; });                        \
  }                                                                                       \
  inline Lanes<T> fma(Lanes<T> a, Lanes<T> b, Lanes<T> c) {                               \
    return Lanes<T>::each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });               \
  }                                                                                       \
  inline Lanes<T> larger(Lanes<T> a, Lanes<T> b) {                                        \
    return Lanes<T>::each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });      \
  }                                                                                       \
  inline Lanes<T> smaller(Lanes<T> a, Lanes<T> b) {                                       \
    return Lanes<T>::each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });      \
  }                                                                                       \
  inline Lanes<T> both_negative(Lanes<T> a, Lanes<T> b) {                                 \
    return Lanes<T>::each([&](int i) { return std::signbit(a.v[i]) ? b.v[i] : a.v[i]; }); \
  }                                                                                       \
  /* b where a is 0, else c */                                                            \
  inline Lanes<T> if_zero(Lanes<T> a, Lanes<T> b, Lanes<T> c) {                           \
    return Lanes<T>::each([&](int i) { return a.v[i] == 0 ? b.v[i] : c.v[i]; });          \
  }

REWARDOPS_ARRAY_LANES(double, 8)

inline Lanes<double> exp2(Lanes<double> x) {
  return Lanes<double>::each([&](int i) { return x.v[i] < -1021.0 ? 0.0 : std::exp2(x.v[i]); });
}
inline Lanes<double> exp(Lanes<double> x) {
  return Lanes<double>::each([&](int i) { return std::exp(x.v[i]); });
}

#if !defined(__AVX2__)

REWARDOPS_ARRAY_LANES(float, 16)

inline Lanes<float> rounded(Lanes<float> x) {
  return Lanes<float>::each([&](int i) { return round_to_integer(x.v[i]); });
}
// y 2^n for integers n <= 126; 0 for results below the normal numbers.
inline Lanes<float> scaled(Lanes<float> y, Lanes<float> n) {
  return Lanes<float>::each([&](int i) {
    const float c = n.v[i] < -125.0f ? 0.0f : n.v[i];
    const uint32_t e = bits<uint32_t>(y.v[i]) + (static_cast<uint32_t>(integer_of(c)) << 23);
    return n.v[i] < -125.0f ? 0.0f : bits<float>(e);
  });
}

#elif defined(__AVX512F__)

// ---- AVX-512 ------------------------------------------------------------------------------------------------

template <>
struct Lanes<float> {
  static constexpr int64_t kWidth = 16;
  static constexpr bool kFused = true;
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
  template <typename From>
  static void load_two(const From* x, Lanes* a, Lanes* b) {
    *a = load(x);
    *b = load(x + 16);
  }
  // Even and odd columns take one instruction each; columns in order would take two.
  static void load_two(const bfloat16* x, Lanes* a, Lanes* b) {
    const __m512i raw = _mm512_loadu_si512(x);
    *a = {_mm512_castsi512_ps(_mm512_slli_epi32(raw, 16))};
    *b = {_mm512_castsi512_ps(_mm512_and_si512(raw, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
  }
  void store(float* x) const { _mm512_storeu_ps(x, v); }
  bool all_negative() const { return _mm512_movepi32_mask(_mm512_castps_si512(v)) == 0xffff; }
  double sum() const {
    return _mm512_reduce_add_pd(
        _mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(v)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1))));
  }
  float largest() const { return _mm512_reduce_max_ps(v); }
};

inline Lanes<float> operator+(Lanes<float> a, Lanes<float> b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Lanes<float> operator-(Lanes<float> a, Lanes<float> b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Lanes<float> operator*(Lanes<float> a, Lanes<float> b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Lanes<float> fma(Lanes<float> a, Lanes<float> b, Lanes<float> c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Lanes<float> larger(Lanes<float> a, Lanes<float> b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Lanes<float> smaller(Lanes<float> a, Lanes<float> b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Lanes<float> both_negative(Lanes<float> a, Lanes<float> b) { return {_mm512_and_ps(a.v, b.v)}; }
inline Lanes<float> if_zero(Lanes<float> a, Lanes<float> b, Lanes<float> c) {
  return {_mm512_mask_mov_ps(c.v, _mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_EQ_OQ), b.v)};
}
inline Lanes<float> rounded(Lanes<float> x) {
  return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline Lanes<float> scaled(Lanes<float> y, Lanes<float> n) { return {_mm512_scalef_ps(y.v, n.v)}; }

#else

// ---- AVX2 ---------------------------------------------------------------------------------------------------

template <>
struct Lanes<float> {
  static constexpr int64_t kWidth = 16;
  static constexpr bool kFused = true;
  __m256 a, b;

  static Lanes splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static Lanes load(const float* x) { return {_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)}; }
  static __m128i raw(const void* x) { return _mm_loadu_si128(static_cast<const __m128i*>(x)); }
  static __m256 shifted(__m128i raw) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16)); }
  static Lanes load(const bfloat16* x) { return {shifted(raw(x)), shifted(raw(x + 8))}; }
  static Lanes load(const float16* x) { return {_mm256_cvtph_ps(raw(x)), _mm256_cvtph_ps(raw(x + 8))}; }
  template <typename From>
  static void load_two(const From* x, Lanes* a, Lanes* b) {
    *a = load(x);
    *b = load(x + 16);
  }
  void store(float* x) const {
    _mm256_storeu_ps(x, a);
    _mm256_storeu_ps(x + 8, b);
  }
  bool all_negative() const { return _mm256_movemask_ps(_mm256_and_ps(a, b)) == 0xff; }
  double sum() const {
    const auto halves = [](__m256 x) {
      return _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(x)), _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)));
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
inline Lanes<float> rounded(Lanes<float> x) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, kNearest), _mm256_round_ps(x.b, kNearest)};
}
inline __m256 scaled_half(__m256 y, __m256 n) {
  const __m256i e = _mm256_add_epi32(_mm256_castps_si256(y), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23));
  return _mm256_andnot_ps(_mm256_cmp_ps(n, _mm256_set1_ps(-125.0f), _CMP_LT_OQ), _mm256_castsi256_ps(e));
}
inline Lanes<float> scaled(Lanes<float> y, Lanes<float> n) { return {scaled_half(y.a, n.a), scaled_half(y.b, n.b)}; }

#endif

// True if lanes are loaded from T as fast as from what a block of T was widened to before.
template <typename T>
#if defined(__AVX2__)
constexpr bool kLoads = true;
#else
constexpr bool kLoads = sizeof(T) >= 4;
#endif

// ---- exponentials -------------------------------------------------------------------------------------------

template <int kTerms>
inline Lanes<float> polynomial(Lanes<float> x, const float (&coefficients)[kTerms]) {
  Lanes<float> y = Lanes<float>::splat(coefficients[0]);
  for (int k = 1; k < kTerms; ++k) y = fma(y, x, Lanes<float>::splat(coefficients[k]));
  return y;
}

// 2^x for x <= 126, 0 for results below the normal numbers; NaN, or 0, for -inf. Within 1.9e-7. Minimax polynomials
// with the constant exactly 1, so that 2^0 is exact.
inline Lanes<float> exp2(Lanes<float> x) {
#if defined(__AVX512F__)
  // Polynomial on [0, 1): scalef handles the integer part.
  static constexpr float kCoefficients[] = {1.867130166e-3f, 9.017029777e-3f, 5.579991266e-2f,
                                            2.401644439e-1f, 6.931512952e-1f, 1.0f};
  const __m512 f = _mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  return {_mm512_scalef_ps(polynomial({f}, kCoefficients).v, x.v)};
#else
  // Polynomial on [-1/2, 1/2].
  static constexpr float kCoefficients[] = {1.326465281e-3f, 9.671511129e-3f, 5.550733954e-2f,
                                            2.402224243e-1f, 6.931470037e-1f, 1.0f};
  const Lanes<float> n = rounded(x);
  return scaled(polynomial(x - n, kCoefficients), n);
#endif
}

// e^x for x <= 0, 0 for results below the normal numbers and for -inf; within an ulp (Cephes), as exp_flushed.
inline Lanes<float> exp(Lanes<float> x) {
  using L = Lanes<float>;
  static constexpr float kCoefficients[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                            4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  const L c = larger(L::splat(-150.0f), x);  // NaN passes
  const L n = rounded(c * L::splat(1.44269504f));
  const L r = fma(n, L::splat(2.12194440e-4f), fma(n, L::splat(-0.693359375f), c));
  const L y = fma(polynomial(r, kCoefficients) * r, r, r) + L::splat(1.0f);
  return scaled(y, n);
}

// Writes an output from a buffer. Outputs too large for the caches are streamed past them: a cached store reads the
// line first.
template <typename T>
inline void store_out(T* out, const T* from, int64_t n, [[maybe_unused]] bool stream) {
#if defined(__AVX2__)
  if (stream) {
#if defined(__AVX512F__)
    constexpr int64_t kBytes = 64;
    const auto move = [](T* to, const T* x) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(x));
    };
#else
    constexpr int64_t kBytes = 32;
    const auto move = [](T* to, const T* x) {
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
    };
#endif
    constexpr int64_t kWidth = kBytes / static_cast<int64_t>(sizeof(T));
    int64_t k = 0;
    for (; k < n && reinterpret_cast<uintptr_t>(out + k) % kBytes; ++k) out[k] = from[k];
    for (; k + kWidth <= n; k += kWidth) move(out + k, from + k);
    for (; k < n; ++k) out[k] = from[k];
    _mm_sfence();
    return;
  }
#endif
  std::memcpy(out, from, n * sizeof(T));
}

}  // namespace
}  // namespace REWARDOPS_ISA
}  // namespace rewardops::cpu
