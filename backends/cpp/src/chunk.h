// One chunk of up to C tokens, loaded: what forward and backward share (docs/math.md §3, §4).
//
// Decays between tokens are products of the gates, never quotients or differences of logarithms:
// an exact zero needs nothing special, and nothing overflows.
#pragma once

#include "products.h"

namespace {

// Floats of working memory, taken one after another, each on a cache line of its own; without
// memory they are only counted.
struct Arena {
  float* memory;
  int64_t used = 0;
  float* take(int64_t floats) {
    float* start = memory ? memory + used : nullptr;
    used += round_up(floats, 16);
    return start;
  }
};

// Where one sequence lies, and which heads a task runs.
struct Task {
  int64_t n;                // the sequence
  int64_t row, first, last; // its row and tokens
  int64_t head;             // the key head
  int64_t panel, panels;    // the first panel of columns of V, and how many
  int64_t value, values;    // the first value head of the key head, and how many
};

GDN_INLINE Task task_of(const GdnSequences& c, int64_t n) {
  Task t = {};
  t.n = n;
  t.row = c.starts ? 0 : n;
  t.first = c.starts ? c.starts[n] : 0;
  t.last = c.starts ? c.starts[n + 1] : c.T;
  return t;
}

// Whether the rows of a chunk are of channels: a decay of theirs is in the keys and queries, and so is
// what erases.
GDN_INLINE bool has_channels(const GdnSequences& c) { return c.decay_of_channels || c.is_apart; }

GDN_INLINE int64_t at(const GdnArray& x, int64_t row, int64_t token, int64_t head) {
  return row * x.row + token * x.token + head * x.head;
}

// The keys and queries of a chunk, transposed: a product takes a block of their rows or columns.
struct Keys {
  // [Kp][C]: k and scale q; zeros below row K and up to the reach of the tokens. Without q, null.
  float *k_t, *q_t;
  float* products;   // [2C][C]: K K^T, then scale Q K^T; entries of later tokens are not used
  float inverse_k[C], inverse_q[C];  // 1 / norm where normalised
};

// Load rows of k, and of q unless that is null, [C][Kp], normalised where that is asked for; zeros up
// to the reach of the tokens.
void load_key_rows(const GdnSequences& c, const Task& t, int64_t token, int64_t count, int64_t Kp,
                   float* k_rows, float* q_rows, Keys& x) {
  const int64_t reach = reach_of(count);
  for (int64_t i = 0; i < reach; ++i) {
    float *k = k_rows + i * Kp, *q = q_rows + i * Kp;
    if (i >= count) {
      memset(k, 0, size_t(Kp) * 4);
      if (q_rows) memset(q, 0, size_t(Kp) * 4);
      continue;
    }
    widen(c.k.data, c.k.type, at(c.k, t.row, token + i, t.head), k, c.K);
    for (int64_t j = c.K; j < Kp; ++j) k[j] = 0.0f;
    if (c.qk_l2norm) {
      x.inverse_k[i] = inverse_norm(k, Kp);
      multiply(k, x.inverse_k[i], Kp);
    }
    if (!q_rows) continue;
    widen(c.q.data, c.q.type, at(c.q, t.row, token + i, t.head), q, c.K);
    for (int64_t j = c.K; j < Kp; ++j) q[j] = 0.0f;
    float factor = c.scale;
    if (c.qk_l2norm) {
      x.inverse_q[i] = inverse_norm(q, Kp);
      factor *= x.inverse_q[i];
    }
    multiply(q, factor, Kp);
  }
}

// Load the keys of a chunk, and the queries if x has room for them; `rows` [2C][Kp] is scratch.
void load_keys(const GdnSequences& c, const Task& t, int64_t token, int64_t count, int64_t Kp,
               float* rows, Keys& x) {
  const int64_t reach = reach_of(count);
  load_key_rows(c, t, token, count, Kp, rows, x.q_t ? rows + C * Kp : nullptr, x);
  transpose(rows, Kp, x.k_t, C, reach, Kp);
  if (x.q_t) transpose(rows + C * Kp, Kp, x.q_t, C, reach, Kp);
}

// K K^T and, where q was loaded, Q K^T of a chunk, once per key head.
void multiply_keys(int64_t count, int64_t K, Keys& x, bool has_erase) {
  for (int half = has_erase ? 0 : 1; half < (x.q_t ? 2 : 1); ++half) {
    const float* left = half ? x.q_t : x.k_t;
    for (int64_t m = 0; m < count; m += MR) {
      for (int64_t j = 0; j < m + MR; j += P) {
        Block acc;
        clear(acc);
        multiply_add(acc, left + m, 1, C, x.k_t + j, C, K);
        store_block(acc, x.products + (half * C + m) * C + j, C);
      }
    }
  }
}

GDN_INLINE float decay_of(const GdnSequences& c, const Task& t, int64_t token, int64_t head) {
  const float x = number(c.decay, at(c.decay, t.row, token, head));
  return c.decay_is_log ? __builtin_expf(x) : x;
}

constexpr float kStrong = 0x1p-80f;

// The gates of a chunk of one value head, up to the reach of its tokens.
struct Gates {
  float alpha[C], beta[C];
  float b[C];  // decay from the start of the chunk to token i
  float d[C];  // decay from token j to the end of the chunk
  float end;   // decay of the whole chunk
  bool are_strong;  // products of them may be subnormal, or with an operand
};

void load_gates(const GdnSequences& c, const Task& t, int64_t token, int64_t count, int64_t head,
                Gates& g) {
  const int64_t reach = reach_of(count);
  for (int64_t i = 0; i < reach; ++i) {
    g.alpha[i] = 1.0f;
    g.beta[i] = 0.0f;
    if (i >= count) continue;
    if (c.decay.data) g.alpha[i] = decay_of(c, t, token + i, head);
    g.beta[i] = c.beta.data ? number(c.beta, at(c.beta, t.row, token + i, head)) : 1.0f;
  }
  // An exact zero leaves no product.
  float product = 1.0f;
  for (int64_t i = 0; i < reach && product > kStrong; ++i) {
    if (g.alpha[i] > 0.0f) product *= g.alpha[i];
  }
  g.are_strong = product <= kStrong;
  product = 1.0f;
  for (int64_t i = 0; i < reach; ++i) g.b[i] = product *= g.alpha[i];
  g.end = product;
  product = 1.0f;
  for (int64_t j = reach; j-- > 0;) {
    g.d[j] = product;
    product *= g.alpha[j];
  }
}

// A = strict_lower(diag(beta) (K K^T . D)), rows of C; M = lower(Q K^T . D) and D if asked for.
template <bool keeps_decays>
GDN_INLINE void form_pairs(const Gates& g, const float* products, int64_t count, float* A, float* M,
                           float* D, bool has_erase) {
  float decays[C] = {};
  const int64_t used = round_up(count, MR);
  for (int64_t i = 0; i < used; ++i) {
    const float alpha = g.alpha[i], beta = g.beta[i];
    const int64_t reach = least(round_up(i + 1, W), C);
    for (int64_t j = 0; j < reach; j += W) store(decays + j, load(decays + j) * alpha);
    decays[i] = 1.0f;
    for (int64_t j = 0; j < reach; j += W) {
      const Vec x = load(decays + j);
      if (keeps_decays) store(D + i * C + j, x);
      if (has_erase) store(A + i * C + j, x * load(products + i * C + j) * beta);
      if (M) store(M + i * C + j, x * load(products + (C + i) * C + j));
    }
    // Products of later tokens were not formed, and may be anything.
    for (int64_t j = i + 1; M && j < C; ++j) M[i * C + j] = 0.0f;
    for (int64_t j = i; has_erase && j < C; ++j) A[i * C + j] = 0.0f;
    if (keeps_decays) {
      for (int64_t j = reach; j < C; ++j) D[i * C + j] = 0.0f;
    }
  }
}

}  // namespace
