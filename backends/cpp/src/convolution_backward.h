// Gradients of the short convolution, with p_t = sum_j w_j x_{t - taps + 1 + j} + bias:
//
//     d_p = d_y activation'(p)       d_w_j = sum_t d_p_t x_{t - taps + 1 + j}
//     d_bias = sum_t d_p_t           d_x_t = sum_j w_j d_p_{t + taps - 1 - j}
//
// p is formed again. A block gives d_p of its tokens and d_x of tokens taps - 1 earlier, those of
// the inputs before a sequence among them: the gradient of its state.
#pragma once

#include "convolution.h"

namespace {

int64_t convolution_backward_floats(const GdnConvolution& c, int64_t width) {
  return convolution_floats(c, width) + (2 * c.taps + TOKENS + 1) * round_up(width, W);
}

struct Slopes {
  float* d_p;     // [taps - 1 + TOKENS][padded]: d_y, then d_p
  float* sums;    // [taps + 1][padded]: d_w, then d_bias
};

// d_p and d_x of a block, and its part of the sums over tokens.
template <int taps, bool has_silu>
GDN_INLINE void differentiate_block(const Channels& x, const Slopes& d, int64_t count) {
  for (int64_t v = 0; v < x.padded; v += W) {
    const float* in = x.window + v;
    float* slope = d.d_p + v;
    Vec w[taps], held[taps], slopes[taps], d_w[taps], d_bias = {};
    for (int j = 0; j < taps; ++j) {
      w[j] = load(x.taps + j * x.padded + v);
      d_w[j] = Vec{};
    }
    for (int j = 0; j + 1 < taps; ++j) {
      held[j] = load(in + j * x.padded);
      slopes[j] = load(slope + j * x.padded);
    }
    const Vec bias = load(x.bias + v);
    for (int64_t i = 0; i < count; ++i) {
      held[taps - 1] = load(in + (i + taps - 1) * x.padded);
      Vec p = bias, change = load(slope + (i + taps - 1) * x.padded), d_x = {};
      for (int j = 0; j < taps; ++j) p += w[j] * held[j];
      if (has_silu) change = change * silu_slope(p);
      store(slope + (i + taps - 1) * x.padded, change);
      slopes[taps - 1] = change;
      for (int j = 0; j < taps; ++j) d_x += w[j] * slopes[taps - 1 - j];
      store(x.out + i * x.padded + v, d_x);
      for (int j = 0; j < taps; ++j) d_w[j] += change * held[j];
      d_bias += change;
      for (int j = 0; j + 1 < taps; ++j) {
        held[j] = held[j + 1];
        slopes[j] = slopes[j + 1];
      }
    }
    for (int j = 0; j < taps; ++j) {
      float* sum = d.sums + j * x.padded + v;
      store(sum, load(sum) + d_w[j]);
    }
    float* sum = d.sums + taps * x.padded + v;
    store(sum, load(sum) + d_bias);
  }
}

// d_x of `count` rows of d_p, in which the last taps - 1 are those of the tokens before.
GDN_INLINE void spread(const Channels& x, const Slopes& d, int64_t taps, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t v = 0; v < x.padded; v += W) {
      Vec d_x = {};
      for (int64_t j = 0; j < taps; ++j) {
        d_x += load(x.taps + j * x.padded + v) *
               load(d.d_p + (i + taps - 1 - j) * x.padded + v);
      }
      store(x.out + i * x.padded + v, d_x);
    }
  }
}

// The same as `differentiate_block` for any number of taps.
template <bool has_silu>
GDN_INLINE void differentiate_any(const Channels& x, const Slopes& d, int64_t taps,
                                  int64_t count) {
  for (int64_t v = 0; v < x.padded; v += W) {
    for (int64_t i = 0; i < count; ++i) {
      float* slope = d.d_p + (i + taps - 1) * x.padded + v;
      if (has_silu) {
        Vec p = load(x.bias + v);
        for (int64_t j = 0; j < taps; ++j) {
          p += load(x.taps + j * x.padded + v) * load(x.window + (i + j) * x.padded + v);
        }
        store(slope, load(slope) * silu_slope(p));
      }
    }
    for (int64_t j = 0; j <= taps; ++j) {
      Vec part = {};
      for (int64_t i = 0; i < count; ++i) {
        const Vec change = load(d.d_p + (i + taps - 1) * x.padded + v);
        part += j < taps ? change * load(x.window + (i + j) * x.padded + v) : change;
      }
      float* sum = d.sums + j * x.padded + v;
      store(sum, load(sum) + part);
    }
  }
  spread(x, d, taps, count);
}

void differentiate(const GdnConvolution& c, const Channels& x, const Slopes& d, int64_t count) {
  if (c.taps == 4) {
    if (c.has_silu) return differentiate_block<4, true>(x, d, count);
    return differentiate_block<4, false>(x, d, count);
  }
  if (c.has_silu) return differentiate_any<true>(x, d, c.taps, count);
  differentiate_any<false>(x, d, c.taps, count);
}

// Write d_x of `count` tokens from `token` on, negative ones to the state; `final` adds its part.
void store_slopes(const GdnConvolution& c, const GdnConvolutionGradients& to, const Channels& x,
                  const Sequence& s, int64_t token, int64_t count, float* row) {
  const int64_t reach = c.taps - 1, kept = s.end - s.first - reach;
  for (int64_t i = 0; i < count; ++i, ++token) {
    float* d_x = x.out + i * x.padded;
    if (to.d_final.data && token >= kept && token < kept + reach) {
      const int64_t from = place(to.d_final, s.n, token - kept, x.first);
      read_row(to.d_final, from, x.width, x.padded, row);
      for (int64_t v = 0; v < x.padded; v += W) store(d_x + v, load(d_x + v) + load(row + v));
    }
    if (token < 0) {
      const int64_t at = place(to.d_state, s.n, reach + token, x.first);
      if (to.d_state.data) write_block(d_x, 1, x.width, x.padded, to.d_state, at);
    } else if (to.d_x.data) {
      const int64_t at = place(to.d_x, s.row, s.first + token, x.first);
      write_block(d_x, 1, x.width, x.padded, to.d_x, at);
    }
  }
}

void run_convolution_backward(const GdnConvolution& c, const GdnConvolutionGradients& to,
                              int64_t first, int64_t width, float* memory) {
  Channels x;
  Slopes d;
  float* rest = load_channels(c, first, width, memory, x);
  const int64_t reach = c.taps - 1, P = x.padded;
  d.d_p = rest;
  d.sums = d.d_p + (reach + TOKENS) * P;
  float* row = d.sums + (c.taps + 1) * P;
  memset(d.sums, 0, size_t((c.taps + 1) * P) * 4);
  for (int64_t n = 0; n < c.N; ++n) {
    const Sequence s = sequence_of(c, n);
    load_past(c, x, s, 0);
    memset(d.d_p, 0, size_t(reach * P) * 4);
    for (int64_t token = s.first; token < s.last; token += TOKENS) {
      const int64_t count = least(TOKENS, s.last - token);
      read_block(c.x, place(c.x, s.row, token, first), count, x.width, P, x.window + reach * P);
      read_block(to.d_y, place(to.d_y, s.row, token, first), count, x.width, P,
                 d.d_p + reach * P);
      differentiate(c, x, d, count);
      store_slopes(c, to, x, s, token - s.first - reach, count, row);
      move_back(x.window, reach, count, P);
      move_back(d.d_p, reach, count, P);
    }
    // The last tokens, which reach no later ones.
    for (int64_t left = reach, token = s.last - s.first - reach; left > 0; left -= TOKENS) {
      const int64_t count = least(TOKENS, left);
      memset(d.d_p + reach * P, 0, size_t(count * P) * 4);
      spread(x, d, c.taps, count);
      store_slopes(c, to, x, s, token, count, row);
      move_back(d.d_p, reach, count, P);
      token += count;
    }
  }
  for (int64_t i = 0; i < x.width; ++i) {
    for (int64_t j = 0; j < c.taps; ++j) {
      to.d_weight[(first + i) * c.taps + j] = d.sums[j * P + i];
    }
    to.d_bias[first + i] = d.sums[c.taps * P + i];
  }
}

}  // namespace
