// The backward of one key head of one sequence (docs/math.md §5), a run of chunks after another from
// the last: the states inside a run are formed anew from the one that the forward kept.
#pragma once

#include "backward_channels.h"

namespace {

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

// Load the keys of a run of chunks, and clear their gradients.
void load_run(const GdnSequences& c, const Task& t, const Backward& w, int64_t first,
              int64_t last) {
  const int64_t Kp = padded(c.K);
  for (int64_t token = first, e = 0; token < last; token += C, ++e) {
    const int64_t count = least(C, last - token);
    Keys x;
    x.k_t = w.run.k_t + e * C * Kp;
    x.q_t = w.run.q_t + e * C * Kp;
    x.products = w.run.products + e * 2 * C * C;
    if (has_channels(c)) {
      load_key_rows(c, t, token, count, Kp, x.k_t, x.q_t, x);
    } else {
      load_keys(c, t, token, count, Kp, w.rows, x);
      multiply_keys(count, c.K, x, c.has_erase);
    }
    memcpy(w.run.inverse + e * 2 * C, x.inverse_k, C * 4);
    memcpy(w.run.inverse + e * 2 * C + C, x.inverse_q, C * 4);
    memset(w.run.d_k + e * C * Kp, 0, size_t(C * Kp) * 4);
    memset(w.run.d_q + e * C * Kp, 0, size_t(C * Kp) * 4);
  }
}

// Write the gradients of q and k of a run of chunks, or this part of them.
void store_run(const GdnSequences& c, const GdnGradients& to, const Task& t, const Sums& sums,
               const Backward& w, int64_t first, int64_t last) {
  const int64_t Kp = padded(c.K);
  float *d_k = w.rows, *d_q = w.rows + C * Kp;
  for (int64_t token = first, e = 0; token < last; token += C, ++e) {
    const int64_t count = least(C, last - token);
    const float* inverse = w.run.inverse + e * 2 * C;
    if (has_channels(c)) {
      d_k = w.run.d_k + e * C * Kp;
      d_q = w.run.d_q + e * C * Kp;
    } else {
      transpose(w.run.d_k + e * C * Kp, C, d_k, Kp, Kp, C);
      transpose(w.run.d_q + e * C * Kp, C, d_q, Kp, Kp, C);
    }
    for (int64_t i = 0; sums.d_k && i < count; ++i) {
      const int64_t place = ((t.row * c.T + token + i) * c.H + t.head) * c.K;
      memcpy(sums.d_k + place, d_k + i * Kp, size_t(c.K) * 4);
      memcpy(sums.d_q + place, d_q + i * Kp, size_t(c.K) * 4);
    }
    if (sums.d_k) continue;
    store_keys(c, t, token, count, d_k, inverse, 1.0f, c.k, to.d_k);
    store_keys(c, t, token, count, d_q, inverse + C, c.scale, c.q, to.d_q);
  }
}

// Add what the parts of a key head left: value heads in `values` shares, columns in `columns`.
void add_sums(const GdnSequences& c, const GdnGradients& to, const Task& t, float* sums,
              int64_t values, int64_t columns, float* memory) {
  const int64_t Kp = padded(c.K), parts = values * columns, R = c.HV / c.H;
  Backward w;
  take_backward(c, memory, w);
  float inverse[1] = {}, *rows[2] = {w.rows, w.rows + Kp}, *x_row = w.rows + 2 * Kp;
  for (int64_t token = t.first; token < t.last; ++token) {
    const int64_t place = ((t.row * c.T + token) * c.H + t.head) * c.K;
    memset(w.rows, 0, size_t(2 * Kp) * 4);
    for (int64_t part = 0; part < parts; ++part) {
      const Sums x = sums_of(c, sums, parts, part);
      for (int64_t i = 0; i < c.K; ++i) {
        rows[0][i] += x.d_k[place + i];
        rows[1][i] += x.d_q[place + i];
      }
    }
    for (int is_q = 0; is_q < 2; ++is_q) {
      const GdnArray& given = is_q ? c.q : c.k;
      if (c.qk_l2norm) {
        memset(x_row, 0, size_t(Kp) * 4);
        widen(given.data, given.type, at(given, t.row, token, t.head), x_row, c.K);
        inverse[0] = inverse_norm(x_row, Kp);
      }
      store_keys(c, t, token, 1, rows[is_q], inverse, is_q ? c.scale : 1.0f, given,
                 is_q ? to.d_q : to.d_k);
    }
    for (int64_t r = 0; r < R; ++r) {
      const int64_t head = t.head * R + r, gate = (t.row * c.T + token) * c.HV + head;
      // The share that value head r belongs to.
      int64_t value = 0;
      while ((value + 1) * R / values <= r) ++value;
      const auto add = [&](const GdnArray& x, float* Sums::*of, int64_t width) {
        if (!x.data) return;
        float* data = static_cast<float*>(x.data) + at(x, t.row, token, head);
        for (int64_t i = 0; i < width; ++i) {
          float total = 0.0f;
          for (int64_t column = 0; column < columns; ++column) {
            total += (sums_of(c, sums, parts, value * columns + column).*of)[gate * width + i];
          }
          data[i] = total;
        }
      };
      add(to.d_decay, &Sums::d_decay, decay_width(c));
      add(to.d_beta, &Sums::d_beta, 1);
    }
  }
}

// Without d_q only the gradient of the initial state is formed: nothing is read of the states.
template <bool of_channels>
void run_backward_of(const GdnSequences& c, const GdnGradients& to, const Task& t, const Sums& sums,
                  float* memory) {
  const bool asks_all = to.d_q.data;
  const int64_t K = c.K, V = c.V, Kp = padded(K), R = c.HV / c.H, size = t.panels * P * Kp;
  const int64_t span = C * c.chunks_per_state;
  Backward w;
  take_backward(c, memory, w);
  for (int64_t r = 0; r < t.values; ++r) {
    const int64_t head = t.head * R + t.value + r;
    load_state(to.d_final + (t.n * c.HV + head) * K * V, K, V, Kp, t, w.d_S + r * size);
    w.faint_ends()[r] = t.first;
    if (to.d_initial && c.decay_of_channels) {
      w.faint_ends()[r] = faint_end_of_channels(c, to.d_o, t, head, w.rows);
    } else if (to.d_initial) {
      w.faint_ends()[r] = faint_end(c, to.d_o, t, head);
    }
  }
  const int64_t slot = t.row * (c.T / span) + t.first / span;
  const int64_t runs = (t.last - t.first + span - 1) / span;
  for (int64_t run = runs; run-- > 0;) {
    const int64_t first = t.first + run * span, last = least(first + span, t.last);
    const int64_t chunks = (last - first + C - 1) / C;
    load_run(c, t, w, first, last);
    for (int64_t r = 0; r < t.values; ++r) {
      const auto chunk = [&](int64_t e) { return chunk_of(c, to, t, sums, w, first, last, e, r); };
      if (!asks_all) {
        for (int64_t e = chunks; e-- > 0;) {
          of_channels ? run_channels_start(chunk(e)) : run_start(chunk(e));
        }
        continue;
      }
      const int64_t head = t.head * R + t.value + r;
      const float* start = c.initial ? c.initial + (t.n * c.HV + head) * K * V : nullptr;
      if (run) start = c.states + ((slot + run - 1) * c.HV + head) * K * V;
      load_state(start, K, V, Kp, t, w.run.S);
      for (int64_t e = 0; e < chunks; ++e) {
        const Chunk x = chunk(e);
        float* next = e + 1 < chunks ? x.S + size : nullptr;
        of_channels ? run_channels_again(x, next) : run_again(x, next);
      }
      for (int64_t e = chunks; e-- > 0;) {
        of_channels ? run_channels_back(chunk(e)) : run_back(chunk(e));
      }
    }
    if (asks_all) store_run(c, to, t, sums, w, first, last);
  }
  for (int64_t r = 0; to.d_initial && r < t.values; ++r) {
    float* state = to.d_initial + (t.n * c.HV + t.head * R + t.value + r) * K * V;
    store_state(w.d_S + r * size, K, V, Kp, t, state);
  }
  end_streams();
}

void run_backward(const GdnSequences& c, const GdnGradients& to, const Task& t, const Sums& sums,
                  float* memory) {
  if (has_channels(c)) return run_backward_of<true>(c, to, t, sums, memory);
  run_backward_of<false>(c, to, t, sums, memory);
}

}  // namespace
