// The backward of one chunk of one value head (docs/math.md §5), and the memory of a run of chunks.
//
// The gradient of a gate is the sum over all pairs j < t <= i of E_ij D_ij / alpha_t, and that
// quotient is D_it D_(t-1)j: no division, and nothing special where alpha_t is 0.
#pragma once

#include "forward.h"

namespace {

// Where one part of a key head leaves what is summed over parts; nothing where it is alone.
struct Sums {
  float *d_k, *d_q;          // (B, T, H, K): of k and scale q
  float *d_decay, *d_beta;   // (B, T, HV), or (B, T, HV, K) of a decay of channels
};

// Decays of a value head of a token.
GDN_INLINE int64_t decay_width(const GdnSequences& c) { return c.decay_of_channels ? c.K : 1; }

int64_t sum_floats(const GdnSequences& c, int64_t parts) {
  const int64_t rows = c.starts ? 1 : c.N;
  return parts * rows * c.T * (2 * c.H * c.K + c.HV * (decay_width(c) + 1));
}

Sums sums_of(const GdnSequences& c, float* sums, int64_t parts, int64_t part) {
  const int64_t tokens = (c.starts ? 1 : c.N) * c.T, keys = tokens * c.H * c.K;
  const int64_t decays = tokens * c.HV * decay_width(c);
  float* first = sums + sum_floats(c, parts) / parts * part;
  return {first, first + keys, first + 2 * keys, first + 2 * keys + decays};
}

// What the value heads of a key head share of a run of chunks, and what one of them leaves there.
struct Run {
  float *k_t, *q_t, *products;  // per chunk: as in Keys; rows [C][Kp] with a decay of channels
  float* inverse;               // per chunk: [2][C], 1 / norm of k and q
  float *d_k, *d_q;             // per chunk: of k and scale q, laid out like them, of all value heads
  float *S, *U, *erased;        // per chunk: the state before it, its writes, V - diag(b) K S
};

// Working memory; Vs are the columns of V, padded.
struct Backward {
  Run run;
  float* rows;                                       // [2C][Kp]
  float *A, *M, *D, *P, *P_t, *X, *N, *E;            // [C][C]
  float* pairs;                                      // [2C][C]
  float *values, *d_o, *d_r;                         // [C][Vs]
  float *U_t, *d_o_t, *d_r_t;                        // [Vs][C]
  float* d_S;                                        // per value head: a state
  float* ends;                                       // per value head: see faint_ends
  DecayedKeys decayed;                               // of a decay of channels, and what follows
  float *d_t;                                        // [Kp][C]
  float *d_read_k, *d_read_q, *d_kept, *d_alpha;     // [C][Kp]
  float* d_erased;                                   // [C][Kp], where erase and write are apart
  float *d_end, *d_starts;                           // [Kp], [2][Kp]

  // Per value head, the token up to which subnormal numbers may count.
  int64_t* faint_ends() const { return reinterpret_cast<int64_t*>(ends); }
};

// Take the working memory from an arena; return how many floats that is.
int64_t take_backward(const GdnSequences& c, float* memory, Backward& w) {
  const int64_t Kp = padded(c.K), R = c.HV / c.H, Vs = round_up(c.V, P), e = c.chunks_per_state;
  Arena arena{memory};
  const auto take = [&](std::initializer_list<float**> places, int64_t floats) {
    for (float** place : places) *place = arena.take(floats);
  };
  take({&w.A, &w.M, &w.D, &w.P, &w.P_t, &w.X, &w.N, &w.E}, C * C);
  take({&w.pairs}, 2 * C * C);
  take({&w.values, &w.d_o, &w.d_r, &w.U_t, &w.d_o_t, &w.d_r_t}, C * Vs);
  take({&w.rows}, 2 * C * Kp);
  take({&w.d_S}, R * Vs * Kp);
  take({&w.ends}, R * 2);
  take({&w.run.k_t, &w.run.q_t, &w.run.d_k, &w.run.d_q}, e * C * Kp);
  take({&w.run.products}, e * 2 * C * C);
  take({&w.run.inverse}, e * 2 * C);
  take({&w.run.U, &w.run.erased}, e * C * Vs);
  take({&w.run.S}, e * Vs * Kp);
  if (!has_channels(c)) return arena.used;
  take_decayed(c, arena, Kp, w.decayed);
  take({&w.d_t, &w.d_read_k, &w.d_read_q, &w.d_kept, &w.d_alpha}, C * Kp);
  take({&w.d_end}, Kp);
  take({&w.d_starts}, 2 * Kp);
  if (c.is_apart) take({&w.d_erased}, C * Kp);
  return arena.used;
}

int64_t backward_floats(const GdnSequences& c) {
  Backward w;
  return take_backward(c, nullptr, w);
}

// One chunk of one value head, with all that a run has of it.
struct Chunk {
  const GdnSequences& c;
  const GdnGradients& to;
  const Task& t;
  const Sums& sums;
  const Backward& w;
  int64_t token, count, used, reach, head, Kp, Vs, faint_end;
  Keys keys;
  float *S, *U, *erased, *d_k, *d_q, *d_S;
  Gates g;
  DecayedKeys decayed;  // of a decay of channels: its keys alone are there at first
};

// Chunk e of the run that begins at token `first`, of value head r of the task.
Chunk chunk_of(const GdnSequences& c, const GdnGradients& to, const Task& t, const Sums& sums,
               const Backward& w, int64_t first, int64_t last, int64_t e, int64_t r) {
  const int64_t Kp = padded(c.K), Vs = t.panels * P, token = first + e * C;
  const int64_t count = least(C, last - token), head = t.head * (c.HV / c.H) + t.value + r;
  Chunk x{c, to, t, sums, w, token, count, round_up(count, MR), reach_of(count), head, Kp, Vs,
          w.faint_ends()[r],
          {}, {}, {}, {}, {}, {}, {}, {}, w.decayed};
  x.keys.k_t = w.run.k_t + e * C * Kp;
  x.keys.q_t = w.run.q_t + e * C * Kp;
  x.keys.products = w.run.products + e * 2 * C * C;
  x.S = w.run.S + e * Vs * Kp;
  x.U = w.run.U + e * C * Vs;
  x.erased = w.run.erased + e * C * Vs;
  x.d_k = w.run.d_k + e * C * Kp;
  x.d_q = w.run.d_q + e * C * Kp;
  x.d_S = w.d_S + r * Vs * Kp;
  if (has_channels(c)) {
    x.decayed.k = x.keys.k_t;
    x.decayed.q = x.keys.q_t;
  } else {
    load_gates(c, t, token, count, head, x.g);
  }
  return x;
}

// Form the writes and errors of a chunk, and the state behind it where that is another's.
void run_again(const Chunk& x, float* next) {
  const GdnSequences& c = x.c;
  const Ahead ahead{c, x.t, c.v, x.token + C, x.head, x.t.last, 0};
  const bool may_flush = sizes_of(c, x.t, x.token, x.count, x.head, x.g).may_flush;
  with_flushing(may_flush, [&] {
    form_pairs<false>(x.g, x.keys.products, x.count, x.w.A, x.w.M, nullptr, c.has_erase);
  });
  Columns from{x.w.values, x.Vs, false};
  if (lies_in_tiles(c.v, c.V, x.count)) {
    from = columns_of(c.v, x.t, x.token, x.head);
  } else {
    load_values(c.v, x.t, x.token, x.count, x.head, c.V, x.w.values);
  }
  // Tokens that are none write nothing.
  memset(x.U + x.used * x.Vs, 0, size_t((x.reach - x.used) * x.Vs) * 4);
  for (int64_t p = 0; p < x.t.panels; ++p) {
    const float* S = x.S + p * x.Kp * P;
    const Flushed flushed(may_flush && is_ordinary(S, x.Kp * P));
    form_writes(c, x.keys, x.g, x.count, x.w.A, S, from.data + p * P, from.ld, x.U + p * P, x.Vs,
                x.erased + p * P, [&](int64_t m) { return ahead.tile(p, m); });
    if (!next) continue;
    // X is free until the gradients are formed.
    static_assert(P <= C, "a panel of writes fits into C x C");
    advance_state(x.keys, x.g, x.count, c.K, x.U + p * P, x.Vs, x.w.X, S, next + p * x.Kp * P);
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

// Turn the gradients of what a chunk writes, rows of Vs, into those of v, and write those of write.
void split_writes(const Chunk& x, float* d) {
  const GdnSequences& c = x.c;
  const GdnArray& to = x.to.d_write;
  const int64_t first = x.t.panel * P, width = least(x.Vs, c.V - first);
  for (int64_t i = 0; i < x.count; ++i, d += x.Vs) {
    const int64_t token = x.token + i;
    float total = 0.0f, some[256];
    float* data = static_cast<float*>(to.data);
    if (data) data += at(to, x.t.row, token, x.head) + (c.write_of_channels ? first : 0);
    for (int64_t j = 0; data && j < width; j += 256) {
      const int64_t n = least(256, width - j);
      widen(c.v.data, c.v.type, at(c.v, x.t.row, token, x.head) + first + j, some, n);
      for (int64_t l = 0; l < n; ++l) {
        some[l] *= d[j + l];
        total += some[l];
      }
      if (c.write_of_channels) memcpy(data + j, some, size_t(n) * 4);
    }
    if (data && !c.write_of_channels) *data = total;
    scale_by(c.write, at(c.write, x.t.row, token, x.head), c.write_of_channels, first, width, d);
  }
}

// d_R = T^T d_U with d_U = M^T d_O + diag(d) K d_S. If all gradients are asked for, d_V = diag(beta)
// d_R is written, and `E_end` [C] receives the products of the rows of K d_S and U.
template <bool asks_all>
GDN_INLINE void solve_gradients(const Chunk& x, float* E_end) {
  const Backward& w = x.w;
  // The chunk before this one is next, and the same chunk of the run before.
  const int64_t span = C * x.c.chunks_per_state, r = x.head % (x.c.HV / x.c.H);
  const Ahead ahead{x.c, x.t, x.to.d_o, x.token - C, x.head, x.token - span, r};
  const GdnArray& d_v = x.to.d_v;
  const bool is_direct = asks_all && !x.c.is_apart && lies_in_tiles(d_v, x.c.V, x.count);
  Columns to = is_direct ? columns_of(d_v, x.t, x.token, x.head) : Columns{w.values, x.Vs, false};
  to.passes_caches = is_direct && passes_caches(x.c, d_v);
  Vec ends[C] = {};
  for (int64_t p = 0; p < x.t.panels; ++p) {
    float* d_r = w.d_r + p * P;
    for (int64_t m = x.used - MR; m >= 0; m -= MR) {
      Block acc;
      multiply_fetching(acc, x.keys.k_t + m, x.d_S + p * x.Kp * P, x.c.K, ahead.tile(p, m));
      for (int i = 0; asks_all && i < MR; ++i) {
        for (int n = 0; n < NV; ++n) {
          ends[m + i] += acc[i][n] * load(x.U + (m + i) * x.Vs + p * P + n * W);
        }
      }
      scale_rows(acc, x.g.d + m);
      multiply_add(acc, w.M + m * C + m, 1, C, w.d_o + m * x.Vs + p * P, x.Vs, x.used - m);
      if (x.c.has_erase) solve_back(acc, w.A, d_r, x.Vs, m, x.used);
      store_block(acc, d_r + m * x.Vs, x.Vs);
      if (!asks_all) continue;
      scale_rows(acc, x.g.beta + m);
      to.store(acc, m, p);
    }
  }
  if (asks_all && x.c.is_apart) split_writes(x, w.values);
  if (asks_all && !is_direct) store_values(w.values, x.t, x.token, x.count, x.head, x.c.V, d_v);
  memset(w.d_r + x.used * x.Vs, 0, size_t((x.reach - x.used) * x.Vs) * 4);
  for (int64_t i = 0; asks_all && i < x.used; ++i) E_end[i] = sum(ends[i]);
}

// d_O U^T and d_R U^T: rows 0 to C - 1 and C to 2C - 1 of `pairs`, entries of later tokens anything.
void multiply_writes(const Chunk& x) {
  const Backward& w = x.w;
  transpose(x.U, x.Vs, w.U_t, C, x.reach, x.Vs);
  transpose(w.d_o, x.Vs, w.d_o_t, C, x.reach, x.Vs);
  transpose(w.d_r, x.Vs, w.d_r_t, C, x.reach, x.Vs);
  for (int half = 0; half < (x.c.has_erase ? 2 : 1); ++half) {
    const float* left = half ? w.d_r_t : w.d_o_t;
    for (int64_t m = 0; m < x.used; m += MR) {
      for (int64_t j = 0; j < m + MR; j += P) {
        Block acc;
        clear(acc);
        multiply_add(acc, left + m, 1, C, w.U_t + j, C, x.Vs);
        store_block(acc, w.pairs + (half * C + m) * C + j, C);
      }
    }
  }
}

// P = d_P . D,  X = diag(beta) d_A . D,  N = X + X^T,  E = d_P . Q K^T + diag(beta) d_A . K K^T below
// the diagonal; P^T too, and E^T and D^T into `pairs`. d_beta [C] receives the gradients of beta.
void form_pair_gradients(const Chunk& x, float* d_beta) {
  const Backward& w = x.w;
  const float *d_p = w.pairs, *d_a = w.pairs + C * C, *products = x.keys.products;
  for (int64_t i = 0; i < x.reach; ++i) {
    Vec total = {};
    const Vec beta = all(x.g.beta[i]);
    for (int64_t j = 0; j < x.reach; j += W) {
      const int64_t at = i * C + j;
      const Bits before = lanes_below(i - j), upto = lanes_below(i < x.count ? i + 1 - j : 0);
      const Vec decay = load(w.D + at), d_pair = load(d_p + at);
      Vec change = d_pair * load(products + C * C + at);
      if (x.c.has_erase) {
        const Vec d_key = -load(d_a + at) * load(products + at);
        change += beta * d_key;
        total += keep(before & upto, d_key * decay);
        store(w.X + at, keep(before & upto, beta * -load(d_a + at) * decay));
      }
      store(w.P + at, keep(upto, d_pair * decay));
      store(w.E + at, keep(before & upto, change));
    }
    if (i >= x.count) continue;
    for (int64_t j = 0; j < x.Vs; j += W) {
      total += load(w.d_r + i * x.Vs + j) * load(x.erased + i * x.Vs + j);
    }
    d_beta[i] = sum(total);
  }
  memset(w.D + x.used * C, 0, size_t((x.reach - x.used) * C) * 4);
  transpose(w.P, C, w.P_t, C, x.reach, x.reach);
  transpose(w.E, C, w.pairs, C, x.reach, x.reach);
  transpose(w.D, C, w.pairs + C * C, C, x.reach, x.reach);
  if (!x.c.has_erase) return;
  transpose(w.X, C, w.N, C, x.reach, x.reach);
  for (int64_t i = 0; i < x.reach; ++i) {
    for (int64_t j = i * C; j < i * C + x.reach; j += W) {
      store(w.N + j, load(w.N + j) + load(w.X + j));
    }
  }
}

// acc += S B of all panels: rows m to m + MR - 1 of a state, columns of tokens of B [Vs][C].
GDN_INLINE void multiply_state(Block& acc, const Chunk& x, const float* S, int64_t m,
                               const float* B) {
  for (int64_t p = 0; p < x.t.panels; ++p) {
    multiply_add(acc, S + p * x.Kp * P + m * P, P, 1, B + p * P * C, C, P);
  }
}

// d_Q += diag(b) d_O S^T + P K,  d_K += P^T Q + N K + diag(d) U d_S^T - diag(beta b) d_R S^T, all of
// them transposed. `E_start` [C] receives the products of rows of d_O S^T and Q, less those of
// diag(beta) d_R S^T and K.
void add_key_gradients(const Chunk& x, float* E_start) {
  const Backward& w = x.w;
  const Gates& g = x.g;
  for (int64_t j = 0; j < x.count; j += P) {
    Vec start[NV] = {};
    for (int64_t m = 0; m < x.c.K; m += MR) {
      Block acc, erase;
      clear(acc);
      multiply_state(acc, x, x.S, m, w.d_o_t + j);
      for (int i = 0; i < MR; ++i) {
        for (int n = 0; n < NV; ++n) {
          const int64_t at = (m + i) * C + j + n * W;
          start[n] += acc[i][n] * load(x.keys.q_t + at);
          acc[i][n] = acc[i][n] * load(g.b + j + n * W) + load(x.d_q + at);
        }
      }
      multiply_add(acc, x.keys.k_t + m * C, C, 1, w.P_t + j, C, least(j + P, x.reach));
      store_block(acc, x.d_q + m * C + j, C);

      clear(acc);
      multiply_state(acc, x, x.d_S, m, w.U_t + j);
      clear(erase);
      if (x.c.has_erase) multiply_state(erase, x, x.S, m, w.d_r_t + j);
      for (int i = 0; i < MR; ++i) {
        for (int n = 0; n < NV; ++n) {
          const int64_t at = (m + i) * C + j + n * W;
          acc[i][n] = acc[i][n] * load(g.d + j + n * W) + load(x.d_k + at);
          if (!x.c.has_erase) continue;
          const Vec part = erase[i][n] * load(g.beta + j + n * W);
          start[n] -= part * load(x.keys.k_t + at);
          acc[i][n] -= part * load(g.b + j + n * W);
        }
      }
      if (x.c.has_erase) multiply_add(acc, x.keys.k_t + m * C, C, 1, w.N + j, C, x.reach);
      multiply_add(acc, x.keys.q_t + m * C + j, C, 1, w.P + j * C + j, C, x.reach - j);
      store_block(acc, x.d_k + m * C + j, C);
    }
    for (int n = 0; n < NV; ++n) store(E_start + j + n * W, start[n]);
  }
}

// d_S = (diag(b) Q)^T d_O + end d_S - (diag(beta b) K)^T d_R; return the product of S and d_S if all
// gradients are asked for.
template <bool asks_all>
GDN_INLINE float retreat_state(const Chunk& x) {
  const Backward& w = x.w;
  for (int64_t i = 0; i < x.count; ++i) {
    multiply(w.d_o + i * x.Vs, x.g.b[i], x.Vs);
    if (x.c.has_erase) multiply(w.d_r + i * x.Vs, -x.g.beta[i] * x.g.b[i], x.Vs);
  }
  Vec product = {};
  for (int64_t p = 0; p < x.t.panels; ++p) {
    for (int64_t m = 0; m < x.c.K; m += MR) {
      const int64_t place = p * x.Kp * P + m * P;
      Block acc;
      load_block(acc, x.d_S + place, P);
      for (int i = 0; i < MR; ++i) {
        for (int n = 0; n < NV; ++n) {
          if (asks_all) product += acc[i][n] * load(x.S + place + i * P + n * W);
          acc[i][n] *= all(x.g.end);
        }
      }
      multiply_add(acc, x.keys.q_t + m * C, C, 1, w.d_o + p * P, x.Vs, x.count);
      if (x.c.has_erase) {
        multiply_add(acc, x.keys.k_t + m * C, C, 1, w.d_r + p * P, x.Vs, x.count);
      }
      store_block(acc, x.d_S + place, P);
    }
  }
  return asks_all ? sum(product) : 0.0f;
}

GDN_INLINE float dot(const float* x, const float* y, int64_t n) {
  Vec total = {};
  for (int64_t i = 0; i < n; i += W) total += load(x + i) * load(y + i);
  return sum(total);
}

// The gradients of the gates of a chunk, from E: see the head of this file.
void gate_gradients(const Gates& g, int64_t count, const float* E_t, const float* D_t,
                    const float* E_start, const float* E_end, float E_all, float* d_alpha) {
  const int64_t reach = reach_of(count);
  float reached[C];
  memcpy(reached, E_start, sizeof reached);
  float at_end = E_all;
  for (int64_t i = 0; i < count; ++i) {
    d_alpha[i] = dot(D_t + i * C, reached, reach) + g.d[i] * at_end;
    for (int64_t j = 0; j < reach; j += W) {
      store(reached + j, load(reached + j) * g.alpha[i] + load(E_t + i * C + j));
    }
    at_end = at_end * g.alpha[i] + E_end[i];
  }
}

// Write numbers of the tokens of a chunk, one a value head: into `sums` if there are others.
void store_gates(const Chunk& x, const float* from, const GdnArray& to, float* sums) {
  for (int64_t i = 0; i < x.count; ++i) {
    const int64_t token = x.token + i;
    float* data = static_cast<float*>(to.data) + at(to, x.t.row, token, x.head);
    if (sums) data = sums + (x.t.row * x.c.T + token) * x.c.HV + x.head;
    *data = from[i];
  }
}

// The gradients of one chunk of one value head; d_S is that of the state behind it, then before it.
void run_back(const Chunk& x) {
  const Backward& w = x.w;
  float E_start[C] = {}, E_end[C], d_alpha[C], d_beta[C];
  const int64_t size = x.t.panels * x.Kp * P;
  const Flushed flushed(x.token >= x.faint_end &&
                        may_flush_back(x.c, x.to.d_o, x.t, x.token, x.count, x.head, x.g) &&
                        is_ordinary(x.S, size) && is_ordinary(x.d_S, size));
  form_pairs<true>(x.g, x.keys.products, x.count, w.A, w.M, w.D, x.c.has_erase);
  load_values(x.to.d_o, x.t, x.token, x.count, x.head, x.c.V, w.d_o);
  solve_gradients<true>(x, E_end);
  multiply_writes(x);
  form_pair_gradients(x, d_beta);
  add_key_gradients(x, E_start);
  const float E_all = retreat_state<true>(x);
  if (x.to.d_decay.data) {
    gate_gradients(x.g, x.count, w.pairs, w.pairs + C * C, E_start, E_end, E_all, d_alpha);
    for (int64_t i = 0; x.c.decay_is_log && i < x.count; ++i) d_alpha[i] *= x.g.alpha[i];
    store_gates(x, d_alpha, x.to.d_decay, x.sums.d_decay);
  }
  if (x.to.d_beta.data) store_gates(x, d_beta, x.to.d_beta, x.sums.d_beta);
}

// The gradient of the state before one chunk of one value head, from that of the state behind it.
void run_start(const Chunk& x) {
  const Backward& w = x.w;
  const Flushed flushed(x.token >= x.faint_end &&
                        may_flush_back(x.c, x.to.d_o, x.t, x.token, x.count, x.head, x.g) &&
                        is_ordinary(x.d_S, x.t.panels * x.Kp * P));
  form_pairs<false>(x.g, x.keys.products, x.count, w.A, w.M, nullptr, x.c.has_erase);
  load_values(x.to.d_o, x.t, x.token, x.count, x.head, x.c.V, w.d_o);
  solve_gradients<false>(x, nullptr);
  retreat_state<false>(x);
}

}  // namespace
