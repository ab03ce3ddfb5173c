// The forward of one key head of one sequence (docs/math.md §3): the state never leaves the caches.
#pragma once

#include "channels.h"

namespace {

// Rows of K as they are kept: products write whole register blocks and panels of them.
GDN_INLINE int64_t padded(int64_t K) { return round_up(K, P > 16 ? P : 16); }

int64_t forward_floats(const GdnSequences& c, int64_t panels) {
  const int64_t Kp = padded(c.K), R = c.HV / c.H;
  const int64_t more = has_channels(c) ? decayed_floats(c, Kp) : 0;
  return 4 * C * Kp + 4 * C * C + C * panels * P + C * P + R * panels * (Kp * P + 1) + 9 * 16 +
         more;
}

GDN_INLINE void copy_panel(const float* from, float* to) {
  for (int n = 0; n < NV; ++n) store(to + n * W, load(from + n * W));
}

// state (K, V) of a head <-> panels [Kp][P] of its columns.
void load_state(const float* state, int64_t K, int64_t V, int64_t Kp, const Task& t, float* S) {
  const int64_t size = Kp * P, first = t.panel * P;
  const int64_t whole = state ? least(t.panels, (V - first) / P) : 0;
  memset(S + whole * size, 0, size_t((t.panels - whole) * size) * 4);
  for (int64_t p = 0; p < whole; ++p) memset(S + p * size + K * P, 0, size_t((Kp - K) * P) * 4);
  // A row after another, as they lie.
  for (int64_t i = 0; state && i < K; ++i) {
    const float* row = state + i * V + first;
    for (int64_t p = 0; p < whole; ++p) copy_panel(row + p * P, S + p * size + i * P);
    if (whole < t.panels) {
      memcpy(S + whole * size + i * P, row + whole * P, size_t(V - first - whole * P) * 4);
    }
  }
}

void store_state(const float* S, int64_t K, int64_t V, int64_t Kp, const Task& t, float* state) {
  const int64_t size = Kp * P, first = t.panel * P, whole = least(t.panels, (V - first) / P);
  for (int64_t i = 0; i < K; ++i) {
    float* row = state + i * V + first;
    for (int64_t p = 0; p < whole; ++p) copy_panel(S + p * size + i * P, row + p * P);
    if (whole < t.panels) {
      memcpy(row + whole * P, S + whole * size + i * P, size_t(V - first - whole * P) * 4);
    }
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

// Scale a panel of a state without outputs, so that it is in range while it is only mapped: it may
// decay below all numbers, and subnormal ones take a hundred times as long. `powers` counts factors
// of 2^64 that it is multiplied by; `values` are those of the chunk, rows of ldv.
GDN_INLINE void keep_in_range(float* S, int64_t size, const float* values, int64_t ldv,
                              int64_t count, float& powers) {
  constexpr float kFaint = 0x1p-64f, kFactor = 0x1p64f;
  float most = largest(S, size);
  if (!(most < kFaint) && powers == 0.0f) return;
  bool is_mapped = true;
  for (int64_t i = 0; i < count && is_mapped; ++i) is_mapped = largest(values + i * ldv, P) == 0.0f;
  for (; is_mapped && most > 0.0f && most < kFaint; most *= kFactor, powers += 1.0f) {
    multiply(S, kFactor, size);
  }
  for (; powers > 0.0f && (!is_mapped || most > 1.0f); most /= kFactor, powers -= 1.0f) {
    multiply(S, kFaint, size);
  }
}

// Undo the scaling of all panels.
void restore_range(const Task& t, const States& x, float* powers) {
  for (int64_t i = 0; i < x.R * t.panels; ++i) {
    for (; powers[i] > 0.0f; powers[i] -= 1.0f) {
      multiply(x.S + i * x.Kp * P, 0x1p-64f, x.Kp * P);
    }
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
  for (int64_t i = 0; i < reach_of(count); ++i, to += stride) {
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

// Cache lines of another chunk, which are asked for while this one is multiplied: rows of a tensor
// lie pages apart, where no processor looks ahead by itself.
struct Lines {
  static constexpr int64_t kMost = 64;
  const char* of[kMost];
  int64_t count = 0;

  GDN_INLINE void add(const GdnArray& x, int64_t index, int64_t columns) {
    const int64_t size = x.type == kGdnFloat32 ? 4 : 2;
    const char* row = static_cast<const char*>(x.data) + index * size;
    for (int64_t j = 0; j < columns * size && count < kMost; j += 64) of[count++] = row + j;
  }
};

// What is asked for while the tiles of a chunk of one value head are formed: a share with each.
struct Ahead {
  const GdnSequences& c;
  const Task& t;
  const GdnArray& values;  // of which a tile asks for its own rows and columns
  int64_t token, head;     // the first of these rows, and their head
  int64_t key_token;       // the first row of k and q
  int64_t r;               // tiles of value head r of the key head

  GDN_INLINE Lines tile(int64_t p, int64_t m) const {
    Lines lines;
    const int64_t column = (t.panel + p) * P, width = least(P, c.V - column);
    for (int64_t i = token + m; i < least(token + m + MR, t.last) && i >= t.first; ++i) {
      lines.add(values, at(values, t.row, i, head) + column, width);
    }
    const int64_t tiles = c.HV / c.H * t.panels * (C / MR);
    const int64_t own = (r * t.panels + p) * (C / MR) + m / MR;
    const int64_t first = key_token + own * C / tiles, last = key_token + (own + 1) * C / tiles;
    for (int64_t i = first; i < least(last, t.last) && i >= t.first; ++i) {
      lines.add(c.k, at(c.k, t.row, i, t.head), c.K);
      lines.add(c.q, at(c.q, t.row, i, t.head), c.K);
    }
    if (c.decay_of_channels) add_decays(lines, p, m);
    return lines;
  }

  // Those of a value head are its own.
  void add_decays(Lines& lines, int64_t p, int64_t m) const {
    const int64_t tiles = t.panels * (C / MR), own = p * (C / MR) + m / MR;
    const int64_t first = token + own * C / tiles, last = token + (own + 1) * C / tiles;
    for (int64_t i = first; i < least(last, t.last) && i >= t.first; ++i) {
      lines.add(c.decay, at(c.decay, t.row, i, head), c.K);
    }
  }
};

// acc = A B of a block of columns of A [depth][C], with a line asked for every few steps: all of
// them at once would wait for one another.
GDN_INLINE void multiply_fetching(Block& acc, const float* a, const float* b, int64_t depth,
                                  const Lines& lines) {
  constexpr int64_t kSteps = 4;
  const int64_t parts = (depth + kSteps - 1) / kSteps, each = (lines.count + parts - 1) / parts;
  int64_t line = 0;
  clear(acc);
  for (int64_t k = 0; k < depth; k += kSteps) {
    for (int64_t x = 0; x < each && line < lines.count; ++x) __builtin_prefetch(lines.of[line++]);
    multiply_add(acc, a + k * C, 1, C, b + k * P, P, least(kSteps, depth - k));
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

// U of one panel (§3): the writes of a chunk. With `erased` V - diag(b) K S is kept there. lines(m)
// is asked for with the rows from m on.
template <class LinesOf>
GDN_INLINE void form_writes(const GdnSequences& c, const Keys& x, const Gates& g, int64_t count,
                            const float* A, const float* S, const float* values, int64_t ldv,
                            float* U, int64_t ldu, float* erased, const LinesOf& lines) {
  for (int64_t m = 0; m < count; m += MR) {
    Block acc;
    clear(acc);
    if (c.has_erase) multiply_fetching(acc, x.k_t + m, S, c.K, lines(m));
    for (int i = 0; i < MR; ++i) {
      for (int n = 0; n < NV; ++n) {
        const Vec left = load(values + (m + i) * ldv + n * W) - acc[i][n] * all(g.b[m + i]);
        if (erased) store(erased + (m + i) * ldu + n * W, left);
        acc[i][n] = left * all(g.beta[m + i]);
      }
    }
    if (c.has_erase) solve_block(acc, A, U, ldu, m);
    store_block(acc, U + m * ldu, ldu);
  }
}

// next = end S + K^T diag(d) U of one panel; `scaled` [C][P] is scratch, and `next` may be S.
GDN_INLINE void advance_state(const Keys& x, const Gates& g, int64_t count, int64_t K,
                              const float* U, int64_t ldu, float* scaled, const float* S,
                              float* next) {
  for (int64_t i = 0; i < count; ++i) {
    for (int n = 0; n < NV; ++n) {
      store(scaled + i * P + n * W, load(U + i * ldu + n * W) * all(g.d[i]));
    }
  }
  for (int64_t m = 0; m < K; m += MR) {
    Block acc;
    for (int i = 0; i < MR; ++i) {
      for (int n = 0; n < NV; ++n) acc[i][n] = load(S + (m + i) * P + n * W) * all(g.end);
    }
    multiply_add(acc, x.k_t + m * C, C, 1, scaled, P, count);
    store_block(acc, next + m * P, P);
  }
}

// Columns of a chunk of values: where a tile is read from or written to.
struct Columns {
  float* data;
  int64_t ld;
  bool passes_caches;

  GDN_INLINE void store(const Block& acc, int64_t row, int64_t panel) const {
    float* to = data + row * ld + panel * P;
    if (passes_caches) {
      stream_block(acc, to, ld);
    } else {
      store_block(acc, to, ld);
    }
  }
};

constexpr int64_t kStreamed = 1 << 23;  // bytes: more than a core holds for who reads them next

// Whether a result is large enough to be written past the caches: nothing is read of lines that are
// overwritten. Its rows of a tile are whole lines.
GDN_INLINE bool passes_caches(const GdnSequences& c, const GdnArray& x) {
  const int64_t rows = c.starts ? 1 : c.N, bytes = rows * c.T * c.HV * c.V * 4;
  const uint64_t strides = uint64_t(x.row) | uint64_t(x.token) | uint64_t(x.head);
  return has_streams && bytes >= kStreamed && strides % 16 == 0 && uintptr_t(x.data) % 64 == 0;
}

// Whether whole blocks of float32 can be read or written where they are.
GDN_INLINE bool lies_in_tiles(const GdnArray& x, int64_t V, int64_t count) {
  return x.type == kGdnFloat32 && V % P == 0 && count % MR == 0;
}

GDN_INLINE Columns columns_of(const GdnArray& x, const Task& t, int64_t token, int64_t head) {
  float* data = static_cast<float*>(x.data) + at(x, t.row, token, head) + t.panel * P;
  return {data, x.token, false};
}

// Without o only the states are formed: the same bits, and nothing is read of q.
template <bool of_channels>
void run_forward_of(const GdnSequences& c, const Task& t, float* memory) {
  const int64_t K = c.K, V = c.V, Kp = padded(K), R = c.HV / c.H;
  const int64_t size = t.panels * Kp * P;
  const bool has_outputs = c.o.data;
  Arena arena{memory};
  Keys x;
  x.k_t = arena.take(C * Kp);
  x.q_t = has_outputs ? arena.take(C * Kp) : nullptr;
  x.products = arena.take(2 * C * C);
  float *A = arena.take(C * C), *M = has_outputs ? arena.take(C * C) : nullptr;
  float *pairs = has_outputs ? M : x.products, *U = arena.take(C * P);
  float *rows = arena.take(2 * C * Kp), *values = arena.take(C * t.panels * P);
  float* S = arena.take(R * size);
  float* powers = arena.take(R * t.panels);
  DecayedKeys decayed = {};
  Keys keys = x;
  if (of_channels) {
    take_decayed(c, arena, Kp, decayed);
    decayed.k = rows;
    decayed.q = has_outputs ? rows + C * Kp : rows;
    keys.k_t = decayed.k_t;
    keys.q_t = decayed.q_t;
  }
  memset(powers, 0, size_t(R * t.panels) * 4);
  const States states{S, Kp, R, size};
  load_states(c, t, states);
  const bool are_streamed = has_outputs && passes_caches(c, c.o);
  int64_t chunk = 0;
  for (int64_t token = t.first; token < t.last; token += C, ++chunk) {
    const int64_t count = least(C, t.last - token);
    keep_states(c, t, states, chunk);
    if (of_channels) {
      load_key_rows(c, t, token, count, Kp, rows, has_outputs ? rows + C * Kp : nullptr, x);
    } else {
      load_keys(c, t, token, count, Kp, rows, x);
      multiply_keys(count, K, x, c.has_erase);
    }
    for (int64_t r = 0; r < R; ++r) {
      const int64_t head = t.head * R + r;
      Gates g;
      if (of_channels) {
        load_decays(c, t, token, count, head, Kp, decayed, g);
        load_erased(c, t, token, count, head, Kp, decayed);
      } else {
        load_gates(c, t, token, count, head, g);
      }
      bool may_flush = sizes_of(c, t, token, count, head, g).may_flush;
      // Faint decays are multiplied into keys here that meet the state later.
      if (of_channels) may_flush = may_flush && is_ordinary(S + r * size, size);
      with_flushing(may_flush, [&] {
        if (of_channels) {
          form_channels(decayed, count, Kp, A, pairs);
          scale_pairs(g, count, A, A);
          forget_decays(g);
        } else {
          form_pairs<false>(g, x.products, count, A, M, nullptr, c.has_erase);
        }
      });
      const bool is_direct =
          !c.is_apart && lies_in_tiles(c.v, V, count) && (!has_outputs || lies_in_tiles(c.o, V, count));
      const Ahead ahead{c, t, c.v, token + C, head, token + C, r};
      Columns from{values, t.panels * P, false}, to = from;
      if (is_direct) {
        from = columns_of(c.v, t, token, head);
        if (has_outputs) to = columns_of(c.o, t, token, head);
        to.passes_caches = are_streamed;
      } else {
        load_values(c.v, t, token, count, head, V, values);
        if (c.is_apart) scale_values(c, t, token, count, head, t.panels * P, values);
      }
      for (int64_t p = 0; p < t.panels; ++p) {
        float* state = S + r * size + p * Kp * P;
        if (!has_outputs) {
          keep_in_range(state, Kp * P, from.data + p * P, from.ld, count, powers[r * t.panels + p]);
        }
        const Flushed flushed(may_flush && is_ordinary(state, Kp * P));
        form_writes(c, keys, g, count, A, state, from.data + p * P, from.ld, U, P, nullptr,
                    [&](int64_t m) { return has_outputs ? Lines{} : ahead.tile(p, m); });
        for (int64_t m = 0; has_outputs && m < count; m += MR) {
          Block acc;
          multiply_fetching(acc, keys.q_t + m, state, K, ahead.tile(p, m));
          scale_rows(acc, g.b + m);
          multiply_add(acc, M + m * C, C, 1, U, P, m + MR);
          to.store(acc, m, p);
        }
        if (of_channels) {
          advance_channels(decayed, count, K, U, P, state, state);
        } else {
          advance_state(x, g, count, K, U, P, U, state, state);
        }
      }
      if (has_outputs && !is_direct) store_values(values, t, token, count, head, V, c.o);
    }
  }
  restore_range(t, states, powers);
  store_states(c, t, states, c.final, t.n);
  end_streams();
}

void run_forward(const GdnSequences& c, const Task& t, float* memory) {
  if (has_channels(c)) return run_forward_of<true>(c, t, memory);
  run_forward_of<false>(c, t, memory);
}

}  // namespace
