"""Define the C++ functions that `rounding` and `language` call; every emulated kernel has them.

Low precision is kept in floats: a value of bfloat16 or float16 is the float that is equal to it.
Tensors hold the 16 bits themselves. All of it is branchless, so that a compiler can vectorise it,
and exact: to the nearest, ties to even, subnormals and overflow included, a NaN stays one.

A product adds in the order of k, from what C holds, in float32. Products of two values of 16 bits
are exact in float32, so that a fused multiply-add and two instructions give the same sum.
"""

from __future__ import annotations

from typing import Final

GEMM: Final = "gdn_ops_gemm"
UNAWAITED_GEMM: Final = "gdn_ops_gemm_unawaited"
"""Names of the function that multiplies: it tells what a GPU would wait for."""

PRELUDE: Final = r"""
#include <math.h>
#include <stdint.h>
#include <string.h>

extern "C" {

static inline uint32_t gdn_ops_bits(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
static inline float gdn_ops_float(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }

/* A constant that has no short name. */
static inline float gdn_ops_constant_float32(int32_t i) { return gdn_ops_float((uint32_t)i); }
static inline double gdn_ops_constant_float64(int64_t i) { double x; memcpy(&x, &i, 8); return x; }

/* Rounds a float to bfloat16. */
static inline float gdn_ops_round_bfloat16(float x) {
  uint32_t u = gdn_ops_bits(x);
  uint32_t near = u + 0x7fffu + ((u >> 16) & 1u);
  uint32_t nan = u | 0x400000u;
  return gdn_ops_float(((u & 0x7fffffffu) > 0x7f800000u ? nan : near) & 0xffff0000u);
}

/* The bits of a bfloat16, from the float that is equal to it, and back. */
static inline uint16_t gdn_ops_encode_bfloat16(float x) { return gdn_ops_bits(x) >> 16; }
static inline float gdn_ops_decode_bfloat16(uint16_t b) { return gdn_ops_float((uint32_t)b << 16); }

/* The bits of the nearest float16. A subnormal is rounded by adding 0.5, whose last bit is its. */
static inline uint16_t gdn_ops_encode_float16(float x) {
  uint32_t u = gdn_ops_bits(x), sign = u & 0x80000000u, a = u ^ sign;
  uint32_t large = a > 0x7f800000u ? 0x7e00u : 0x7c00u;
  uint32_t small = gdn_ops_bits(gdn_ops_float(a) + 0.5f) - 0x3f000000u;
  uint32_t normal = (a + 0xc8000fffu + ((a >> 13) & 1u)) >> 13;
  uint32_t h = a >= 0x47800000u ? large : a < 0x38800000u ? small : normal;
  return (uint16_t)(h | (sign >> 16));
}

static inline float gdn_ops_decode_float16(uint16_t b) {
  uint32_t u = (uint32_t)(b & 0x7fffu) << 13, exponent = u & 0x0f800000u;
  uint32_t normal = u + 0x38000000u, large = u + 0x70000000u;
  uint32_t small = gdn_ops_bits(gdn_ops_float(u + 0x38800000u) - gdn_ops_float(0x38800000u));
  uint32_t f = exponent == 0x0f800000u ? large : exponent == 0u ? small : normal;
  return gdn_ops_float(f | (uint32_t)(b & 0x8000u) << 16);
}

/* Rounds a float to float16. */
static inline float gdn_ops_round_float16(float x) {
  return gdn_ops_decode_float16(gdn_ops_encode_float16(x));
}

/* An index of tile `number`; of the first element, if there is no such one. */
static thread_local int32_t gdn_ops_fault;
static inline int32_t gdn_ops_index(int64_t i, int64_t size, int64_t number) {
  if (i >= 0 && i < size) return (int32_t)i;
  gdn_ops_fault = (int32_t)number;
  return 0;
}

/* What a tile holds before anything is written to it. */
static inline int32_t gdn_ops_poison_float32(float *x, int32_t n) {
  for (int32_t i = 0; i < n; ++i) x[i] = gdn_ops_float(0x7fc00000u);
  return 0;
}
static inline int32_t gdn_ops_poison_float64(double *x, int32_t n) {
  for (int32_t i = 0; i < n; ++i) x[i] = (double)gdn_ops_float(0x7fc00000u);
  return 0;
}

}  // extern "C"

#pragma GCC push_options
#pragma GCC optimize("fp-contract=fast")

typedef float gdn_ops_vector __attribute__((vector_size(32)));

/* Four rows of C and VECTORS * 8 columns, in registers. */
template <int VECTORS>
static inline void gdn_ops_block(float *c, int ldc, const float *a, int row, int step,
                                 const float *b, int ldb, int K, int clear) {
  gdn_ops_vector sum[4][VECTORS], y[VECTORS];
  for (int r = 0; r < 4; ++r)
    for (int v = 0; v < VECTORS; ++v) {
      if (clear) sum[r][v] = gdn_ops_vector{};
      else memcpy(&sum[r][v], c + r * ldc + v * 8, 32);
    }
  for (int k = 0; k < K; ++k) {
    for (int v = 0; v < VECTORS; ++v) memcpy(&y[v], b + k * ldb + v * 8, 32);
    for (int r = 0; r < 4; ++r) {
      const float x = a[r * row + k * step];
      for (int v = 0; v < VECTORS; ++v) sum[r][v] += x * y[v];
    }
  }
  for (int r = 0; r < 4; ++r)
    for (int v = 0; v < VECTORS; ++v) memcpy(c + r * ldc + v * 8, &sum[r][v], 32);
}

/* All rows of VECTORS * 8 columns of C. A transposed B is turned first, 256 of its K at a time. */
template <int VECTORS>
static inline void gdn_ops_columns(float *c, int ldc, const float *a, int row, int step,
                                   const float *b, int ldb, int M, int K, int turned, int clear) {
  const int width = VECTORS * 8;
  float packed[256 * VECTORS * 8];
  for (int first = 0; first < K; first += 256) {
    const int part = K - first < 256 ? K - first : 256;
    for (int k = 0; turned && k < part; ++k)
      for (int l = 0; l < width; ++l) packed[k * width + l] = b[l * ldb + first + k];
    for (int i = 0; i < M; i += 4)
      gdn_ops_block<VECTORS>(c + i * ldc, ldc, a + i * row + first * step, row, step,
                             turned ? packed : b + first * ldb, turned ? width : ldb, part,
                             clear && first == 0);
  }
}

/* C += A B or C = A B. M is a multiple of 4, N of 8. */
extern "C" __attribute__((noinline)) int32_t gdn_ops_gemm(
    float *c, int ldc, const float *a, int lda, const float *b, int ldb, int M, int N, int K,
    int turned_a, int turned_b, int clear) {
  const int row = turned_a ? 1 : lda, step = turned_a ? lda : 1, column = turned_b ? ldb : 1;
  int j = 0;
  for (; j + 16 <= N; j += 16)
    gdn_ops_columns<2>(c + j, ldc, a, row, step, b + j * column, ldb, M, K, turned_b, clear);
  for (; j < N; j += 8)
    gdn_ops_columns<1>(c + j, ldc, a, row, step, b + j * column, ldb, M, K, turned_b, clear);
  return 0;
}
#define gdn_ops_gemm_unawaited gdn_ops_gemm

#pragma GCC pop_options
"""
