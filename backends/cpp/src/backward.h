// The backward of one key head of one sequence (docs/math.md §5), a run of chunks after another from
// the last: the states inside a run are formed anew from the one that the forward kept.
//
// The gradient of a gate is the sum over all pairs j < t <= i of E_ij D_ij / alpha_t, and that
// quotient is D_it D_(t-1)j: no division, and nothing special where alpha_t is 0.
#pragma once

#include "forward.h"

namespace {

// Working memory of one run of chunks; `stride` is the columns of V, padded.
struct Run {
  float *rows, *products;   // per chunk: keys and queries [2C][Kp], their products [2C][C]
  float *S, *U, *erased;    // per chunk: the state before it, its writes, V - diag(b) K S
  float *d_q, *d_k;         // per chunk: [C][Kp], of scale q and of k, summed over value heads
  float* inverse;           // per chunk: [2][C], 1 / norm of k and q
};

struct Backward {
  float *k_t, *A, *M, *D, *pairs, *E, *P, *N, *U_t, *values, *d_o, *d_r, *S_t, *d_S_t, *d_S;
  Run run;
};

int64_t backward_floats(const GdnSequences& c) {
  const int64_t Kp = padded(c.K), R = c.HV / c.H, Vs = round_up(c.V, P);
  const int64_t chunk = 2 * C * Kp + 2 * C * C + Vs * Kp + 2 * C * Vs + 2 * C * Kp + 2 * C + 8 * 16;
  const int64_t once = C * Kp + 9 * C * C + C * Vs + 3 * C * Vs + 2 * Vs * Kp + R * Vs * Kp;
  return c.chunks_per_state * chunk + once + 24 * 16;
}

// Form the states, writes and errors of a run of chunks of one value head, starting from S.
void run_again(const GdnSequences& c, const Task& t, int64_t first, int64_t last, int64_t head,
               const Backward& w, float* S) {
  const int64_t Kp = padded(c.K), Vs = t.panels * P, size = Vs * Kp;
  for (int64_t token = first, e = 0; token < last; token += C, ++e) {
    const int64_t count = least(C, last - token);
    Keys x;
    x.rows = w.run.rows + e * 2 * C * Kp;
    x.products = w.run.products + e * 2 * C * C;
    Gates g;
    load_gates(c, t, token, count, head, g);
    form_pairs<false>(g, x.products, count, w.A, w.M, nullptr, c.has_erase);
    load_values(c.v, t, token, count, head, c.V, w.values);
    float *U = w.run.U + e * C * Vs, *erased = w.run.erased + e * C * Vs;
    memcpy(w.run.S + e * size, S, size_t(size) * 4);
    for (int64_t p = 0; p < t.panels; ++p) {
      float* state = S + p * Kp * P;
      form_writes(c, x, g, count, Kp, w.A, state, w.values + p * P, Vs, U + p * P, Vs,
                  erased + p * P);
      // The state behind the last chunk is not needed.
      if (token + C >= last) continue;
      float* writes = w.U_t;
      for (int64_t i = 0; i < count; ++i) memcpy(writes + i * P, U + i * Vs + p * P, P * 4);
      advance_state(x, g, count, c.K, Kp, writes, P, state);
    }
  }
}

// d_R of (I + A)^T d_R = d_U, from the last rows up: rows m to m + MR - 1.
GDN_INLINE void solve_back(Block& acc, const float* A, const float* d_r, int64_t ld, int64_t m,
                           int64_t used) {
  multiply_subtract(acc, A + (m + MR) * C + m, 1, C, d_r + (m + MR) * ld, ld, used - m - MR);
  for (int j = MR - 1; j > 0; --j) {
    for (int x = 0; x < j; ++x) {
      const Vec factor = all(A[(m + j) * C + m + x]);
      for (int y = 0; y < NV; ++y) acc[x][y] -= factor * acc[j][y];
    }
  }
}

GDN_INLINE float dot(const float* x, const float* y, int64_t n) {
  Vec total = {};
  for (int64_t i = 0; i < n; i += W) total += load(x + i) * load(y + i);
  return sum(total);
}

// The gradients of the gates of a chunk, from E: see the head of this file.
void gate_gradients(const Gates& g, int64_t count, const float* E_t, const float* D_t,
                    const float* E_start, const float* E_end, float E_all, float* d_alpha) {
  float reached[C];
  memcpy(reached, E_start, sizeof reached);
  float at_end = E_all;
  for (int64_t i = 0; i < count; ++i) {
    d_alpha[i] = dot(D_t + i * C, reached, C) + g.d[i] * at_end;
    for (int64_t j = 0; j < C; j += W) {
      store(reached + j, load(reached + j) * g.alpha[i] + load(E_t + i * C + j));
    }
    at_end = at_end * g.alpha[i] + E_end[i];
  }
}

// The gradients of one chunk of one value head; d_S is that of the state behind it, then before it.
void run_back(const GdnSequences& c, const GdnGradients& to, const Task& t, int64_t token,
              int64_t count, int64_t r, int64_t e, const Backward& w) {
  const int64_t K = c.K, Kp = padded(K), Vs = t.panels * P, size = Vs * Kp;
  const int64_t head = t.head * (c.HV / c.H) + r, used = round_up(count, MR);
  const float *rows = w.run.rows + e * 2 * C * Kp, *products = w.run.products + e * 2 * C * C;
  const float *S = w.run.S + e * size, *U = w.run.U + e * C * Vs;
  const float* erased = w.run.erased + e * C * Vs;
  float *d_q = w.run.d_q + e * C * Kp, *d_k = w.run.d_k + e * C * Kp, *d_S = w.d_S + r * size;
  Gates g;
  load_gates(c, t, token, count, head, g);
  form_pairs<true>(g, products, count, w.A, w.M, w.D, c.has_erase);
  load_values(to.d_o, t, token, count, head, c.V, w.d_o);

  // d_R = T^T d_U,  d_U = M^T d_O + diag(d) K d_S
  Vec ends[C] = {};
  for (int64_t p = 0; p < t.panels; ++p) {
    float* d_r = w.d_r + p * P;
    for (int64_t m = used - MR; m >= 0; m -= MR) {
      Block acc;
      clear(acc);
      multiply_add(acc, rows + m * Kp, Kp, 1, d_S + p * Kp * P, P, K);
      for (int i = 0; i < MR; ++i) {
        for (int n = 0; n < NV; ++n) {
          ends[m + i] += acc[i][n] * load(U + (m + i) * Vs + p * P + n * W);
        }
      }
      scale_rows(acc, g.d + m);
      multiply_add(acc, w.M + m * C + m, 1, C, w.d_o + m * Vs + p * P, Vs, used - m);
      if (c.has_erase) solve_back(acc, w.A, d_r, Vs, m, used);
      store_block(acc, d_r + m * Vs, Vs);
    }
  }
  // d_V = diag(beta) d_R
  for (int64_t i = 0; i < used; ++i) {
    for (int64_t j = 0; j < Vs; j += W) {
      store(w.values + i * Vs + j, load(w.d_r + i * Vs + j) * g.beta[i]);
    }
  }
  store_values(w.values, t, token, count, head, c.V, to.d_v);

  // d_O U^T and d_R U^T: rows 0 to C - 1 and C to 2C - 1 of `pairs`
  transpose(U, Vs, w.U_t, C, used, Vs);
  for (int64_t j = 0; used < C && j < Vs; ++j) {
    memset(w.U_t + j * C + used, 0, size_t(C - used) * 4);
  }
  for (int half = 0; half < (c.has_erase ? 2 : 1); ++half) {
    const float* left = half ? w.d_r : w.d_o;
    for (int64_t m = 0; m < used; m += MR) {
      for (int64_t j = 0; j < m + MR; j += P) {
        Block acc;
        clear(acc);
        multiply_add(acc, left + m * Vs, Vs, 1, w.U_t + j, C, Vs);
        store_block(acc, w.pairs + (half * C + m) * C + j, C);
      }
    }
  }
  // P = d_P . D,  N = X + X^T with X = diag(beta) d_A . D,  E^T = d_P . Q K^T + diag(beta) d_A . K K^T
  float d_beta[C] = {}, E_start[C] = {}, E_end[C] = {}, d_alpha[C];
  memset(w.E, 0, C * C * 4);
  memset(w.P, 0, C * C * 4);
  memset(w.N, 0, C * C * 4);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      const float d_p = w.pairs[i * C + j], decay = w.D[i * C + j];
      w.P[i * C + j] = d_p * decay;
      if (j == i) break;
      float change = d_p * products[(C + i) * C + j];
      if (c.has_erase) {
        const float d_a = -w.pairs[(C + i) * C + j], key = products[i * C + j];
        change += g.beta[i] * d_a * key;
        d_beta[i] += d_a * key * decay;
        w.N[i * C + j] = w.N[j * C + i] = g.beta[i] * d_a * decay;
      }
      w.E[j * C + i] = change;
    }
    d_beta[i] += dot(w.d_r + i * Vs, erased + i * Vs, Vs);
    E_end[i] = sum(ends[i]);
  }

  // d_Q += diag(b) d_O S^T + P K,  d_K += P^T Q + N K + diag(d) U d_S^T - diag(beta b) d_R S^T
  Vec all_states = {};
  for (int64_t p = 0; p < t.panels; ++p) {
    transpose(S + p * Kp * P, P, w.S_t + p * P * Kp, Kp, Kp, P);
    transpose(d_S + p * Kp * P, P, w.d_S_t + p * P * Kp, Kp, Kp, P);
    for (int64_t i = 0; i < Kp * P; i += W) {
      all_states += load(S + p * Kp * P + i) * load(d_S + p * Kp * P + i);
    }
  }
  for (int64_t j = 0; j < Kp; j += P) {
    for (int64_t m = 0; m < used; m += MR) {
      Block acc;
      clear(acc);
      multiply_add(acc, w.d_o + m * Vs, Vs, 1, w.S_t + j, Kp, Vs);
      for (int i = 0; i < MR; ++i) {
        Vec total = {};
        for (int n = 0; n < NV; ++n) {
          total += acc[i][n] * load(rows + (C + m + i) * Kp + j + n * W);
          acc[i][n] = acc[i][n] * all(g.b[m + i]) + load(d_q + (m + i) * Kp + j + n * W);
        }
        E_start[m + i] += sum(total);
      }
      multiply_add(acc, w.P + m * C, C, 1, rows + j, Kp, m + MR);
      store_block(acc, d_q + m * Kp + j, Kp);
    }
    for (int64_t m = 0; m < used; m += MR) {
      Block acc, erase;
      clear(acc);
      multiply_add(acc, U + m * Vs, Vs, 1, w.d_S_t + j, Kp, Vs);
      scale_rows(acc, g.d + m);
      if (c.has_erase) {
        clear(erase);
        multiply_add(erase, w.d_r + m * Vs, Vs, 1, w.S_t + j, Kp, Vs);
        for (int i = 0; i < MR; ++i) {
          Vec total = {};
          const Vec beta = all(g.beta[m + i]);
          for (int n = 0; n < NV; ++n) {
            const Vec part = erase[i][n] * beta;
            total += part * load(rows + (m + i) * Kp + j + n * W);
            acc[i][n] -= part * all(g.b[m + i]);
          }
          E_start[m + i] -= sum(total);
        }
        multiply_add(acc, w.N + m * C, C, 1, rows + j, Kp, used);
      }
      multiply_add(acc, w.P + m * C + m, 1, C, rows + (C + m) * Kp + j, Kp, used - m);
      for (int i = 0; i < MR; ++i) {
        for (int n = 0; n < NV; ++n) {
          float* at = d_k + (m + i) * Kp + j + n * W;
          store(at, load(at) + acc[i][n]);
        }
      }
    }
  }
  if (to.d_decay.data) {
    for (int64_t i = 0; i < C; ++i) {
      for (int64_t j = 0; j < C; ++j) w.pairs[j * C + i] = i < used && j <= i ? w.D[i * C + j] : 0;
    }
    gate_gradients(g, count, w.E, w.pairs, E_start, E_end, sum(all_states), d_alpha);
  }
  for (int64_t i = 0; i < count; ++i) {
    if (to.d_decay.data) {
      const float factor = c.decay_is_log ? g.alpha[i] : 1.0f;
      static_cast<float*>(to.d_decay.data)[at(to.d_decay, t.row, token + i, head)] =
          d_alpha[i] * factor;
    }
    if (to.d_beta.data) {
      static_cast<float*>(to.d_beta.data)[at(to.d_beta, t.row, token + i, head)] = d_beta[i];
    }
  }

  // d_S = (diag(b) Q)^T d_O + end d_S - (diag(beta b) K)^T d_R
  for (int64_t i = 0; i < count; ++i) {
    multiply(w.d_o + i * Vs, g.b[i], Vs);
    multiply(w.d_r + i * Vs, c.has_erase ? -g.beta[i] * g.b[i] : 0.0f, Vs);
  }
  for (int64_t p = 0; p < t.panels; ++p) {
    for (int64_t m = 0; m < K; m += MR) {
      float* state = d_S + p * Kp * P + m * P;
      Block acc;
      load_block(acc, state, P);
      for (int i = 0; i < MR; ++i) {
        for (int n = 0; n < NV; ++n) acc[i][n] *= all(g.end);
      }
      multiply_add(acc, rows + C * Kp + m, 1, Kp, w.d_o + p * P, Vs, count);
      if (c.has_erase) multiply_add(acc, rows + m, 1, Kp, w.d_r + p * P, Vs, count);
      store_block(acc, state, P);
    }
  }
}

// Write the gradients of q or k of a chunk, through the normalisation if there is one.
void store_keys(const GdnSequences& c, const Task& t, int64_t token, int64_t count, float* d,
                const float* inverse, float factor, const GdnArray& given, const GdnArray& to) {
  const int64_t Kp = padded(c.K);
  float x[1024];
  for (int64_t i = 0; i < count; ++i, d += Kp) {
    multiply(d, factor, Kp);
    if (c.qk_l2norm) {
      // r (d - y (y . d)) with y = r x
      float projected = 0.0f;
      const int64_t first = at(given, t.row, token + i, t.head);
      for (int64_t j = 0; j < c.K; j += 1024) {
        const int64_t n = least(1024, c.K - j);
        widen(given.data, given.type, first + j, x, n);
        for (int64_t l = 0; l < n; ++l) projected += x[l] * d[j + l];
      }
      projected *= inverse[i] * inverse[i];
      for (int64_t j = 0; j < c.K; j += 1024) {
        const int64_t n = least(1024, c.K - j);
        widen(given.data, given.type, first + j, x, n);
        for (int64_t l = 0; l < n; ++l) d[j + l] = inverse[i] * (d[j + l] - x[l] * projected);
      }
    }
    narrow(d, to.data, to.type, at(to, t.row, token + i, t.head), c.K);
  }
}

void run_backward(const GdnSequences& c, const GdnGradients& to, const Task& t, float* memory) {
  const int64_t K = c.K, V = c.V, Kp = padded(K), R = c.HV / c.H, Vs = t.panels * P;
  const int64_t size = Vs * Kp, chunks = c.chunks_per_state, span = C * chunks;
  Arena arena{memory};
  Backward w;
  w.k_t = arena.take(C * Kp);
  float** const pairs[] = {&w.A, &w.M, &w.D, &w.E, &w.P, &w.N};
  for (float** one : pairs) *one = arena.take(C * C);
  w.pairs = arena.take(2 * C * C);
  float** const values[] = {&w.U_t, &w.values, &w.d_o, &w.d_r};
  for (float** one : values) *one = arena.take(C * Vs);
  w.S_t = arena.take(size);
  w.d_S_t = arena.take(size);
  w.d_S = arena.take(R * size);
  w.run.rows = arena.take(chunks * 2 * C * Kp);
  w.run.products = arena.take(chunks * 2 * C * C);
  w.run.S = arena.take(chunks * size);
  w.run.U = arena.take(chunks * C * Vs);
  w.run.erased = arena.take(chunks * C * Vs);
  w.run.d_q = arena.take(chunks * C * Kp);
  w.run.d_k = arena.take(chunks * C * Kp);
  w.run.inverse = arena.take(chunks * 2 * C);
  for (int64_t r = 0; r < R; ++r) {
    const int64_t head = t.n * c.HV + t.head * R + r;
    load_state(to.d_final + head * K * V, K, V, Kp, t, w.d_S + r * size);
  }
  const int64_t slots = c.T / span, slot = t.row * slots + t.first / span;
  const int64_t runs = (t.last - t.first + span - 1) / span;
  for (int64_t run = runs; run-- > 0;) {
    const int64_t first = t.first + run * span, last = least(first + span, t.last);
    for (int64_t token = first, e = 0; token < last; token += C, ++e) {
      Keys x;
      x.rows = w.run.rows + e * 2 * C * Kp;
      x.products = w.run.products + e * 2 * C * C;
      x.k_t = w.k_t;
      const int64_t count = least(C, last - token);
      load_keys(c, t, token, count, Kp, x);
      multiply_keys(count, K, Kp, x, c.has_erase);
      memcpy(w.run.inverse + e * 2 * C, x.inverse_k, C * 4);
      memcpy(w.run.inverse + e * 2 * C + C, x.inverse_q, C * 4);
      memset(w.run.d_q + e * C * Kp, 0, size_t(C * Kp) * 4);
      memset(w.run.d_k + e * C * Kp, 0, size_t(C * Kp) * 4);
    }
    for (int64_t r = 0; r < R; ++r) {
      const int64_t head = t.head * R + r;
      const float* start = c.initial ? c.initial + (t.n * c.HV + head) * K * V : nullptr;
      if (run) start = c.states + ((slot + run - 1) * c.HV + head) * K * V;
      load_state(start, K, V, Kp, t, w.S_t);
      run_again(c, t, first, last, head, w, w.S_t);
      for (int64_t e = (last - first - 1) / C; e >= 0; --e) {
        const int64_t token = first + e * C;
        run_back(c, to, t, token, least(C, last - token), r, e, w);
      }
    }
    for (int64_t token = first, e = 0; token < last; token += C, ++e) {
      const int64_t count = least(C, last - token);
      const float* inverse = w.run.inverse + e * 2 * C;
      store_keys(c, t, token, count, w.run.d_k + e * C * Kp, inverse, 1.0f, c.k, to.d_k);
      store_keys(c, t, token, count, w.run.d_q + e * C * Kp, inverse + C, c.scale, c.q, to.d_q);
    }
  }
  for (int64_t r = 0; to.d_initial && r < R; ++r) {
    float* state = to.d_initial + (t.n * c.HV + t.head * R + r) * K * V;
    store_state(w.d_S + r * size, K, V, Kp, t, state);
  }
}

}  // namespace
