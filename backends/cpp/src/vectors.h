// Vectors of the level that is compiled: GDN_LANES floats each, by the vector extensions of GCC and
// Clang, and rows of the other element types as rows of float32.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <initializer_list>

#include "interface.h"

#define GDN_INLINE __attribute__((always_inline)) inline

namespace {

constexpr int W = GDN_LANES;
#define GDN_COLUMN_VECTORS 4

// Unroll a loop of known length, so that arrays of vectors are registers.
#if defined(__clang__)
#define GDN_UNROLL _Pragma("unroll")
#define GDN_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define GDN_UNROLL _Pragma("GCC unroll 16")
#define GDN_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (Bits){__VA_ARGS__})
#endif

// Aligned like a float: loads and stores work at any address.
typedef float Vec __attribute__((vector_size(4 * W), aligned(4)));
typedef uint32_t Bits __attribute__((vector_size(4 * W), aligned(4)));
typedef int32_t Lanes __attribute__((vector_size(4 * W), aligned(4)));
typedef uint16_t Halves __attribute__((vector_size(2 * W), aligned(2)));

GDN_INLINE Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
GDN_INLINE void store(float* p, Vec x) { *reinterpret_cast<Vec*>(p) = x; }
// x - 0 is x, of every x: a compiler makes a broadcast of it.
GDN_INLINE Vec all(float x) { return x - Vec{}; }

GDN_INLINE float sum(Vec x) {
  float parts[W];
  memcpy(parts, &x, sizeof parts);
  for (int step = W / 2; step; step /= 2) {
    for (int i = 0; i < step; ++i) parts[i] += parts[i + step];
  }
  return parts[0];
}

// The first n lanes, none for n <= 0: all bits of a lane, or none.
GDN_INLINE Bits lanes_below(int64_t n) {
#if GDN_LANES == 16
  const Lanes lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif GDN_LANES == 8
  const Lanes lanes = {0, 1, 2, 3, 4, 5, 6, 7};
#else
  const Lanes lanes = {0, 1, 2, 3};
#endif
  return (Bits)(lanes < int32_t(n) - Lanes{});
}

GDN_INLINE Vec keep(Bits lanes, Vec x) { return (Vec)((Bits)x & lanes); }

// The elements of the lower or upper halves of two vectors in turns: a0 b0 a1 b1 ...
#if GDN_LANES == 16
GDN_INLINE Vec zip_low(Vec a, Vec b) {
  return GDN_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
GDN_INLINE Vec zip_high(Vec a, Vec b) {
  return GDN_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
#elif GDN_LANES == 8
GDN_INLINE Vec zip_low(Vec a, Vec b) { return GDN_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
GDN_INLINE Vec zip_high(Vec a, Vec b) { return GDN_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
#else
GDN_INLINE Vec zip_low(Vec a, Vec b) { return GDN_SHUFFLE(a, b, 0, 4, 1, 5); }
GDN_INLINE Vec zip_high(Vec a, Vec b) { return GDN_SHUFFLE(a, b, 2, 6, 3, 7); }
#endif

constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
GDN_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// ---------------------------------------------------------------------------------------------
// 16-bit floats
// ---------------------------------------------------------------------------------------------

GDN_INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, rest = uint32_t(h & 0x7fffu) << 13;
  float value, moved = 0x1p112f;
  memcpy(&value, &rest, 4);
  // The product moves the exponent's bias from 15 to 127, of subnormal numbers too.
  value *= moved;
  uint32_t found;
  memcpy(&found, &value, 4);
  if (rest >= 0x0f800000u) found = rest | 0x7f800000u;
  found |= sign;
  memcpy(&value, &found, 4);
  return value;
}

GDN_INLINE uint16_t float_to_half(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return uint16_t(sign | 0x7e00u);
  // From 65520 on, the nearest is infinity.
  if (rest >= 0x477ff000u) return uint16_t(sign | 0x7c00u);
  if (rest < 0x38800000u) {
    // Below 2^-14: the sum with 0.5 rounds at 2^-24, the last bit of a subnormal number.
    float value;
    memcpy(&value, &rest, 4);
    value += 0.5f;
    uint32_t moved;
    memcpy(&moved, &value, 4);
    return uint16_t(sign | (moved - 0x3f000000u));
  }
  // Round to nearest, ties to even: 13 bits go; the bias goes from 127 to 15.
  return uint16_t(sign | ((rest + 0xfffu + (rest >> 13 & 1u) - (112u << 23)) >> 13));
}

GDN_INLINE float bfloat_to_float(uint16_t b) {
  const uint32_t bits = uint32_t(b) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

GDN_INLINE uint16_t float_to_bfloat(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return uint16_t(x == x ? rounded : (bits >> 16 | 0x40u));
}

// Read n numbers of a type as float32.
void widen(const void* from, int64_t type, int64_t first, float* to, int64_t n) {
  if (type == kGdnFloat32) {
    memcpy(to, static_cast<const float*>(from) + first, size_t(n) * 4);
    return;
  }
  const uint16_t* x = static_cast<const uint16_t*>(from) + first;
  if (type == kGdnBfloat16) {
    int64_t i = 0;
    for (; i + W <= n; i += W) {
      Halves narrow;
      memcpy(&narrow, x + i, sizeof narrow);
      const Bits bits = __builtin_convertvector(narrow, Bits) << 16;
      memcpy(to + i, &bits, sizeof bits);
    }
    for (; i < n; ++i) to[i] = bfloat_to_float(x[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = half_to_float(x[i]);
  }
}

// Write n float32 numbers in a type.
void narrow(const float* from, void* to, int64_t type, int64_t first, int64_t n) {
  if (type == kGdnFloat32) {
    memcpy(static_cast<float*>(to) + first, from, size_t(n) * 4);
    return;
  }
  uint16_t* x = static_cast<uint16_t*>(to) + first;
  if (type == kGdnBfloat16) {
    int64_t i = 0;
    for (; i + W <= n; i += W) {
      Bits bits;
      memcpy(&bits, from + i, sizeof bits);
      const Bits rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
      const Bits nan = bits >> 16 | 0x40u;
      const Vec value = load(from + i);
      const Bits is_number = (Bits)(value == value);
      const Halves result =
          __builtin_convertvector((rounded & is_number) | (nan & ~is_number), Halves);
      memcpy(x + i, &result, sizeof result);
    }
    for (; i < n; ++i) x[i] = float_to_bfloat(from[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) x[i] = float_to_half(from[i]);
  }
}

float number(const GdnArray& x, int64_t index) {
  if (x.type == kGdnFloat32) return static_cast<const float*>(x.data)[index];
  const uint16_t bits = static_cast<const uint16_t*>(x.data)[index];
  return x.type == kGdnBfloat16 ? bfloat_to_float(bits) : half_to_float(bits);
}

// Return 1 / sqrt(sum of squares + 1e-6) of a row; `padded` is a multiple of W, with zeros behind.
float inverse_norm(const float* x, int64_t padded) {
  Vec squares = {};
  for (int64_t i = 0; i < padded; i += W) squares += load(x + i) * load(x + i);
  return 1.0f / __builtin_sqrtf(sum(squares) + 1e-6f);
}

GDN_INLINE void multiply(float* x, float factor, int64_t padded) {
  for (int64_t i = 0; i < padded; i += W) store(x + i, load(x + i) * factor);
}

}  // namespace
