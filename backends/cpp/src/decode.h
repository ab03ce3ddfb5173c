// A few tokens of value heads: the state is read once and written once (docs/math.md §2).
//
//     S' = alpha S                          forget first
//     u = beta (v - S'^T k)                 then the error           (without erase: beta v)
//     o = S'^T q + (q . k) u                what the new state will answer
//     S = S' + k u^T                        then write
//
// With a decay of every key channel (§9), alpha is one for each row of S. Where erase and write stand
// apart, the error is write . v - S'^T (erase . k), and beta is 1.
//
// A block of columns of a head takes two sweeps over its K rows: one reads S'^T k and S'^T q, one
// writes S. The second one walks back, from the rows that the first-level cache still has, and
// runs beside the first one of the next block, be it of the next head: reads that wait for memory
// and writes that wait for the caches fill each other's time.
//
// S is computed in: float, or double for a state of doubles. E is an element of the state. No order
// of a sum depends on threads, on blocks or on where the new state lies.
#pragma once

#include <utility>

#include "chunk.h"
#include "strengths.h"

namespace {

constexpr int NC = GDN_COLUMN_VECTORS;  // vectors of a block of columns
template <class S>
constexpr int64_t block_columns = NC * lanes<S>;

// ---------------------------------------------------------------------------------------------
// Tokens
// ---------------------------------------------------------------------------------------------

// The tokens of one value head.
template <class S>
struct Tokens {
  S *k, *other_k;             // [T][Kp]; the keys before these are kept: a write may still need them
  S *q, *qk;                  // [T][Kp] q times the scale, [T] q . k
  S *decayed_k, *decayed_q;   // [T][Kp] the same times alpha, and k times erase
  S *alpha, *beta;            // [T]
  S *alphas, *other_alphas;   // [T][Kp], where the decay is of channels; kept like the keys
  S *v, *o;                   // [block_columns]
  S *block;                   // [K][block_columns]
  int64_t Kp, key_head;
};

template <class S>
int64_t decode_numbers(const GdnSteps& c) {
  const int64_t rows = c.decay_of_channels ? 7 : 5;
  return c.T * (rows * round_up(c.K, 16) + 3) + (c.K + 2) * block_columns<S>;
}

template <class S>
Tokens<S> tokens_in(const GdnSteps& c, S* memory) {
  Tokens<S> x;
  x.Kp = round_up(c.K, 16);
  x.key_head = -1;
  for (S** rows : {&x.k, &x.other_k, &x.q, &x.decayed_k, &x.decayed_q}) {
    *rows = memory;
    memory += c.T * x.Kp;
  }
  for (S** columns : {&x.v, &x.o, &x.block}) {
    *columns = memory;
    memory += block_columns<S>;
  }
  x.qk = x.block + c.K * block_columns<S>;
  x.alpha = x.qk + c.T;
  x.beta = x.alpha + c.T;
  x.alphas = x.beta + c.T;
  x.other_alphas = x.alphas + c.T * x.Kp;
  return x;
}

// Keys and queries, which the value heads of a key head share.
template <class S>
void read_keys(const GdnSteps& c, int64_t row, int64_t head, Tokens<S>& x) {
  std::swap(x.k, x.other_k);
  for (int64_t t = 0; t < c.T; ++t) {
    S *k = x.k + t * x.Kp, *q = x.q + t * x.Kp;
    widen(c.k.data, c.k.type, at(c.k, row, t, head), k, c.K);
    widen(c.q.data, c.q.type, at(c.q, row, t, head), q, c.K);
    for (int64_t i = c.K; i < x.Kp; ++i) k[i] = q[i] = S(0);
    S factor = c.scale;
    if (c.qk_l2norm) {
      multiply(k, inverse_norm(k, x.Kp), x.Kp);
      factor *= inverse_norm(q, x.Kp);
    }
    multiply(q, factor, x.Kp);
    VecOf<S> products = {};
    for (int64_t i = 0; i < x.Kp; i += lanes<S>) products += load(q + i) * load(k + i);
    x.qk[t] = sum(products);
  }
}

template <class S>
S rate_of(const GdnSteps& c, int64_t head) {
  return c.A_log ? std::exp(S(c.A_log[head])) : S(1);
}

template <class S>
S read_alpha(const GdnSteps& c, int64_t row, int64_t t, int64_t head) {
  if (!c.decay.data) return S(1);
  const S x = number_of<S>(c.decay, at(c.decay, row, t, head));
  if (c.raw_decay) {
    S one[16] = {x};
    gate_decays(c, rate_of<S>(c, head), c.dt_bias ? c.dt_bias + head : nullptr, 1, 16, one);
    return one[0];
  }
  return c.decay_is_log ? std::exp(x) : x;
}

template <class S>
S read_beta(const GdnSteps& c, int64_t row, int64_t t, int64_t head) {
  if (!c.beta.data) return S(1);
  const S x = number_of<S>(c.beta, at(c.beta, row, t, head));
  return c.beta_is_raw ? S(c.beta_factor) / (S(1) + std::exp(-x)) : x;
}

// The keys that errors are taken with, in the place of those that are decayed next.
template <class S>
const S* read_erased(const GdnSteps& c, int64_t row, int64_t t, int64_t head, const Tokens<S>& x) {
  const S* k = x.k + t * x.Kp;
  if (!c.is_apart) return k;
  S* erased = x.decayed_k + t * x.Kp;
  memcpy(erased, k, size_t(x.Kp) * sizeof(S));
  scale_by(c.erase, at(c.erase, row, t, head), c.erase_of_channels, 0, c.K, erased);
  return erased;
}

template <class S>
void decay_rows(Tokens<S>& x, int64_t t, const S* k) {
  for (int64_t i = t * x.Kp; i < (t + 1) * x.Kp; i += lanes<S>, k += lanes<S>) {
    store(x.decayed_k + i, load(k) * load(x.alphas + i));
    store(x.decayed_q + i, load(x.q + i) * load(x.alphas + i));
  }
}

template <class S, bool of_channels>
void read_tokens(const GdnSteps& c, int64_t row, int64_t head, Tokens<S>& x) {
  const int64_t key_head = row * c.H + head / (c.HV / c.H);
  if (x.key_head != key_head) read_keys(c, row, key_head % c.H, x);
  x.key_head = key_head;
  if (of_channels) std::swap(x.alphas, x.other_alphas);
  for (int64_t t = 0; t < c.T; ++t) {
    x.beta[t] = read_beta<S>(c, row, t, head);
    const S* k = read_erased(c, row, t, head, x);
    if (of_channels) {
      const int64_t first = at(c.decay, row, t, head);
      S* alphas = x.alphas + t * x.Kp;
      read_decays(c.decay, first, c.decay_is_log && !c.raw_decay, c.K, x.Kp, alphas);
      if (c.raw_decay) {
        const float* bias = c.dt_bias ? c.dt_bias + head * c.K : nullptr;
        gate_decays(c, rate_of<S>(c, head), bias, c.K, x.Kp, alphas);
      }
      decay_rows(x, t, k);
      continue;
    }
    const VecOf<S> alpha = all(x.alpha[t] = read_alpha<S>(c, row, t, head));
    // The decay is taken with k and q: where alpha is 0, no sum over the state can overflow.
    for (int64_t i = t * x.Kp; i < (t + 1) * x.Kp; i += lanes<S>, k += lanes<S>) {
      store(x.decayed_k + i, load(k) * alpha);
      store(x.decayed_q + i, load(x.q + i) * alpha);
    }
  }
}

// ---------------------------------------------------------------------------------------------
// Sweeps over the rows of a block of N vectors of columns
// ---------------------------------------------------------------------------------------------

// What is read: S'^T k and S'^T q.
template <class S, int N, class E>
struct Read {
  const E* state;
  const S *k, *q;  // times alpha
  VecOf<S> of_k[N], of_q[N];
};

// What is still to be written: alpha S + k u^T; `to` may be `state`. `alphas` are those of channels.
template <class S, int N, class E>
struct Write {
  const E* state;
  E* to;
  const S *k, *alphas;
  S alpha;
  VecOf<S> u[N];
};

template <bool of_channels, bool writes, bool reads, class S, int N, class E>
GDN_INLINE void sweep(int64_t K, int64_t stride, const Write<S, N, E>& w, Read<S, N, E>& r) {
  VecOf<S> of_k[N] = {}, of_q[N] = {}, u[N], s[N];
  for (int n = 0; writes && n < N; ++n) u[n] = w.u[n];
  VecOf<S> alpha = all(writes && !of_channels ? w.alpha : S(0));
  for (int64_t i = 0; i < K; ++i) {
    if (writes) {
      const int64_t row = (K - 1 - i) * stride;
      const VecOf<S> k = all(w.k[K - 1 - i]);
      if (of_channels) alpha = all(w.alphas[K - 1 - i]);
      load_row<S, N>(w.state + row, s);
      for (int n = 0; n < N; ++n) s[n] = s[n] * alpha + k * u[n];
      store_row<S, N>(w.to + row, s);
    }
    if (reads) {
      const VecOf<S> k = all(r.k[i]), q = all(r.q[i]);
      load_row<S, N>(r.state + i * stride, s);
      for (int n = 0; n < N; ++n) GDN_KEEP(s[n]);
      for (int n = 0; n < N; ++n) {
        of_k[n] += k * s[n];
        of_q[n] += q * s[n];
      }
    }
  }
  for (int n = 0; reads && n < N; ++n) {
    r.of_k[n] = of_k[n];
    r.of_q[n] = of_q[n];
  }
}

// Take the token's error from what was read, and give its output; `width` columns are there.
template <class S, int N, class E>
GDN_INLINE void finish_read(const GdnSteps& c, const Tokens<S>& x, int64_t row, int64_t t,
                            int64_t head, const Read<S, N, E>& r, int64_t j, int64_t width,
                            Write<S, N, E>& w) {
  widen(c.v.data, c.v.type, at(c.v, row, t, head) + j, x.v, width);
  if (c.is_apart) {
    scale_by(c.write, at(c.write, row, t, head), c.write_of_channels, j, width, x.v);
  }
  for (int64_t l = width; l < N * lanes<S>; ++l) x.v[l] = S(0);
  constexpr bool has_pairs = std::is_same_v<E, Bfloat16>;
  if constexpr (has_pairs) arrange<N, false>(x.v);
  const VecOf<S> beta = all(x.beta[t]), qk = all(x.qk[t]);
  for (int n = 0; n < N; ++n) {
    VecOf<S> u = load(x.v + n * lanes<S>);
    if (c.has_erase) u -= r.of_k[n];
    w.u[n] = u * beta;
    store(x.o + n * lanes<S>, r.of_q[n] + w.u[n] * qk);
  }
  if constexpr (has_pairs) arrange<N, true>(x.o);
  narrow(x.o, c.o.data, c.o.type, at(c.o, row, t, head) + j, width);
  w.k = x.k + t * x.Kp;
  w.alphas = x.alphas + t * x.Kp;
  w.alpha = x.alpha[t];
}

// ---------------------------------------------------------------------------------------------
// Heads
// ---------------------------------------------------------------------------------------------

// All tokens of N vectors of columns from column j on, in `block`: what a state cannot hold between
// tokens, columns that fill no vector, and states that are kept.
template <bool of_channels, class S, int N>
GDN_INLINE void run_in_block(const GdnSteps& c, const Tokens<S>& x, int64_t row, int64_t head,
                             int64_t slot, int64_t j) {
  const int64_t K = c.K, V = c.V, stride = N * lanes<S>, width = least(stride, V - j);
  const int64_t from = slot * c.state_row + head * c.state_head + j;
  const int64_t to = slot * c.new_state_row + head * c.new_state_head + j;
  for (int64_t i = 0; i < K; ++i) {
    S* into = x.block + i * stride;
    widen(c.state, c.state_type, from + i * V, into, width);
    for (int64_t l = width; l < stride; ++l) into[l] = S(0);
  }
  Read<S, N, S> r;
  Write<S, N, S> w;
  r.state = w.state = w.to = x.block;
  for (int64_t t = 0; t < c.T; ++t) {
    r.k = x.decayed_k + t * x.Kp;
    r.q = x.decayed_q + t * x.Kp;
    sweep<of_channels, false, true>(K, stride, w, r);
    finish_read(c, x, row, t, head, r, j, width, w);
    sweep<of_channels, true, false>(K, stride, w, r);
    for (int64_t i = 0; c.states && i < K; ++i) {
      const int64_t place = (((row * c.T + t) * c.HV + head) * K + i) * V + j;
      narrow(x.block + i * stride, c.states, c.state_type, place, width);
    }
  }
  for (int64_t i = 0; i < K; ++i) {
    narrow(x.block + i * stride, c.new_state, c.state_type, to + i * V, width);
  }
}

// All tokens of a block of columns, where they lie; the last write is left for the next call.
template <bool of_channels, class S, class E>
GDN_INLINE void run_in_place(const GdnSteps& c, const Tokens<S>& x, int64_t row, int64_t head,
                             int64_t slot, int64_t j, Write<S, NC, E>& w) {
  const E* state = static_cast<const E*>(c.state) + slot * c.state_row + head * c.state_head + j;
  E* to = static_cast<E*>(c.new_state) + slot * c.new_state_row + head * c.new_state_head + j;
  Read<S, NC, E> r;
  for (int64_t t = 0; t < c.T; ++t) {
    r.state = t ? to : state;
    r.k = x.decayed_k + t * x.Kp;
    r.q = x.decayed_q + t * x.Kp;
    if (!w.to) {
      sweep<of_channels, false, true>(c.K, c.V, w, r);
    } else if (t == 0) {
      sweep<of_channels, true, true>(c.K, c.V, w, r);
    } else {
      sweep<of_channels, true, false>(c.K, c.V, w, r);
      sweep<of_channels, false, true>(c.K, c.V, w, r);
    }
    finish_read(c, x, row, t, head, r, j, block_columns<S>, w);
    w.state = r.state;
    w.to = to;
  }
}

// Write zeros for a row that is skipped.
template <class S>
void skip_row(const GdnSteps& c, int64_t row, int64_t head, S* zeros) {
  for (int64_t i = 0; i < block_columns<S>; ++i) zeros[i] = S(0);
  for (int64_t t = 0; t < c.T; ++t) {
    for (int64_t j = 0; j < c.V; j += block_columns<S>) {
      const int64_t width = least(block_columns<S>, c.V - j);
      narrow(zeros, c.o.data, c.o.type, at(c.o, row, t, head) + j, width);
      for (int64_t i = 0; c.states && i < c.K; ++i) {
        const int64_t place = (((row * c.T + t) * c.HV + head) * c.K + i) * c.V + j;
        narrow(zeros, c.states, c.state_type, place, width);
      }
    }
  }
}

// Value heads first, ..., last - 1 of all B HV of them.
template <bool of_channels, class S, class E>
void run_these_heads(const GdnSteps& c, int64_t first, int64_t last, S* memory) {
  Tokens<S> x = tokens_in(c, memory);
  const bool is_in_place = !c.states && (c.T == 1 || sizeof(E) == sizeof(S));
  Write<S, NC, E> w;
  w.to = nullptr;
  for (int64_t index = first; index < last; ++index) {
    const int64_t row = index / c.HV, head = index % c.HV, slot = c.slots ? c.slots[row] : row;
    if (slot < 0) {
      skip_row(c, row, head, x.o);
      continue;
    }
    read_tokens<S, of_channels>(c, row, head, x);
    int64_t j = 0;
    for (; j + block_columns<S> <= c.V; j += block_columns<S>) {
      if (is_in_place) {
        run_in_place<of_channels, S, E>(c, x, row, head, slot, j, w);
      } else {
        run_in_block<of_channels, S, NC>(c, x, row, head, slot, j);
      }
    }
    for (; j < c.V; j += lanes<S>) run_in_block<of_channels, S, 1>(c, x, row, head, slot, j);
  }
  Read<S, NC, E> nothing;
  if (w.to) sweep<of_channels, true, false>(c.K, c.V, w, nothing);
}

template <class S, class E>
void run_heads(const GdnSteps& c, int64_t first, int64_t last, S* memory) {
  if (c.decay_of_channels) return run_these_heads<true, S, E>(c, first, last, memory);
  run_these_heads<false, S, E>(c, first, last, memory);
}

}  // namespace
