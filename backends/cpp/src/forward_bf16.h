// The forward for bfloat16 inputs on processors that multiply pairs of them: the products with K, Q,
// the state and the writes take bfloat16 operands and sum in float32; the state itself, the gates
// and the solve stay float32. A norm is a factor of a row of a product, so that no key is rounded.
#pragma once

#include <immintrin.h>

#include "forward.h"

namespace {

// A row of pairs: each lane holds the elements 2i (low) and 2i + 1 (high) of the summed axis.
typedef uint32_t Pair;

GDN_INLINE __m512 as_m512(Vec x) { return (__m512)x; }

// acc += A B over `depth` pairs: A(m, k) = a[m lda + k ka], B(k, n) = b[k ldb + n]. A line is asked
// for every few steps.
GDN_INLINE void multiply_pairs(Block& acc, const Pair* a, int64_t lda, int64_t ka, const Pair* b,
                               int64_t ldb, int64_t depth, const Lines& lines = {}) {
  for (int64_t k = 0; k < depth; ++k) {
    if (k < lines.count) __builtin_prefetch(lines.of[k]);
    __m512bh row[NV];
    for (int n = 0; n < NV; ++n) row[n] = (__m512bh)_mm512_loadu_si512(b + n * W);
    for (int m = 0; m < MR; ++m) {
      const __m512bh factor = (__m512bh)_mm512_set1_epi32(int(a[m * lda]));
      for (int n = 0; n < NV; ++n) {
        acc[m][n] = (Vec)_mm512_dpbf16_ps(as_m512(acc[m][n]), factor, row[n]);
      }
    }
    a += ka;
    b += ldb;
  }
}

// Pairs of two rows, rounded to the nearest bfloat16.
GDN_INLINE void store_pairs(Vec low, Vec high, Pair* to) {
  const __m512i first = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(as_m512(low)));
  const __m512i second = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(as_m512(high)));
  _mm512_storeu_si512(to, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
}

struct PairKeys {
  Pair* rows;      // [2C][Kp / 2]: k, then q, as they were given
  Pair *k_t, *q_t; // [Kp / 2][C]; without q, null
  Pair* tokens;    // [C / 2][Kp]: pairs of tokens of k
  float* products; // [2C][C], with all factors of rows
  float k_factor[C], q_factor[C];
};

int64_t forward_bf16_floats(const GdnSequences& c, int64_t panels) {
  const int64_t Kp = padded(c.K);
  return forward_floats(c, panels) + 2 * C * Kp + Kp * P / 2 + 2 * C * P + C * C / 2 + 8 * 16;
}

void load_pair_keys(const GdnSequences& c, const Task& t, int64_t token, int64_t count, int64_t Kp,
                    float* scratch, PairKeys& x) {
  const int64_t half = Kp / 2;
  const int halves = x.q_t ? 2 : 1;
  for (int64_t i = 0; i < C; ++i) {
    for (int is_q = 0; is_q < halves; ++is_q) {
      const GdnArray& given = is_q ? c.q : c.k;
      Pair* row = x.rows + (is_q * C + i) * half;
      float& factor = is_q ? x.q_factor[i] : x.k_factor[i];
      factor = is_q ? c.scale : 1.0f;
      if (i >= count) {
        memset(row, 0, size_t(half) * 4);
        continue;
      }
      const uint16_t* from = static_cast<const uint16_t*>(given.data);
      memcpy(row, from + at(given, t.row, token + i, t.head), size_t(c.K) * 2);
      memset(reinterpret_cast<uint16_t*>(row) + c.K, 0, size_t(Kp - c.K) * 2);
      if (c.qk_l2norm) {
        // The power of two goes into the row, where it rounds nothing: a factor above 1 could make
        // a large value overflow.
        widen(row, kGdnBfloat16, 0, scratch, Kp);
        int power = 0;
        factor *= __builtin_frexpf(inverse_norm(scratch, Kp), &power);
        multiply(scratch, __builtin_ldexpf(1.0f, power), Kp);
        narrow(scratch, row, kGdnBfloat16, 0, Kp);
      }
    }
  }
  // A pair is moved like a float.
  const float* rows = reinterpret_cast<const float*>(x.rows);
  transpose(rows, half, reinterpret_cast<float*>(x.k_t), C, C, half);
  if (x.q_t) transpose(rows + C * half, half, reinterpret_cast<float*>(x.q_t), C, C, half);
  for (int64_t i = 0; i < C; i += 2) {
    const Pair *even = x.rows + i * half, *odd = even + half;
    Pair* to = x.tokens + i / 2 * Kp;
    for (int64_t p = 0; p < half; ++p) {
      to[2 * p] = (even[p] & 0xffffu) | odd[p] << 16;
      to[2 * p + 1] = even[p] >> 16 | (odd[p] & 0xffff0000u);
    }
  }
  const int64_t used = round_up(count, MR);
  for (int64_t m = 0; m < halves * C; m += MR) {
    const int64_t i = m % C;
    if (i >= used || (m < C && !c.has_erase)) continue;
    for (int64_t j = 0; j < i + MR; j += P) {
      Block acc;
      clear(acc);
      multiply_pairs(acc, (m < C ? x.k_t : x.q_t) + i, 1, C, x.k_t + j, C, half);
      scale_rows(acc, (m < C ? x.k_factor : x.q_factor) + i);
      for (int y = 0; y < MR; ++y) {
        for (int n = 0; n < NV; ++n) acc[y][n] *= load(x.k_factor + j + n * W);
      }
      store_block(acc, x.products + m * C + j, C);
    }
  }
}

// U of one panel, as pairs of tokens: `writes`, and times d and the factor of the key: `kept`.
GDN_INLINE void form_pair_writes(const GdnSequences& c, const PairKeys& x, const Gates& g,
                                 int64_t used, int64_t half, const float* A, const Pair* S,
                                 const float* values, int64_t ldv, float* U, Pair* writes,
                                 Pair* kept) {
  float factor[C];
  for (int64_t i = 0; i < C; ++i) factor[i] = g.d[i] * x.k_factor[i];
  for (int64_t m = 0; m < used; m += MR) {
    Block acc;
    clear(acc);
    if (c.has_erase) multiply_pairs(acc, x.k_t + m, 1, C, S, P, half);
    for (int i = 0; i < MR; ++i) {
      const Vec decay = all(g.b[m + i] * x.k_factor[m + i]), beta = all(g.beta[m + i]);
      for (int n = 0; n < NV; ++n) {
        acc[i][n] = (load(values + (m + i) * ldv + n * W) - acc[i][n] * decay) * beta;
      }
    }
    if (c.has_erase) solve_block(acc, A, U, P, m);
    store_block(acc, U + m * P, P);
    for (int i = 0; i < MR; i += 2) {
      for (int n = 0; n < NV; ++n) {
        const int64_t place = (m + i) / 2 * P + n * W;
        store_pairs(acc[i][n], acc[i + 1][n], writes + place);
        store_pairs(acc[i][n] * all(factor[m + i]), acc[i + 1][n] * all(factor[m + i + 1]),
                    kept + place);
      }
    }
  }
}

void run_forward_bf16(const GdnSequences& c, const Task& t, float* memory) {
  const int64_t K = c.K, V = c.V, Kp = padded(K), half = Kp / 2, R = c.HV / c.H;
  const int64_t ldv = t.panels * P, size = t.panels * Kp * P;
  const bool has_outputs = c.o.data;
  Arena arena{memory};
  PairKeys x;
  x.rows = reinterpret_cast<Pair*>(arena.take(C * Kp));
  x.k_t = reinterpret_cast<Pair*>(arena.take(half * C));
  x.q_t = has_outputs ? reinterpret_cast<Pair*>(arena.take(half * C)) : nullptr;
  x.tokens = reinterpret_cast<Pair*>(arena.take(C / 2 * Kp));
  x.products = arena.take(2 * C * C);
  float *A = arena.take(C * C), *M = has_outputs ? arena.take(C * C) : nullptr;
  float *U = arena.take(C * P);
  Pair* S_pairs = reinterpret_cast<Pair*>(arena.take(half * P));
  Pair* writes = reinterpret_cast<Pair*>(arena.take(C / 2 * P));
  Pair* kept = reinterpret_cast<Pair*>(arena.take(C / 2 * P));
  Pair* M_pairs = reinterpret_cast<Pair*>(arena.take(C * C / 2));
  float *values = arena.take(C * ldv), *S = arena.take(R * size);
  float* powers = arena.take(R * t.panels);
  memset(powers, 0, size_t(R * t.panels) * 4);
  const States states{S, Kp, R, size};
  load_states(c, t, states);
  int64_t chunk = 0;
  for (int64_t token = t.first; token < t.last; token += C, ++chunk) {
    const int64_t count = least(C, t.last - token), used = round_up(count, MR);
    keep_states(c, t, states, chunk);
    load_pair_keys(c, t, token, count, Kp, values, x);
    for (int64_t r = 0; r < R; ++r) {
      const int64_t head = t.head * R + r;
      Gates g;
      load_gates(c, t, token, count, head, g);
      const bool may_flush = sizes_of(c, t, token, count, head, g).may_flush;
      with_flushing(may_flush, [&] {
        form_pairs<false>(g, x.products, count, A, M, nullptr, c.has_erase);
      });
      for (int64_t i = 0; has_outputs && i < used; ++i) {
        narrow(M + i * C, M_pairs + i * C / 2, kGdnBfloat16, 0, C);
      }
      float factor[C];
      for (int64_t i = 0; has_outputs && i < C; ++i) factor[i] = g.b[i] * x.q_factor[i];
      load_values(c.v, t, token, count, head, V, values);
      const Ahead ahead{c, t, c.v, token + C, head, token + C, r};
      for (int64_t p = 0; p < t.panels; ++p) {
        float *state = S + r * size + p * Kp * P, *columns = values + p * P;
        if (!has_outputs) {
          keep_in_range(state, Kp * P, columns, ldv, count, powers[r * t.panels + p]);
        }
        const Flushed flushed(may_flush && is_ordinary(state, Kp * P));
        for (int64_t i = 0; i < Kp; i += 2) {
          for (int n = 0; n < NV; ++n) {
            const float* row = state + i * P + n * W;
            store_pairs(load(row), load(row + P), S_pairs + i / 2 * P + n * W);
          }
        }
        form_pair_writes(c, x, g, used, half, A, S_pairs, columns, ldv, U, writes, kept);
        for (int64_t m = 0; has_outputs && m < used; m += MR) {
          Block acc;
          clear(acc);
          multiply_pairs(acc, x.q_t + m, 1, C, S_pairs, P, half, ahead.tile(p, m));
          scale_rows(acc, factor + m);
          multiply_pairs(acc, M_pairs + m * C / 2, C / 2, 1, writes, P, (m + MR) / 2);
          store_block(acc, columns + m * ldv, ldv);
        }
        for (int64_t m = 0; m < K; m += MR) {
          Block acc;
          load_block(acc, state + m * P, P);
          for (int i = 0; i < MR; ++i) {
            for (int n = 0; n < NV; ++n) acc[i][n] *= all(g.end);
          }
          multiply_pairs(acc, x.tokens + m, 1, Kp, kept, P, used / 2);
          store_block(acc, state + m * P, P);
        }
      }
      if (has_outputs) store_values(values, t, token, count, head, V, c.o);
    }
  }
  restore_range(t, states, powers);
  store_states(c, t, states, c.final, t.n);
}

}  // namespace
