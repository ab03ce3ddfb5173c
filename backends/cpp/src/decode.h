// A few tokens of one value head: the state is read once and written once (docs/math.md §2).
#pragma once

#include "chunk.h"

namespace {

constexpr int NC = GDN_COLUMN_VECTORS;
constexpr int COLUMNS = NC * W;  // columns of a block: its K rows fit the first-level cache

int64_t decode_floats(const GdnSteps& c) {
  return c.T * (2 * round_up(c.K, 16) + 3) + 2 * round_up(c.V, COLUMNS) + c.K * COLUMNS + 64;
}

// Keys, queries and gates of the tokens of one value head.
struct Decoded {
  float *k, *q;                // [T][Kp], q times the scale
  float *alpha, *beta, *qk;    // [T]; qk is q . k
  int64_t Kp;
};

void load_tokens(const GdnSteps& c, int64_t row, int64_t head, Decoded& x) {
  const int64_t key_head = head / (c.HV / c.H);
  for (int64_t t = 0; t < c.T; ++t) {
    float *k = x.k + t * x.Kp, *q = x.q + t * x.Kp;
    widen(c.k.data, c.k.type, at(c.k, row, t, key_head), k, c.K);
    widen(c.q.data, c.q.type, at(c.q, row, t, key_head), q, c.K);
    for (int64_t i = c.K; i < x.Kp; ++i) k[i] = q[i] = 0.0f;
    float factor = c.scale;
    if (c.qk_l2norm) {
      multiply(k, inverse_norm(k, x.Kp), x.Kp);
      factor *= inverse_norm(q, x.Kp);
    }
    multiply(q, factor, x.Kp);
    Vec products = {};
    for (int64_t i = 0; i < x.Kp; i += W) products += load(q + i) * load(k + i);
    x.qk[t] = sum(products);
    float alpha = 1.0f;
    if (c.decay.data) {
      alpha = number(c.decay, at(c.decay, row, t, head));
      if (c.decay_is_log) alpha = __builtin_expf(alpha);
    }
    x.alpha[t] = alpha;
    x.beta[t] = c.beta.data ? number(c.beta, at(c.beta, row, t, head)) : 1.0f;
  }
}

// One token of N vectors of columns, rows `stride` apart; new_state may be state.
template <int N>
GDN_INLINE void advance(const float* state, int64_t stride, float* new_state, int64_t new_stride,
                        const GdnSteps& c, const Decoded& x, int64_t t, const float* v, float* o) {
  const float *k = x.k + t * x.Kp, *q = x.q + t * x.Kp;
  const Vec alpha = all(x.alpha[t]);
  Vec read[N], asked[N], u[N];
  for (int n = 0; n < N; ++n) read[n] = asked[n] = Vec{};
  // S^T k and S^T q
  for (int64_t i = 0; i < c.K; ++i) {
    const Vec k_i = all(k[i]), q_i = all(q[i]);
    for (int n = 0; n < N; ++n) {
      const Vec s = load(state + i * stride + n * W);
      read[n] += k_i * s;
      asked[n] += q_i * s;
    }
  }
  // u = beta (v - alpha S^T k),  o = alpha S^T q + (q . k) u
  for (int n = 0; n < N; ++n) {
    u[n] = load(v + n * W);
    if (c.has_erase) u[n] -= read[n] * alpha;
    u[n] *= all(x.beta[t]);
    store(o + n * W, asked[n] * alpha + u[n] * all(x.qk[t]));
  }
  // S = alpha S + k u^T
  for (int64_t i = 0; i < c.K; ++i) {
    const Vec k_i = all(k[i]);
    for (int n = 0; n < N; ++n) {
      const Vec s = load(state + i * stride + n * W) * alpha;
      store(new_state + i * new_stride + n * W, s + k_i * u[n]);
    }
  }
}

// All tokens of N vectors of columns from column j on. A 16-bit state, or the last columns where
// they fill no vector, are worked on in `block`.
template <int N>
GDN_INLINE void run_columns(const GdnSteps& c, const Decoded& x, int64_t row, int64_t head,
                            int64_t slot, int64_t j, float* v, float* o, float* block) {
  const int64_t K = c.K, V = c.V, width = least(N * W, V - j), stride = N * W;
  const int64_t from = slot * c.state_row + head * c.state_head + j;
  const int64_t to = slot * c.new_state_row + head * c.new_state_head + j;
  const bool is_direct = c.state_type == kGdnFloat32 && width == stride;
  if (!is_direct) {
    for (int64_t i = 0; i < K; ++i) {
      float* into = block + i * stride;
      widen(c.state, c.state_type, from + i * V, into, width);
      for (int64_t l = width; l < stride; ++l) into[l] = 0.0f;
    }
  }
  float* held = is_direct ? static_cast<float*>(c.new_state) + to : block;
  const int64_t held_stride = is_direct ? V : stride;
  for (int64_t t = 0; t < c.T; ++t) {
    widen(c.v.data, c.v.type, at(c.v, row, t, head) + j, v, width);
    for (int64_t l = width; l < stride; ++l) v[l] = 0.0f;
    const float* before = held;
    if (is_direct && t == 0) before = static_cast<const float*>(c.state) + from;
    advance<N>(before, held_stride, held, held_stride, c, x, t, v, o);
    narrow(o, c.o.data, c.o.type, at(c.o, row, t, head) + j, width);
    for (int64_t i = 0; c.states && i < K; ++i) {
      const int64_t place = (((row * c.T + t) * c.HV + head) * K + i) * V + j;
      narrow(held + i * held_stride, c.states, c.state_type, place, width);
    }
  }
  for (int64_t i = 0; !is_direct && i < K; ++i) {
    narrow(block + i * stride, c.new_state, c.state_type, to + i * V, width);
  }
}

// Write zeros for a row that is skipped.
void skip_row(const GdnSteps& c, int64_t row, int64_t head, float* zeros) {
  for (int64_t i = 0; i < c.V; ++i) zeros[i] = 0.0f;
  for (int64_t t = 0; t < c.T; ++t) {
    narrow(zeros, c.o.data, c.o.type, at(c.o, row, t, head), c.V);
    for (int64_t i = 0; c.states && i < c.K; ++i) {
      const int64_t place = (((row * c.T + t) * c.HV + head) * c.K + i) * c.V;
      narrow(zeros, c.states, c.state_type, place, c.V);
    }
  }
}

void run_decode(const GdnSteps& c, int64_t row, int64_t head, float* memory) {
  Decoded x;
  x.Kp = round_up(c.K, 16);
  x.k = memory;
  x.q = x.k + c.T * x.Kp;
  float* v = x.q + c.T * x.Kp;
  float* o = v + round_up(c.V, COLUMNS);
  float* block = o + round_up(c.V, COLUMNS);
  x.alpha = block + c.K * COLUMNS;
  x.beta = x.alpha + c.T;
  x.qk = x.beta + c.T;
  const int64_t slot = c.slots ? c.slots[row] : row;
  if (slot < 0) {
    skip_row(c, row, head, o);
    return;
  }
  load_tokens(c, row, head, x);
  int64_t j = 0;
  for (; j + COLUMNS <= c.V; j += COLUMNS) run_columns<NC>(c, x, row, head, slot, j, v, o, block);
  for (; j < c.V; j += W) run_columns<1>(c, x, row, head, slot, j, v, o, block);
}

}  // namespace
