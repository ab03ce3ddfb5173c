// One head of one step of the gated delta rule, and 16-bit floats, for several levels of x86-64.
//
// A compiler vectorises the loops over columns; the levels are the same source compiled for
// different processors, so a library built on one machine runs, and runs well, on another.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#define GDN_X86 1
#include <immintrin.h>
#endif

#if defined(__GNUC__)
#define GDN_INLINE __attribute__((always_inline)) inline
#else
#define GDN_INLINE __forceinline
#endif

// The state may be updated in place, which a compiler takes for a dependence between columns.
#if defined(__clang__)
#define GDN_COLUMNS_ARE_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define GDN_COLUMNS_ARE_INDEPENDENT _Pragma("GCC ivdep")
#else
#define GDN_COLUMNS_ARE_INDEPENDENT __pragma(loop(ivdep))
#endif

namespace {

// ---------------------------------------------------------------------------------------------
// Arithmetic
// ---------------------------------------------------------------------------------------------

// One head. k, q, u, o and the gates are already in the type of the arithmetic.
template <class C>
struct Head {
  const C* state;     // (K, columns), rows `stride` apart
  C* new_state;       // the same, may be `state`
  int64_t K, columns, stride;
  const C *k, *q;     // (K,)
  C alpha, beta, scale;
  bool has_erase;
  C* u;               // (columns,), v on entry
  C* o;               // (columns,), may not be u
};

// a b + c. Left to the compiler, it would be rounded once in one version of a loop and twice in
// another, and a state updated in place would not be bit for bit what it is elsewhere.
template <bool has_fma, class C>
GDN_INLINE C multiply_add(C a, C b, C c) {
  if constexpr (!has_fma) {
    return a * b + c;
  } else if constexpr (sizeof(C) == 4) {
    return __builtin_fmaf(a, b, c);
  } else {
    return __builtin_fma(a, b, c);
  }
}

// W columns, which stay in registers over all rows.
template <int W, bool has_fma, bool has_erase, class C>
GDN_INLINE void advance_block(const Head<C>& x, int64_t first) {
  const C* state = x.state + first;
  C* new_state = x.new_state + first;
  C u[W], sum[W];

  // w v                                                               [W]
  for (int j = 0; j < W; ++j) u[j] = x.beta * x.u[first + j];

  // S'^T k, the decay taken with k;  u = w v - e S'^T k               [W]
  if (has_erase) {
    for (int j = 0; j < W; ++j) sum[j] = C(0);
    for (int64_t i = 0; i < x.K; ++i) {
      const C k_i = x.alpha * x.k[i];
      const C* row = state + i * x.stride;
      for (int j = 0; j < W; ++j) sum[j] = multiply_add<has_fma>(k_i, row[j], sum[j]);
    }
    for (int j = 0; j < W; ++j) u[j] -= x.beta * sum[j];
  }

  // S = alpha S + k u^T,  o = scale S^T q                             [K, W], [W]
  for (int j = 0; j < W; ++j) sum[j] = C(0);
  for (int64_t i = 0; i < x.K; ++i) {
    const C k_i = x.k[i], q_i = x.q[i];
    const C* row = state + i * x.stride;
    C* new_row = new_state + i * x.stride;
    GDN_COLUMNS_ARE_INDEPENDENT
    for (int j = 0; j < W; ++j) {
      const C s = multiply_add<has_fma>(k_i, u[j], x.alpha * row[j]);
      new_row[j] = s;
      sum[j] = multiply_add<has_fma>(q_i, s, sum[j]);
    }
  }
  for (int j = 0; j < W; ++j) x.o[first + j] = x.scale * sum[j];
}

template <bool has_fma, bool has_erase, class C>
GDN_INLINE void advance_columns(const Head<C>& x) {
  int64_t j = 0;
  // float64 has half the columns per register.
  constexpr int kWidest = sizeof(C) == 4 ? 128 : 64;
  for (; j + kWidest <= x.columns; j += kWidest) advance_block<kWidest, has_fma, has_erase>(x, j);
  for (; j + 32 <= x.columns; j += 32) advance_block<32, has_fma, has_erase>(x, j);
  for (; j + 8 <= x.columns; j += 8) advance_block<8, has_fma, has_erase>(x, j);
  for (; j < x.columns; ++j) advance_block<1, has_fma, has_erase>(x, j);
}

template <bool has_fma, class C>
GDN_INLINE void advance(const Head<C>& x) {
  if (x.has_erase) {
    advance_columns<has_fma, true>(x);
  } else {
    advance_columns<has_fma, false>(x);
  }
}

// ---------------------------------------------------------------------------------------------
// 16-bit floats
// ---------------------------------------------------------------------------------------------

template <class To, class From>
GDN_INLINE To bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

GDN_INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, rest = uint32_t(h & 0x7fffu) << 13;
  // The product moves the exponent's bias from 15 to 127, of subnormal numbers too.
  const float value = bits<float>(rest) * 0x1p112f;
  const uint32_t found = rest >= 0x0f800000u ? rest | 0x7f800000u : bits<uint32_t>(value);
  return bits<float>(found | sign);
}

GDN_INLINE uint16_t float_to_half(float x) {
  const uint32_t all = bits<uint32_t>(x), sign = all >> 16 & 0x8000u, rest = all & 0x7fffffffu;
  if (rest > 0x7f800000u) return uint16_t(sign | 0x7e00u);
  // From 65520 on, the nearest is infinity.
  if (rest >= 0x477ff000u) return uint16_t(sign | 0x7c00u);
  // Below 2^-14: the sum with 0.5 rounds at 2^-24, the last bit of a subnormal number.
  if (rest < 0x38800000u) {
    return uint16_t(sign | (bits<uint32_t>(bits<float>(rest) + 0.5f) - 0x3f000000u));
  }
  // Round to nearest, ties to even: 13 bits go; the bias goes from 127 to 15.
  return uint16_t(sign | ((rest + 0xfffu + (rest >> 13 & 1u) - (112u << 23)) >> 13));
}

GDN_INLINE float bfloat_to_float(uint16_t b) { return bits<float>(uint32_t(b) << 16); }

GDN_INLINE uint16_t float_to_bfloat(float x) {
  const uint32_t all = bits<uint32_t>(x);
  const uint32_t rounded = (all + 0x7fffu + (all >> 16 & 1u)) >> 16;
  return uint16_t(x == x ? rounded : (all >> 16 | 0x40u));
}

// ---------------------------------------------------------------------------------------------
// The same code for several levels of x86-64, chosen once at run time
// ---------------------------------------------------------------------------------------------

struct Level {
  const char* name;
  bool (*is_there)();
  void (*advance32)(const Head<float>&);
  void (*advance64)(const Head<double>&);
  void (*widen_half)(const uint16_t*, float*, int64_t);
  void (*narrow_half)(const float*, uint16_t*, int64_t);
  void (*widen_bfloat)(const uint16_t*, float*, int64_t);
  void (*narrow_bfloat)(const float*, uint16_t*, int64_t);
};

#define GDN_FOR_LEVEL(level, has_fma, target)                                                          \
  target void advance32_##level(const Head<float>& x) { advance<has_fma>(x); }                         \
  target void advance64_##level(const Head<double>& x) { advance<has_fma>(x); }                        \
  target void widen_bfloat_##level(const uint16_t* from, float* to, int64_t n) {              \
    for (int64_t i = 0; i < n; ++i) to[i] = bfloat_to_float(from[i]);                         \
  }                                                                                           \
  target void narrow_bfloat_##level(const float* from, uint16_t* to, int64_t n) {             \
    for (int64_t i = 0; i < n; ++i) to[i] = float_to_bfloat(from[i]);                         \
  }

#define GDN_LEVEL(level, half)                                                                \
  {                                                                                           \
    #level, is_there_##level, advance32_##level, advance64_##level, widen_half_##half,        \
        narrow_half_##half, widen_bfloat_##level, narrow_bfloat_##level                       \
  }

// Every processor of other kinds that is worth a build has it.
#if defined(__FP_FAST_FMA) && defined(__FP_FAST_FMAF)
GDN_FOR_LEVEL(baseline, true, )
#else
GDN_FOR_LEVEL(baseline, false, )
#endif

bool is_there_baseline() { return true; }

void widen_half_baseline(const uint16_t* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = half_to_float(from[i]);
}

void narrow_half_baseline(const float* from, uint16_t* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = float_to_half(from[i]);
}

#if defined(GDN_X86)
#define GDN_AVX2 __attribute__((target("avx2,fma,f16c")))
#if defined(__clang__)
#define GDN_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")))
#else
#define GDN_AVX512 \
  __attribute__((  \
      target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,prefer-vector-width=512")))
#endif

GDN_FOR_LEVEL(avx2, true, GDN_AVX2)
GDN_FOR_LEVEL(avx512, true, GDN_AVX512)

bool is_there_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

bool is_there_avx512() {
  return is_there_avx2() && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}

GDN_AVX2 void widen_half_avx2(const uint16_t* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(x));
  }
  widen_half_baseline(from + i, to + i, n - i);
}

GDN_AVX2 void narrow_half_avx2(const float* from, uint16_t* to, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 x = _mm256_loadu_ps(from + i);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  narrow_half_baseline(from + i, to + i, n - i);
}
#endif

// Best first.
constexpr Level kLevels[] = {
#if defined(GDN_X86)
    GDN_LEVEL(avx512, avx2),
    GDN_LEVEL(avx2, avx2),
#endif
    GDN_LEVEL(baseline, baseline),
};

// The level that GDN_OPS_NATIVE_LEVEL names, or the best one; null where it is not there.
const Level* find_level(const char* wanted) {
#if defined(GDN_X86)
  __builtin_cpu_init();
#endif
  for (const Level& level : kLevels) {
    const bool is_named = wanted == nullptr || std::strcmp(wanted, level.name) == 0;
    if (is_named && level.is_there()) return &level;
  }
  return nullptr;
}

}  // namespace
