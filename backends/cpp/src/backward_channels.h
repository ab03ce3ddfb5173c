// The backward of one chunk of one value head with a decay of every key channel (docs/math.md §9).
//
// What is read of the state before the chunk, and what is kept for the one behind it, has gradients
// like those of a scalar decay, of decayed keys and queries. Where the two blocks of the chunk meet,
// they are matrix products again. Within a block, the keys of tokens j that token t finds,
//
//     held_j = alpha_t held_j,   held_t = k_t,
//
// are walked forwards, and what later tokens i ask of them is walked backwards,
//
//     asked_j = alpha_(t+1) asked_j + P_tj q_t + N_tj k_t,
//
// with P and N the gradients of the pairs. Then d_alpha_t is the sum of asked_j held_j over j < t, one
// of which is all that was there before the block: exact where alpha is 0 too. Where erase and
// write stand apart, N_tj has erase_t . k_t beside it, whose gradient is collected on its own.
#pragma once

#include "backward_chunk.h"

namespace {

// Form the pairs of a chunk, as K K^T in D, A and M, and the keys that products with states take.
void form_decayed(Chunk& x) {
  const Backward& w = x.w;
  form_channels(x.decayed, x.count, x.Kp, w.D, w.M);
  if (x.c.has_erase) scale_pairs(x.g, x.count, w.D, w.A);
  forget_decays(x.g);
}

void load_gates_of(Chunk& x) {
  load_decays(x.c, x.t, x.token, x.count, x.head, x.Kp, x.decayed, x.g);
  load_erased(x.c, x.t, x.token, x.count, x.head, x.Kp, x.decayed);
}

// Form the writes and errors of a chunk, and the state behind it where that is another's.
void run_channels_again(Chunk x, float* next) {
  const GdnSequences& c = x.c;
  const Ahead ahead{c, x.t, c.v, x.token + C, x.head, x.t.last, 0};
  load_gates_of(x);
  const bool may_flush = sizes_of(c, x.t, x.token, x.count, x.head, x.g).may_flush &&
                         is_ordinary(x.S, x.t.panels * x.Kp * P);
  with_flushing(may_flush, [&] { form_decayed(x); });
  x.keys.k_t = x.decayed.k_t;
  Columns from{x.w.values, x.Vs, false};
  if (!c.is_apart && lies_in_tiles(c.v, c.V, x.count)) {
    from = columns_of(c.v, x.t, x.token, x.head);
  } else {
    load_values(c.v, x.t, x.token, x.count, x.head, c.V, x.w.values);
    if (c.is_apart) scale_values(c, x.t, x.token, x.count, x.head, x.Vs, x.w.values);
  }
  // Tokens that are none write nothing.
  memset(x.U + x.used * x.Vs, 0, size_t((x.reach - x.used) * x.Vs) * 4);
  for (int64_t p = 0; p < x.t.panels; ++p) {
    const float* S = x.S + p * x.Kp * P;
    const Flushed flushed(may_flush);
    form_writes(c, x.keys, x.g, x.count, x.w.A, S, from.data + p * P, from.ld, x.U + p * P, x.Vs,
                x.erased + p * P, [&](int64_t m) { return ahead.tile(p, m); });
    if (!next) continue;
    advance_channels(x.decayed, x.count, c.K, x.U + p * P, x.Vs, S, next + p * x.Kp * P);
  }
}

// P = d_P and N = diag(beta) d_A (in X), the gradients of Q K^T and K K^T with their decays, zeros
// where no pair is. d_beta [C] receives the gradients of beta.
void form_decayed_gradients(const Chunk& x, float* d_beta) {
  const Backward& w = x.w;
  for (int64_t i = 0; i < x.reach; ++i) {
    Vec total = {};
    for (int64_t j = 0; j < C; j += W) {
      const int64_t at = i * C + j;
      const Bits before = lanes_below(i < x.count ? i - j : 0);
      store(w.P + at, keep(lanes_below(i < x.count ? i + 1 - j : 0), load(w.pairs + at)));
      Vec d_key = {};
      if (x.c.has_erase) d_key = keep(before, -load(w.pairs + C * C + at));
      total += d_key * load(w.D + at);
      store(w.X + at, d_key * all(x.g.beta[i]));
    }
    if (i >= x.count) continue;
    for (int64_t j = 0; j < x.Vs; j += W) {
      total += load(w.d_r + i * x.Vs + j) * load(x.erased + i * x.Vs + j);
    }
    d_beta[i] = sum(total);
  }
}

// Rows (S B)^T diag(factors) of all panels, [C][Kp]: columns of tokens of B [Vs][C].
void multiply_state_rows(const Chunk& x, const float* S, const float* B, const float* factors,
                         float* to) {
  const int64_t rows = round_up(x.c.K, MR);
  for (int64_t j = 0; j < x.count; j += P) {
    for (int64_t m = 0; m < rows; m += MR) {
      Block acc;
      clear(acc);
      multiply_state(acc, x, S, m, B + j);
      if (factors) scale_columns(acc, factors + j);
      store_block(acc, x.w.d_t + m * C + j, C);
    }
  }
  memset(x.w.d_t + rows * C, 0, size_t((x.Kp - rows) * C) * 4);
  transpose(x.w.d_t, C, to, x.Kp, x.Kp, x.reach);
}

// d_S = (b . Q)^T d_O + diag(end) d_S - (b . K)^T diag(beta) d_R; `d_end` [Kp] receives the products
// of the rows of S and d_S if all gradients are asked for.
template <bool asks_all>
void retreat_channels(const Chunk& x, float* d_end) {
  const Backward& w = x.w;
  for (int64_t i = 0; x.c.has_erase && i < x.count; ++i) {
    multiply(w.d_r + i * x.Vs, -x.g.beta[i], x.Vs);
  }
  for (int64_t m = 0; m < x.c.K; m += MR) {
    Vec product[MR] = {};
    for (int64_t p = 0; p < x.t.panels; ++p) {
      const int64_t place = p * x.Kp * P + m * P;
      Block acc;
      load_block(acc, x.d_S + place, P);
      for (int i = 0; asks_all && i < MR; ++i) {
        for (int n = 0; n < NV; ++n) product[i] += acc[i][n] * load(x.S + place + i * P + n * W);
      }
      scale_rows(acc, x.decayed.end + m);
      multiply_add(acc, x.decayed.q_t + m * C, C, 1, w.d_o + p * P, x.Vs, x.count);
      if (x.c.has_erase) {
        multiply_add(acc, x.decayed.k_t + m * C, C, 1, w.d_r + p * P, x.Vs, x.count);
      }
      store_block(acc, x.d_S + place, P);
    }
    for (int i = 0; asks_all && i < MR; ++i) d_end[m + i] = sum(product[i]);
  }
}

// Turn the gradients of what the chunk reads of the state before it, d_read_k and d_read_q, and keeps
// for the one behind it, d_kept, into those of what each block does. `d_starts` [2][Kp] are those of
// what passes a block as a whole.
void join_gradients(const Chunk& x) {
  const Backward& w = x.w;
  const DecayedKeys& k = x.decayed;
  const int64_t Kp = x.Kp, reach = x.reach;
  memcpy(w.d_starts, w.d_end, size_t(Kp) * 4);
  if (reach <= BLOCK) return;
  for (int64_t j = 0; j < Kp; j += W) {
    const Vec d_end = load(w.d_end + j);
    Vec first = d_end * load(k.ends + Kp + j), second = d_end * load(k.ends + j);
    for (int64_t i = j; i < BLOCK * Kp; i += Kp) second += load(k.kept + i) * load(w.d_kept + i);
    for (int64_t i = BLOCK * Kp + j; i < reach * Kp; i += Kp) {
      first += load(k.read_q + i) * load(w.d_read_q + i);
      first += load(k.read_k + i) * load(w.d_read_k + i);
    }
    store(w.d_starts + j, first);
    store(w.d_starts + Kp + j, second);
  }
  for (int64_t n = 0; n < Kp; n += P) {
    // Of the second block: what it reads of keys of the first one.
    for (int64_t m = BLOCK; m < reach; m += MR) {
      for (float* d : {w.d_read_q, w.d_read_k}) {
        Block acc;
        load_block(acc, d + m * Kp + n, Kp);
        scale_columns(acc, k.ends + n);
        multiply_add(acc, (d == w.d_read_q ? w.P : w.X) + m * C, C, 1, k.kept + n, Kp, BLOCK);
        store_block(acc, d + m * Kp + n, Kp);
      }
    }
    // Of the first block: what is read of its keys.
    for (int64_t m = 0; m < BLOCK; m += MR) {
      Block acc;
      load_block(acc, w.d_kept + m * Kp + n, Kp);
      scale_columns(acc, k.ends + Kp + n);
      const int64_t at = BLOCK * C + m, row = BLOCK * Kp + n, depth = reach - BLOCK;
      multiply_add(acc, w.P + at, 1, C, k.read_q + row, Kp, depth);
      multiply_add(acc, w.X + at, 1, C, k.read_k + row, Kp, depth);
      store_block(acc, w.d_kept + m * Kp + n, Kp);
    }
  }
}

// W channels of a block.
template <bool is_apart>
struct Walk {
  const Chunk& x;
  int64_t m, last, channel;  // tokens of the block, and the first channel
  // Before each token: of all that was there before the block, and of its tokens. Clang takes it for
  // aligned like a whole vector.
  Vec held[BLOCK + 1][BLOCK + 1] __attribute__((aligned(4 * W)));

  GDN_INLINE int64_t place(int64_t t) const { return (m + t) * x.Kp + channel; }

  // The gradients of what token t reads; keep what it finds.
  GDN_INLINE void forwards() {
    const Backward& w = x.w;
    held[0][0] = all(1.0f);
    for (int64_t t = 0; t < last - m; ++t) {
      const int64_t at = place(t);
      const float *of_q = w.P + (m + t) * C + m, *of_k = w.X + (m + t) * C + m;
      const Vec alpha = load(x.decayed.alpha + at), k = load(x.decayed.k + at);
      const Vec before = held[t][0] * alpha;
      held[t + 1][0] = before;
      Vec d_q = load(x.d_q + at) + before * load(w.d_read_q + at) + k * all(of_q[t]);
      Vec d_k = before * load(w.d_read_k + at);
      if (!is_apart) d_k = load(x.d_k + at) + d_k;
      for (int64_t j = 0; j < t; ++j) {
        const Vec key = held[t][j + 1] * alpha;
        held[t + 1][j + 1] = key;
        d_q += key * all(of_q[j]);
        d_k += key * all(of_k[j]);
      }
      held[t + 1][t + 1] = k;
      store(x.d_q + at, d_q);
      store((is_apart ? w.d_erased : x.d_k) + at, d_k);
    }
  }

  // The gradients of what token t writes, and of its decay.
  GDN_INLINE void backwards(const float* d_start) {
    const Backward& w = x.w;
    Vec asked[BLOCK + 1], decay = all(1.0f);
    asked[0] = load(d_start + channel);
    for (int64_t t = 0; t < last - m; ++t) asked[t + 1] = load(w.d_kept + place(t));
    for (int64_t t = last - m; t-- > 0;) {
      const int64_t at = place(t);
      const float *of_q = w.P + (m + t) * C + m, *of_k = w.X + (m + t) * C + m;
      const Vec q = load(x.decayed.q + at), k = load(x.decayed.k + at);
      const Vec erased = is_apart ? load(x.decayed.erased + at) : k;
      store(x.d_k + at, load(x.d_k + at) + asked[t + 1] * decay + q * all(of_q[t]));
      asked[0] = asked[0] * decay + q * load(w.d_read_q + at) + erased * load(w.d_read_k + at);
      Vec d_alpha = asked[0] * held[t][0];
      for (int64_t j = 0; j < t; ++j) {
        asked[j + 1] = asked[j + 1] * decay + q * all(of_q[j]) + erased * all(of_k[j]);
        d_alpha += asked[j + 1] * held[t][j + 1];
      }
      decay = load(x.decayed.alpha + at);
      store(w.d_alpha + at, x.c.decay_is_log ? d_alpha * decay : d_alpha);
    }
  }
};

// Add the gradients of k and q, and form those of the decays, from those of both blocks.
template <bool is_apart>
void walk_blocks(const Chunk& x) {
  for (int64_t m = 0; m < x.count; m += BLOCK) {
    for (int64_t j = 0; j < x.Kp; j += W) {
      Walk<is_apart> walk{x, m, least(m + BLOCK, x.count), j, {}};
      walk.forwards();
      walk.backwards(x.w.d_starts + m / BLOCK * x.Kp);
    }
  }
}

// Turn the gradients of the erased keys of a chunk into those of k, and write those of erase.
void split_erased(const Chunk& x) {
  const GdnSequences& c = x.c;
  const GdnArray& to = x.to.d_erase;
  for (int64_t i = 0; i < x.count; ++i) {
    const int64_t token = x.token + i, place = i * x.Kp;
    float *d = x.w.d_erased + place, *d_k = x.d_k + place, *d_erase = x.w.d_kept + place;
    const float* k = x.decayed.k + place;
    float total = 0.0f;
    for (int64_t j = 0; j < c.K; ++j) total += d_erase[j] = d[j] * k[j];
    if (to.data) {
      float* data = static_cast<float*>(to.data) + at(to, x.t.row, token, x.head);
      memcpy(data, c.erase_of_channels ? d_erase : &total, c.erase_of_channels ? size_t(c.K) * 4 : 4);
    }
    scale_by(c.erase, at(c.erase, x.t.row, token, x.head), c.erase_of_channels, 0, c.K, d);
    for (int64_t j = 0; j < c.K; ++j) d_k[j] += d[j];
  }
}

// Write the gradients of the decays of a chunk: into the sums if there are others.
void store_decays(const Chunk& x) {
  const GdnArray& to = x.to.d_decay;
  for (int64_t i = 0; to.data && i < x.count; ++i) {
    const int64_t token = x.token + i, place = (x.t.row * x.c.T + token) * x.c.HV + x.head;
    float* data = static_cast<float*>(to.data) + at(to, x.t.row, token, x.head);
    if (x.sums.d_decay) data = x.sums.d_decay + place * decay_width(x.c);
    const float* d_alpha = x.w.d_alpha + i * x.Kp;
    if (x.c.decay_of_channels) {
      memcpy(data, d_alpha, size_t(x.c.K) * 4);
    } else {
      float total = 0.0f;
      for (int64_t j = 0; j < x.c.K; ++j) total += d_alpha[j];
      *data = total;
    }
  }
}

// The gradients of one chunk of one value head; d_S is that of the state behind it, then before it.
void run_channels_back(Chunk x) {
  const Backward& w = x.w;
  float unused[C], d_beta[C];
  const int64_t size = x.t.panels * x.Kp * P;
  load_gates_of(x);
  const Flushed flushed(x.token >= x.faint_end &&
                        may_flush_back(x.c, x.to.d_o, x.t, x.token, x.count, x.head, x.g) &&
                        is_ordinary(x.S, size) && is_ordinary(x.d_S, size));
  form_decayed(x);
  load_values(x.to.d_o, x.t, x.token, x.count, x.head, x.c.V, w.d_o);
  x.keys.k_t = x.decayed.kept_t;
  solve_gradients<true>(x, unused);
  multiply_writes(x);
  form_decayed_gradients(x, d_beta);
  multiply_state_rows(x, x.S, w.d_o_t, nullptr, w.d_read_q);
  multiply_state_rows(x, x.d_S, w.U_t, nullptr, w.d_kept);
  if (x.c.has_erase) {
    float factors[C];
    for (int64_t i = 0; i < C; ++i) factors[i] = i < x.count ? -x.g.beta[i] : 0.0f;
    multiply_state_rows(x, x.S, w.d_r_t, factors, w.d_read_k);
  } else {
    memset(w.d_read_k, 0, size_t(x.reach * x.Kp) * 4);
  }
  memset(w.d_end, 0, size_t(x.Kp) * 4);
  retreat_channels<true>(x, w.d_end);
  join_gradients(x);
  x.c.is_apart ? walk_blocks<true>(x) : walk_blocks<false>(x);
  if (x.c.is_apart) split_erased(x);
  store_decays(x);
  if (x.to.d_beta.data) store_gates(x, d_beta, x.to.d_beta, x.sums.d_beta);
}

// The gradient of the state before one chunk of one value head, from that of the state behind it.
void run_channels_start(Chunk x) {
  load_gates_of(x);
  const Flushed flushed(x.token >= x.faint_end &&
                        may_flush_back(x.c, x.to.d_o, x.t, x.token, x.count, x.head, x.g) &&
                        is_ordinary(x.d_S, x.t.panels * x.Kp * P));
  form_decayed(x);
  load_values(x.to.d_o, x.t, x.token, x.count, x.head, x.c.V, x.w.d_o);
  x.keys.k_t = x.decayed.kept_t;
  solve_gradients<false>(x, nullptr);
  retreat_channels<false>(x, nullptr);
}

// As `faint_end`: what counts is the channel that an output reads most of. `rows` [3][Kp] is scratch.
int64_t faint_end_of_channels(const GdnSequences& c, const GdnArray& d_o, const Task& t,
                              int64_t head, float* rows) {
  const int64_t Kp = padded(c.K);
  float *since = rows, *alpha = rows + Kp, *q = rows + 2 * Kp;
  for (int64_t j = 0; j < Kp; ++j) since[j] = j < c.K ? 1.0f : 0.0f;
  memset(q, 0, size_t(Kp) * 4);
  for (int64_t token = t.first; token < t.last; ++token) {
    read_decays(c.decay, at(c.decay, t.row, token, head), c.decay_is_log, c.K, Kp, alpha);
    widen(c.q.data, c.q.type, at(c.q, t.row, token, t.head), q, c.K);
    for (int64_t j = 0; j < Kp; j += W) {
      store(since + j, load(since + j) * load(alpha + j));
      store(q + j, load(q + j) * load(since + j));
    }
    if (largest(since, Kp) == 0.0f) return token;
    const float d = largest_of(d_o, at(d_o, t.row, token, head), c.V);
    if (c.scale * largest(q, Kp) >= kKept * kLeastKey && d >= kLeastGradient) return t.first;
  }
  return t.last;
}

}  // namespace
