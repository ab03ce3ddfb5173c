// The forward of one key head of one sequence (docs/math.md §3): the state never leaves the caches.
#pragma once

#include "chunk.h"

namespace {

// Floats of working memory, taken one after another, each on a cache line of its own.
struct Arena {
  float* next;
  float* take(int64_t floats) {
    float* start = next;
    next += round_up(floats, 16);
    return start;
  }
};

// Rows of K as they are kept: products write whole register blocks and panels of them.
GDN_INLINE int64_t padded(int64_t K) { return round_up(K, P > 16 ? P : 16); }

int64_t forward_floats(const GdnSequences& c, int64_t panels) {
  const int64_t Kp = padded(c.K), R = c.HV / c.H;
  return (2 * C + C) * Kp + 4 * C * C + C * panels * P + C * P + R * panels * Kp * P + 8 * 16;
}

// state (K, V) of a head <-> panels [Kp][P] of its columns.
void load_state(const float* state, int64_t K, int64_t V, int64_t Kp, const Task& t, float* S) {
  for (int64_t p = 0; p < t.panels; ++p, S += Kp * P) {
    const int64_t v = (t.panel + p) * P, width = least(P, V - v);
    if (!state || width < P) memset(S, 0, size_t(Kp * P) * 4);
    if (!state) continue;
    for (int64_t i = 0; i < K; ++i) memcpy(S + i * P, state + i * V + v, size_t(width) * 4);
    memset(S + K * P, 0, size_t((Kp - K) * P) * 4);
  }
}

void store_state(const float* S, int64_t K, int64_t V, int64_t Kp, const Task& t, float* state) {
  for (int64_t p = 0; p < t.panels; ++p, S += Kp * P) {
    const int64_t v = (t.panel + p) * P, width = least(P, V - v);
    for (int64_t i = 0; i < K; ++i) memcpy(state + i * V + v, S + i * P, size_t(width) * 4);
  }
}

// The states of the value heads of a key head: `size` floats each, in panels.
struct States {
  float* S;
  int64_t Kp, R, size;
};

void load_states(const GdnSequences& c, const Task& t, const States& x) {
  for (int64_t r = 0; r < x.R; ++r) {
    const int64_t head = t.n * c.HV + t.head * x.R + r;
    const float* state = c.initial ? c.initial + head * c.K * c.V : nullptr;
    load_state(state, c.K, c.V, x.Kp, t, x.S + r * x.size);
  }
}

// Write the states into row `row` of an array (rows, HV, K, V).
void store_states(const GdnSequences& c, const Task& t, const States& x, float* to, int64_t row) {
  for (int64_t r = 0; r < x.R; ++r) {
    float* state = to + (row * c.HV + t.head * x.R + r) * c.K * c.V;
    store_state(x.S + r * x.size, c.K, c.V, x.Kp, t, state);
  }
}

// Keep the states before a chunk, if the backward starts a run of chunks there.
void keep_states(const GdnSequences& c, const Task& t, const States& x, int64_t chunk) {
  if (!c.states || chunk == 0 || chunk % c.chunks_per_state) return;
  const int64_t span = C * c.chunks_per_state;
  const int64_t first = t.row * (c.T / span) + t.first / span;
  store_states(c, t, x, c.states, first + chunk / c.chunks_per_state - 1);
}

// Columns of v or of a gradient like it, [C][panels P]; rows behind the last token are zeros.
void load_values(const GdnArray& x, const Task& t, int64_t token, int64_t count, int64_t head,
                 int64_t V, float* to) {
  const int64_t v = t.panel * P, width = least(t.panels * P, V - v), stride = t.panels * P;
  for (int64_t i = 0; i < C; ++i, to += stride) {
    const int64_t used = i < count ? width : 0;
    if (used) widen(x.data, x.type, at(x, t.row, token + i, head) + v, to, used);
    if (used < stride) memset(to + used, 0, size_t(stride - used) * 4);
  }
}

void store_values(const float* from, const Task& t, int64_t token, int64_t count, int64_t head,
                  int64_t V, const GdnArray& x) {
  const int64_t v = t.panel * P, width = least(t.panels * P, V - v);
  for (int64_t i = 0; i < count; ++i) {
    narrow(from + i * t.panels * P, x.data, x.type, at(x, t.row, token + i, head) + v, width);
  }
}

// A row block of (I + A) U = right side, whose earlier rows of U are there.
GDN_INLINE void solve_block(Block& acc, const float* A, const float* U, int64_t ldu, int64_t m) {
  multiply_subtract(acc, A + m * C, C, 1, U, ldu, m);
  for (int j = 0; j < MR; ++j) {
    for (int x = j + 1; x < MR; ++x) {
      const Vec factor = all(A[(m + x) * C + m + j]);
      for (int y = 0; y < NV; ++y) acc[x][y] -= factor * acc[j][y];
    }
  }
}

// U of one panel (§3): the writes of a chunk. With `erased` V - diag(b) K S is kept there.
GDN_INLINE void form_writes(const GdnSequences& c, const Keys& x, const Gates& g, int64_t count,
                            int64_t Kp, const float* A, const float* S, const float* values,
                            int64_t ldv, float* U, int64_t ldu, float* erased) {
  for (int64_t m = 0; m < round_up(count, MR); m += MR) {
    Block acc;
    clear(acc);
    if (c.has_erase) multiply_add(acc, x.rows + m * Kp, Kp, 1, S, P, c.K);
    for (int i = 0; i < MR; ++i) {
      for (int n = 0; n < NV; ++n) {
        const Vec left = load(values + (m + i) * ldv + n * W) - acc[i][n] * all(g.b[m + i]);
        if (erased) store(erased + (m + i) * ldv + n * W, left);
        acc[i][n] = left * all(g.beta[m + i]);
      }
    }
    if (c.has_erase) solve_block(acc, A, U, ldu, m);
    store_block(acc, U + m * ldu, ldu);
  }
}

// S = end S + (diag(d) K)^T U of one panel; U is scaled by d.
GDN_INLINE void advance_state(const Keys& x, const Gates& g, int64_t count, int64_t K, int64_t Kp,
                              float* U, int64_t ldu, float* S) {
  for (int64_t i = 0; i < count; ++i) {
    for (int n = 0; n < NV; ++n) {
      float* u = U + i * ldu + n * W;
      store(u, load(u) * all(g.d[i]));
    }
  }
  for (int64_t m = 0; m < K; m += MR) {
    Block acc;
    for (int i = 0; i < MR; ++i) {
      for (int n = 0; n < NV; ++n) acc[i][n] = load(S + (m + i) * P + n * W) * all(g.end);
    }
    multiply_add(acc, x.rows + m, 1, Kp, U, ldu, count);
    store_block(acc, S + m * P, P);
  }
}

void run_forward(const GdnSequences& c, const Task& t, float* memory) {
  const int64_t K = c.K, V = c.V, Kp = padded(K), R = c.HV / c.H, ldv = t.panels * P;
  const int64_t size = t.panels * Kp * P;
  Arena arena{memory};
  Keys x;
  x.rows = arena.take(2 * C * Kp);
  x.k_t = arena.take(C * Kp);
  x.products = arena.take(2 * C * C);
  float *A = arena.take(C * C), *M = arena.take(C * C), *U = arena.take(C * P);
  float *values = arena.take(C * ldv), *S = arena.take(R * size);
  const States states{S, Kp, R, size};
  load_states(c, t, states);
  int64_t chunk = 0;
  for (int64_t token = t.first; token < t.last; token += C, ++chunk) {
    const int64_t count = least(C, t.last - token), used = round_up(count, MR);
    keep_states(c, t, states, chunk);
    load_keys(c, t, token, count, Kp, x);
    multiply_keys(count, K, Kp, x, c.has_erase);
    for (int64_t r = 0; r < R; ++r) {
      const int64_t head = t.head * R + r;
      Gates g;
      load_gates(c, t, token, count, head, g);
      form_pairs<false>(g, x.products, count, A, M, nullptr, c.has_erase);
      load_values(c.v, t, token, count, head, V, values);
      for (int64_t p = 0; p < t.panels; ++p) {
        float *state = S + r * size + p * Kp * P, *columns = values + p * P;
        form_writes(c, x, g, count, Kp, A, state, columns, ldv, U, P, nullptr);
        for (int64_t m = 0; m < used; m += MR) {
          Block acc;
          clear(acc);
          multiply_add(acc, x.rows + (C + m) * Kp, Kp, 1, state, P, K);
          scale_rows(acc, g.b + m);
          multiply_add(acc, M + m * C, C, 1, U, P, m + MR);
          store_block(acc, columns + m * ldv, ldv);
        }
        advance_state(x, g, count, K, Kp, U, P, state);
      }
      store_values(values, t, token, count, head, V, c.o);
    }
  }
  store_states(c, t, states, c.final, t.n);
}

}  // namespace
