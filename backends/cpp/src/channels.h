// One chunk with a decay of every key channel (docs/math.md §9): what forward and backward share.
//
// Where two blocks of tokens meet, what token i of the second one reads of token j of the first is
//
//     (decays of the second block up to i . k_i) (decays behind j to its end . k_j),
//
// a matrix product of factors that are at most 1. Within a block the keys decay from token to token.
// Nothing is divided and no logarithm is taken: an exact zero needs nothing special. Where erase and
// write stand apart, token i reads with erase . k_i, and nothing is to be scaled by beta.
#pragma once

#include "subnormal.h"

namespace {

constexpr int BLOCK = C / 2;  // tokens of a block
static_assert(BLOCK % MR == 0 && BLOCK % W == 0, "blocks are whole tiles");

// A chunk of one value head; rows of Kp numbers are those of tokens.
struct DecayedKeys {
  float *k, *q;             // [C][Kp], q times the scale; zeros up to the reach of the tokens
  float* erased;            // [C][Kp]: the keys that the error is taken with; k where that is beta's
  float* alpha;             // [C][Kp], ones there
  float *read_k, *read_q;   // [C][Kp]: erased and q, decayed from the start of their block
  float* kept;              // [C][Kp]: k, decayed up to the end of its block
  float *k_t, *q_t;         // [Kp][C]: erased and q, decayed from the start of the chunk, transposed
  float* kept_t;            // [Kp][C]: k, decayed up to the end of the chunk, transposed
  float* ends;              // [2][Kp]: the decays of the two blocks
  float* end;               // [Kp]: those of the chunk
};

// Take the working memory of a chunk but for its keys and queries.
void take_decayed(const GdnSequences& c, Arena& arena, int64_t Kp, DecayedKeys& x) {
  if (c.is_apart) x.erased = arena.take(C * Kp);
  for (float** rows : {&x.alpha, &x.read_k, &x.read_q, &x.kept, &x.k_t, &x.q_t, &x.kept_t}) {
    *rows = arena.take(C * Kp);
  }
  x.ends = arena.take(2 * Kp);
  x.end = arena.take(Kp);
}

int64_t decayed_floats(const GdnSequences& c, int64_t Kp) {
  return (c.is_apart ? 8 : 7) * C * Kp + 3 * Kp + 10 * 16;
}

// Lane l is the sum of all lanes of x[l]: half of the vectors is folded into the other one, and so on.
GDN_INLINE Vec sums_of(Vec* x) {
  GDN_UNROLL for (int count = W / 2; count; count /= 2) {
    GDN_UNROLL for (int i = 0; i < count; ++i) {
      x[i] = zip_low(x[i], x[i + count]) + zip_high(x[i], x[i + count]);
    }
  }
  return x[0];
}

// Whether the products of the decays of a chunk may be subnormal, or those with an operand. An exact
// zero leaves no product.
bool are_strong(const float* alpha, int64_t count, int64_t Kp) {
  const Flushed flushed(true);
  Vec least = all(1.0f);
  for (int64_t j = 0; j < Kp; j += W) {
    Vec product = all(1.0f);
    for (int64_t i = 0; i < count; ++i) {
      const Vec x = load(alpha + i * Kp + j);
      product *= choose((Ints)x == Ints{}, all(1.0f), x);
    }
    least = choose(product < least, product, least);
  }
  for (int l = 0; l < W; ++l) {
    if (!(least[l] > kStrong)) return true;
  }
  return false;
}

// Load the decays of a chunk of one value head, and its gates: alpha and b are 1, and d [C] is at
// most what any channel keeps of a token.
void load_decays(const GdnSequences& c, const Task& t, int64_t token, int64_t count, int64_t head,
                   int64_t Kp, DecayedKeys& x, Gates& g) {
  const int64_t reach = reach_of(count);
  for (int64_t i = 0; i < reach; ++i) {
    float* alpha = x.alpha + i * Kp;
    g.beta[i] = 0.0f;
    g.alpha[i] = g.b[i] = g.d[i] = 1.0f;
    for (int64_t j = 0; i >= count && j < Kp; j += W) store(alpha + j, all(1.0f));
    if (i >= count) continue;
    if (c.decay_of_channels) {
      read_decays(c.decay, at(c.decay, t.row, token + i, head), c.decay_is_log, c.K, Kp, alpha);
    } else {
      const Vec one = all(c.decay.data ? decay_of(c, t, token + i, head) : 1.0f);
      for (int64_t j = 0; j < Kp; j += W) store(alpha + j, one);
    }
    g.beta[i] = c.beta.data ? number(c.beta, at(c.beta, t.row, token + i, head)) : 1.0f;
  }
  g.end = 1.0f;
  g.are_strong = are_strong(x.alpha, count, Kp);
  float left = 1.0f;
  for (int64_t i = count; g.are_strong && i-- > 0;) {
    g.d[i] = left;
    float least_alpha = 1.0f;
    for (int64_t j = 0; j < c.K && left >= kKept; ++j) {
      least_alpha = x.alpha[i * Kp + j] < least_alpha ? x.alpha[i * Kp + j] : least_alpha;
    }
    left *= least_alpha;
  }
}

// Load the keys of a chunk that its errors are taken with: k is there.
void load_erased(const GdnSequences& c, const Task& t, int64_t token, int64_t count, int64_t head,
                 int64_t Kp, DecayedKeys& x) {
  if (!c.is_apart) {
    x.erased = x.k;
    return;
  }
  memcpy(x.erased, x.k, size_t(reach_of(count) * Kp) * 4);
  for (int64_t i = 0; i < count; ++i) {
    scale_by(c.erase, at(c.erase, t.row, token + i, head), c.erase_of_channels, 0, c.K,
             x.erased + i * Kp);
  }
}

// Scale columns of v of a chunk, rows of `stride`, to what is written.
void scale_values(const GdnSequences& c, const Task& t, int64_t token, int64_t count, int64_t head,
                  int64_t stride, float* values) {
  const int64_t first = t.panel * P, width = least(t.panels * P, c.V - first);
  for (int64_t i = 0; i < count; ++i) {
    scale_by(c.write, at(c.write, t.row, token + i, head), c.write_of_channels, first, width,
             values + i * stride);
  }
}

// The decays of a chunk are in its keys and queries: what is done with them knows no others.
GDN_INLINE void forget_decays(Gates& g) {
  for (int64_t i = 0; i < C; ++i) g.d[i] = 1.0f;
}

// Decay k and q of a block from its start, and take the decays of the block.
GDN_INLINE void decay_reads(const DecayedKeys& x, int64_t m, int64_t last, int64_t Kp, float* end) {
  for (int64_t j = 0; j < Kp; j += W) {
    Vec since = all(1.0f);
    for (int64_t i = m * Kp + j; i < last * Kp; i += Kp) {
      since *= load(x.alpha + i);
      store(x.read_k + i, since * load(x.erased + i));
      store(x.read_q + i, since * load(x.q + i));
    }
    store(end + j, since);
  }
}

// Rows i of K K^T and Q K^T within a block that begins at token m, each pair with its decays, for the
// tokens before i; the keys are decayed on the way. `kept` are the rows of the block.
GDN_INLINE void walk_block(const DecayedKeys& x, int64_t m, int64_t last, int64_t Kp, float* kk,
                           float* qk) {
  constexpr int G = W / 2;  // tokens at a time: two vectors of sums each
  float* kept = x.kept + m * Kp;
  memset(kept, 0, size_t(BLOCK * Kp) * 4);
  for (int64_t i = m; i < last; ++i) {
    const float *alpha = x.alpha + i * Kp, *erased = x.erased + i * Kp, *q = x.q + i * Kp;
    // Those from i on are zeros still.
    for (int64_t first = 0; first < i - m; first += G) {
      Vec total[W] = {};
      for (int64_t j = 0; j < Kp; j += W) {
        const Vec decay = load(alpha + j), of_k = load(erased + j), of_q = load(q + j);
        float* row = kept + first * Kp + j;
        GDN_UNROLL for (int g = 0; g < G; ++g, row += Kp) {
          const Vec one = load(row) * decay;
          store(row, one);
          total[g] += one * of_k;
          total[G + g] += one * of_q;
        }
      }
      float sums[W];
      store(sums, sums_of(total));
      memcpy(kk + i * C + m + first, sums, G * 4);
      memcpy(qk + i * C + m + first, sums + G, G * 4);
    }
    const float* k = x.k + i * Kp;
    Vec own = {};
    for (int64_t j = 0; j < Kp; j += W) {
      store(kept + (i - m) * Kp + j, load(k + j));
      own += load(k + j) * load(q + j);
    }
    qk[i * C + i] = sum(own);
  }
}

// The same of tokens of the second block and the first one: kept_t has the keys of the first one.
GDN_INLINE void join_blocks(const DecayedKeys& x, int64_t last, int64_t Kp, float* kk, float* qk) {
  for (int64_t m = BLOCK; m < last; m += MR) {
    for (int64_t n = 0; n < BLOCK; n += W) {
      Vec of_k[MR] = {}, of_q[MR] = {};
      const float *k = x.read_k + m * Kp, *q = x.read_q + m * Kp;
      for (int64_t j = 0; j < Kp; ++j) {
        const Vec kept = load(x.kept_t + j * C + n);
        GDN_UNROLL for (int i = 0; i < MR; ++i) {
          of_k[i] += all(k[i * Kp + j]) * kept;
          of_q[i] += all(q[i * Kp + j]) * kept;
        }
      }
      for (int i = 0; i < MR; ++i) {
        store(kk + (m + i) * C + n, of_k[i]);
        store(qk + (m + i) * C + n, of_q[i]);
      }
    }
  }
}

// Columns from `first` on of W rows of [Kp][C] times a decay of each row.
GDN_INLINE void decay_columns(float* x, const float* decays, int64_t first, int64_t Kp) {
  for (int64_t j = 0; j < Kp; ++j) {
    float* row = x + j * C + first;
    for (int64_t i = 0; i < BLOCK; i += W) store(row + i, load(row + i) * all(decays[j]));
  }
}

// K K^T below the diagonal and Q K^T up to it, every pair with its decays, both [C][C] with zeros
// elsewhere, and k and q as the products with the state take them.
void form_channels(const DecayedKeys& x, int64_t count, int64_t Kp, float* kk, float* qk) {
  const int64_t last = reach_of(count), first_last = least(last, BLOCK);
  memset(kk, 0, C * C * 4);
  memset(qk, 0, C * C * 4);
  decay_reads(x, 0, first_last, Kp, x.ends);
  walk_block(x, 0, first_last, Kp, kk, qk);
  transpose(x.kept, Kp, x.kept_t, C, BLOCK, Kp);
  memcpy(x.end, x.ends, size_t(Kp) * 4);
  if (last > BLOCK) {
    decay_reads(x, BLOCK, last, Kp, x.ends + Kp);
    walk_block(x, BLOCK, last, Kp, kk, qk);
    join_blocks(x, last, Kp, kk, qk);
    decay_columns(x.kept_t, x.ends + Kp, 0, Kp);
    transpose(x.kept + BLOCK * Kp, Kp, x.kept_t + BLOCK, C, BLOCK, Kp);
    for (int64_t j = 0; j < Kp; j += W) {
      store(x.end + j, load(x.end + j) * load(x.ends + Kp + j));
    }
  }
  transpose(x.read_k, Kp, x.k_t, C, last, Kp);
  transpose(x.read_q, Kp, x.q_t, C, last, Kp);
  if (last > BLOCK) {
    decay_columns(x.k_t, x.ends, BLOCK, Kp);
    decay_columns(x.q_t, x.ends, BLOCK, Kp);
  }
}

// A = diag(beta) K K^T of a chunk; may be the same memory.
GDN_INLINE void scale_pairs(const Gates& g, int64_t count, const float* kk, float* A) {
  for (int64_t i = 0; i < round_up(count, MR); ++i) {
    for (int64_t j = i * C; j < (i + 1) * C; j += W) store(A + j, load(kk + j) * all(g.beta[i]));
  }
}

// next = diag(end) S + kept^T U of one panel; `next` may be S.
GDN_INLINE void advance_channels(const DecayedKeys& x, int64_t count, int64_t K, const float* U,
                                 int64_t ldu, const float* S, float* next) {
  for (int64_t m = 0; m < K; m += MR) {
    Block acc;
    load_block(acc, S + m * P, P);
    scale_rows(acc, x.end + m);
    multiply_add(acc, x.kept_t + m * C, C, 1, U, ldu, count);
    store_block(acc, next + m * P, P);
  }
}

}  // namespace
