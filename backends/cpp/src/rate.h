// Multiply-adds on registers alone: their rate is the ceiling of every kernel of the level.
#pragma once

#include "vectors.h"
#if GDN_FEATURES == 4
#include <immintrin.h>
#endif

namespace {

// Sums that do not wait for each other: enough to hide the time of an addition, and few enough for
// the registers. Two in a row, as compilers unroll short loops.
#if defined(__aarch64__) || GDN_LANES == 16
constexpr int SUMS = 12;
#else
constexpr int SUMS = 6;
#endif

template <bool kOfPairs>
GDN_INLINE Vec add_one(Vec sum, Vec factor) {
#if GDN_FEATURES == 4
  if (kOfPairs) return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)factor, (__m512bh)factor);
#endif
  return sum * factor + factor;
}

template <bool kOfPairs>
GDN_INLINE float add_up(int64_t rounds) {
  const Vec factor = all(0.5f);
  Vec sums[SUMS][2], total = {};
  // All differ, also from 1, which stays 1: a compiler leaves out what it knows.
  for (int i = 0; i < 2 * SUMS; ++i) sums[i / 2][i % 2] = all(float(2 + i));
  for (int64_t round = 0; round < rounds; ++round) {
    for (int i = 0; i < SUMS; ++i) {
      for (Vec& sum : sums[i]) sum = add_one<kOfPairs>(sum, factor);
    }
  }
  for (int i = 0; i < SUMS; ++i) total += sums[i][0] + sums[i][1];
  return sum(total);
}

// Run so many rounds: of float32, or of pairs where the forward multiplies bfloat16 so. Return the
// operations, two for each number that is multiplied; what they add up to goes to memory[0].
int64_t run_multiply_adds(int64_t rounds, int64_t type, float* memory) {
  const bool is_of_pairs = GDN_FEATURES == 4 && type == kGdnBfloat16;
  memory[0] = is_of_pairs ? add_up<true>(rounds) : add_up<false>(rounds);
  return rounds * SUMS * 2 * W * (is_of_pairs ? 4 : 2);
}

}  // namespace
