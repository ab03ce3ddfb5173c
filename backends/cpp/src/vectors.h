// Vectors of the level that is compiled: GDN_LANES floats each, by the vector extensions of GCC and
// Clang, and rows of the other element types as rows of what is computed with.
#pragma once

#include <stdint.h>
#include <string.h>

#include <cmath>
#include <initializer_list>
#include <type_traits>

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

#include "interface.h"

#define GDN_INLINE __attribute__((always_inline)) inline
#define GDN_NEAREST (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)

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
typedef int32_t Ints __attribute__((vector_size(4 * W), aligned(4)));
typedef uint16_t Halves __attribute__((vector_size(2 * W), aligned(2)));
typedef double Wide __attribute__((vector_size(4 * W), aligned(8)));

// The vector of what is computed with, float or double, and how many it holds.
template <class S>
struct VectorOf {
  typedef Vec type;
};
template <>
struct VectorOf<double> {
  typedef Wide type;
};
template <class S>
using VecOf = typename VectorOf<S>::type;
template <class S>
constexpr int lanes = int(sizeof(Vec) / sizeof(S));

GDN_INLINE Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
GDN_INLINE Wide load(const double* p) { return *reinterpret_cast<const Wide*>(p); }
GDN_INLINE void store(float* p, Vec x) { *reinterpret_cast<Vec*>(p) = x; }
GDN_INLINE void store(double* p, Wide x) { *reinterpret_cast<Wide*>(p) = x; }

// Store past the caches, at an address that is aligned to a vector; `has_streams` says whether it
// does. Other threads see it after `end_streams`.
#if defined(__AVX512F__) && GDN_LANES == 16
constexpr bool has_streams = true;
GDN_INLINE void stream(float* p, Vec x) { _mm512_stream_ps(p, (__m512)x); }
GDN_INLINE void end_streams() { _mm_sfence(); }
#elif defined(__AVX__) && GDN_LANES == 8
constexpr bool has_streams = true;
GDN_INLINE void stream(float* p, Vec x) { _mm256_stream_ps(p, (__m256)x); }
GDN_INLINE void end_streams() { _mm_sfence(); }
#else
constexpr bool has_streams = false;
GDN_INLINE void stream(float* p, Vec x) { store(p, x); }
GDN_INLINE void end_streams() {}
#endif

// x - 0 is x, of every x: a compiler makes a broadcast of it.
GDN_INLINE Vec all(float x) { return x - Vec{}; }
GDN_INLINE Wide all(double x) { return x - Wide{}; }

// Hold a vector that has two uses in a register: a compiler would load it for each of them.
#if defined(__x86_64__)
#define GDN_KEEP(x) asm("" : "+v"(x))
#elif defined(__aarch64__)
#define GDN_KEEP(x) asm("" : "+w"(x))
#else
#define GDN_KEEP(x) (void)(x)
#endif

template <class S>
GDN_INLINE S sum_lanes(VecOf<S> x) {
  S parts[lanes<S>];
  memcpy(parts, &x, sizeof parts);
  for (int step = lanes<S> / 2; step; step /= 2) {
    for (int i = 0; i < step; ++i) parts[i] += parts[i + step];
  }
  return parts[0];
}
GDN_INLINE float sum(Vec x) { return sum_lanes<float>(x); }
GDN_INLINE double sum(Wide x) { return sum_lanes<double>(x); }

// The first n lanes, none for n <= 0: all bits of a lane, or none.
GDN_INLINE Bits lanes_below(int64_t n) {
#if GDN_LANES == 16
  const Ints all_lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif GDN_LANES == 8
  const Ints all_lanes = {0, 1, 2, 3, 4, 5, 6, 7};
#else
  const Ints all_lanes = {0, 1, 2, 3};
#endif
  return (Bits)(all_lanes < int32_t(n) - Ints{});
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
  // The exponent's bias moves from 15 to 127, and that of infinity and NaN on to 255.
  uint32_t found = rest + (112u << 23);
  if (rest >= 0x0f800000u) found += 112u << 23;
  float value;
  if (rest < 0x00800000u) {
    // A subnormal number is the rest of 2^-14 + it, which is none as a float32.
    found += 1u << 23;
    memcpy(&value, &found, 4);
    value -= 0x1p-14f;
    memcpy(&found, &value, 4);
  }
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

// Elements of rows of 16-bit floats.
struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

GDN_INLINE float scalar(Bfloat16 x) { return bfloat_to_float(x.bits); }
GDN_INLINE float scalar(Float16 x) { return half_to_float(x.bits); }
GDN_INLINE float scalar(float x) { return x; }
GDN_INLINE double scalar(double x) { return x; }

GDN_INLINE void set(Bfloat16& to, float x) { to.bits = float_to_bfloat(x); }
GDN_INLINE void set(Float16& to, float x) { to.bits = float_to_half(x); }
GDN_INLINE void set(float& to, float x) { to = x; }
GDN_INLINE void set(double& to, double x) { to = x; }

GDN_INLINE Vec load(const Bfloat16* p) {
  Halves x;
  memcpy(&x, p, sizeof x);
  return (Vec)(__builtin_convertvector(x, Bits) << 16);
}

// The nearest bfloat16, in the upper halves; what is in the lower ones has no meaning.
GDN_INLINE Bits rounded(Vec x) {
  const Bits bits = (Bits)x;
  return x == x ? bits + 0x7fffu + (bits >> 16 & 1u) : bits | 0x400000u;
}

GDN_INLINE void store(Bfloat16* p, Vec x) {
  const Halves result = __builtin_convertvector(rounded(x) >> 16, Halves);
  memcpy(p, &result, sizeof result);
}

// As `half_to_float` and `float_to_half`, a vector at a time.
GDN_INLINE Vec load(const Float16* p) {
#if defined(__AVX512F__) && GDN_LANES == 16
  // The masked forms: GCC warns of the others.
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (Vec)_mm512_maskz_cvtph_ps(0xffff, x);
#elif defined(__F16C__) && GDN_LANES == 8
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Halves x;
  memcpy(&x, p, sizeof x);
  const Bits h = __builtin_convertvector(x, Bits);
  const Bits sign = (h & 0x8000u) << 16, rest = (h & 0x7fffu) << 13;
  // No operand may be subnormal as a float32, which is taken for zero at times (subnormal.h).
  const Bits subnormal = (Bits)((Vec)(rest + (113u << 23)) - 0x1p-14f);
  Bits found = (Ints)rest < 0x00800000 ? subnormal : rest + (112u << 23);
  found = (Ints)rest >= 0x0f800000 ? rest | 0x7f800000u : found;
  return (Vec)(found | sign);
#endif
}

GDN_INLINE void store(Float16* p, Vec x) {
#if defined(__AVX512F__) && GDN_LANES == 16
  const __m256i narrow = _mm512_maskz_cvtps_ph(0xffff, (__m512)x, GDN_NEAREST);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow);
#elif defined(__F16C__) && GDN_LANES == 8
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)x, GDN_NEAREST));
#else
  const Bits bits = (Bits)x, sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  const Bits normal = (rest + 0xfffu + (rest >> 13 & 1u) - (112u << 23)) >> 13;
  const Bits subnormal = (Bits)((Vec)rest + 0.5f) - 0x3f000000u;
  Bits found = (Ints)rest < 0x38800000 ? subnormal : normal;
  found = (Ints)rest >= 0x477ff000 ? Bits{} + 0x7c00u : found;
  found = (Ints)rest > 0x7f800000 ? Bits{} + 0x7e00u : found;
  const Halves result = __builtin_convertvector(found | sign, Halves);
  memcpy(p, &result, sizeof result);
#endif
}

constexpr int EVEN = __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__;  // which of two vectors has them

// A row of N vectors. Two vectors of bfloat16 are the even and the odd of their elements, which are
// halves of the same words: nothing has to be moved; `arrange` puts a row of numbers into this order.
// Pointers: Clang takes a reference to such an array for one that is aligned like a whole vector.
template <class S, int N, class E>
GDN_INLINE void load_row(const E* p, VecOf<S>* to) {
  if constexpr (std::is_same_v<E, Bfloat16>) {
    for (int n = 0; n < N; n += 2) {
      Bits words;
      memcpy(&words, p + n * W, sizeof words);
      to[n + EVEN] = (Vec)(words << 16);
      to[n + 1 - EVEN] = (Vec)(words & 0xffff0000u);
    }
  } else {
    for (int n = 0; n < N; ++n) to[n] = load(p + n * lanes<S>);
  }
}

template <class S, int N, class E>
GDN_INLINE void store_row(E* p, const VecOf<S>* from) {
  if constexpr (std::is_same_v<E, Bfloat16>) {
    for (int n = 0; n < N; n += 2) {
      const Bits low = rounded(from[n + EVEN]) >> 16;
      const Bits words = low | (rounded(from[n + 1 - EVEN]) & 0xffff0000u);
      memcpy(p + n * W, &words, sizeof words);
    }
  } else {
    for (int n = 0; n < N; ++n) store(p + n * lanes<S>, from[n]);
  }
}

// Put the columns of N vectors into the order of `load_row`, or back.
template <int N, bool is_back>
GDN_INLINE void arrange(float* x) {
  for (int n = 0; n < N; n += 2, x += 2 * W) {
    float given[2 * W];
    memcpy(given, x, sizeof given);
    for (int i = 0; i < W; ++i) {
      for (int odd = 0; odd < 2; ++odd) {
        const int row = odd * W + i, element = 2 * i + odd;
        x[is_back ? element : row] = given[is_back ? row : element];
      }
    }
  }
}

// Read n elements of one type as another: a vector at a time where 16 bits become float.
template <class E, class S>
GDN_INLINE void convert(const E* from, S* to, int64_t n) {
  if constexpr (std::is_same_v<E, S>) {
    memcpy(to, from, size_t(n) * sizeof(S));
    return;
  }
  int64_t i = 0;
  if constexpr (sizeof(E) + sizeof(S) == 6) {
    for (; i + W <= n; i += W) store(to + i, load(from + i));
  }
  for (from += i, to += i, n -= i, i = 0; i < n; ++i) set(to[i], scalar(from[i]));
}

// Read n numbers of a type, float or double.
template <class S>
void widen(const void* from, int64_t type, int64_t first, S* to, int64_t n) {
  if (type == kGdnFloat32) return convert(static_cast<const float*>(from) + first, to, n);
  if (type == kGdnBfloat16) return convert(static_cast<const Bfloat16*>(from) + first, to, n);
  if (type == kGdnFloat16) return convert(static_cast<const Float16*>(from) + first, to, n);
  convert(static_cast<const double*>(from) + first, to, n);
}

// Write n numbers in a type.
template <class S>
void narrow(const S* from, void* to, int64_t type, int64_t first, int64_t n) {
  if (type == kGdnFloat32) return convert(from, static_cast<float*>(to) + first, n);
  if (type == kGdnBfloat16) return convert(from, static_cast<Bfloat16*>(to) + first, n);
  if (type == kGdnFloat16) return convert(from, static_cast<Float16*>(to) + first, n);
  convert(from, static_cast<double*>(to) + first, n);
}

template <class S>
S number_of(const GdnArray& x, int64_t index) {
  if (x.type == kGdnFloat32) return static_cast<const float*>(x.data)[index];
  if (x.type == kGdnBfloat16) return scalar(static_cast<const Bfloat16*>(x.data)[index]);
  if (x.type == kGdnFloat16) return scalar(static_cast<const Float16*>(x.data)[index]);
  return S(static_cast<const double*>(x.data)[index]);
}
GDN_INLINE float number(const GdnArray& x, int64_t index) { return number_of<float>(x, index); }

// Return 1 / sqrt(sum of squares + 1e-6) of a row; `padded` is a multiple of the lanes, with zeros
// behind it.
template <class S>
S inverse_norm(const S* x, int64_t padded) {
  VecOf<S> squares = {};
  for (int64_t i = 0; i < padded; i += lanes<S>) squares += load(x + i) * load(x + i);
  return S(1) / std::sqrt(sum(squares) + S(1e-6));
}

template <class S>
GDN_INLINE void multiply(S* x, S factor, int64_t padded) {
  for (int64_t i = 0; i < padded; i += lanes<S>) store(x + i, load(x + i) * factor);
}

}  // namespace
