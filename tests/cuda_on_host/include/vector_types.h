// CUDA's vector types, aligned as it aligns them, and dim3.
#pragma once

#define CUDA_ON_HOST_VECTORS(name, T)                                           \
  struct name##1 { T x; };                                                      \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                            \
  struct name##3 { T x, y, z; };                                                \
  struct alignas(sizeof(T) < 8 ? 4 * sizeof(T) : 16) name##4 { T x, y, z, w; }; \
  constexpr name##1 make_##name##1(T x) { return {x}; }                         \
  constexpr name##2 make_##name##2(T x, T y) { return {x, y}; }                 \
  constexpr name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }         \
  constexpr name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

CUDA_ON_HOST_VECTORS(char, signed char)
CUDA_ON_HOST_VECTORS(uchar, unsigned char)
CUDA_ON_HOST_VECTORS(short, short)
CUDA_ON_HOST_VECTORS(ushort, unsigned short)
CUDA_ON_HOST_VECTORS(int, int)
CUDA_ON_HOST_VECTORS(uint, unsigned)
CUDA_ON_HOST_VECTORS(long, long)
CUDA_ON_HOST_VECTORS(ulong, unsigned long)
CUDA_ON_HOST_VECTORS(longlong, long long)
CUDA_ON_HOST_VECTORS(ulonglong, unsigned long long)
CUDA_ON_HOST_VECTORS(float, float)
CUDA_ON_HOST_VECTORS(double, double)

#undef CUDA_ON_HOST_VECTORS

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 of) : x(of.x), y(of.y), z(of.z) {}
};
