// One token of a layer: convolution, gates, rule and gated norm of one key head after another. No
// key head needs another one, so that a call is one parallel region, and all of a token but its
// projections stays in float32.
#pragma once

#include "convolution.h"
#include "decode.h"
#include "norm.h"
#include "raw_decays.h"

namespace {

// The call of the rule for the value heads of one key head, on rows of float32.
GdnSteps token_steps(const GdnToken& c) {
  GdnSteps s = {};
  s.B = s.T = s.H = 1;
  s.HV = c.R;
  s.K = c.K;
  s.V = c.V;
  s.state_head = c.state_head;
  s.new_state_head = c.new_state_head;
  s.state_type = c.state_type;
  s.decay_is_log = 1;
  s.decay_of_channels = c.decay_of_channels;
  s.has_erase = c.has_erase;
  s.qk_l2norm = c.qk_l2norm;
  s.scale = c.scale;
  s.threads = 1;
  return s;
}

GDN_INLINE int64_t decode_memory(const GdnSteps& s) { return decode_numbers<float>(s); }

GDN_INLINE void decode_heads(const GdnSteps& s, float* memory) {
  if (s.state_type == kGdnFloat32) return run_heads<float, float>(s, 0, s.HV, memory);
  if (s.state_type == kGdnBfloat16) return run_heads<float, Bfloat16>(s, 0, s.HV, memory);
  run_heads<float, Float16>(s, 0, s.HV, memory);
}

// Rows of one key head, and memory to form them in.
struct TokenRows {
  float *q, *k, *v, *o, *log_alpha, *beta;  // [K], [K], [R][V], [R][V], [R][decay_width], [R]
  float* rest;
};

// Numbers from the decay of one value head to that of the next.
GDN_INLINE int64_t decay_width(const GdnToken& c) {
  return c.decay_of_channels ? round_up(c.K, 16) : 1;
}

TokenRows token_rows(const GdnToken& c, float* memory) {
  TokenRows x;
  x.q = memory;
  x.k = x.q + round_up(c.K, 16);
  x.v = x.k + round_up(c.K, 16);
  x.o = x.v + round_up(c.R * c.V, 16);
  x.log_alpha = x.o + round_up(c.R * c.V, 16);
  x.beta = x.log_alpha + round_up(c.R * decay_width(c), 16);
  x.rest = x.beta + round_up(c.R, 16);
  return x;
}

int64_t token_floats(const GdnToken& c) {
  GdnConvolution convolution = {};
  convolution.taps = c.taps;
  GdnNorm norm = {};
  norm.width = c.V;
  const int64_t gates = round_up(c.R * decay_width(c), 16) + round_up(c.R, 16);
  const int64_t own = 2 * (round_up(c.K, 16) + round_up(c.R * c.V, 16)) + gates;
  const int64_t widest = c.K > c.V ? c.K : c.V;
  int64_t most = convolution_floats(convolution, widest);
  if (norm_floats(norm) > most) most = norm_floats(norm);
  if (decode_memory(token_steps(c)) > most) most = decode_memory(token_steps(c));
  if (decay_width(c) > most) most = decay_width(c);
  return own + most;
}

GDN_INLINE void* moved(const GdnArray& x, int64_t elements) {
  if (!x.data) return nullptr;
  return static_cast<char*>(x.data) + elements * (x.type == kGdnFloat32 ? 4 : 2);
}

GDN_INLINE GdnArray from(const GdnArray& x, int64_t elements) {
  GdnArray there = x;
  there.data = moved(x, elements);
  return there;
}

// `width` channels of the projection at an element, convolved and activated, as float32.
void form_row(const GdnToken& c, const GdnArray& x, int64_t element, int64_t row, int64_t channel,
              int64_t width, bool has_silu, float* to, float* memory) {
  GdnConvolution one = {};
  one.x = from(x, element);
  one.x.head = 1;
  one.y = {to, 0, 0, 1, kGdnFloat32};
  one.weight = from(c.weight, channel * c.weight.head);
  one.bias = from(c.bias, channel * c.bias.head);
  one.state = from(c.past, place(c.past, row, 0, channel));
  one.final = from(c.kept, place(c.kept, row, 0, channel));
  one.B = one.N = one.T = 1;
  one.D = width;
  one.taps = c.taps;
  one.kept = c.inputs;
  one.has_silu = has_silu;
  Channels channels;
  if (c.weight.data) {
    load_channels(one, 0, width, memory, channels);
    return run_convolution(one, 0, 0, 1, channels);
  }
  widen(x.data, x.type, element, to, width);
  for (int64_t i = 0; has_silu && i < width; i += W) {
    // The row may end within a vector.
    float some[W] = {};
    memcpy(some, to + i, size_t(least(W, width - i)) * 4);
    store(some, load(some) * sigmoid(load(some)));
    memcpy(to + i, some, size_t(least(W, width - i)) * 4);
  }
}

// log alpha of the key channels of value head h.
void form_channel_decays(const GdnToken& c, int64_t a, int64_t h, float* to, float* room) {
  const int64_t padded = decay_width(c);
  widen(c.a.data, c.a.type, a, to, c.K);
  for (int64_t i = c.K; i < padded; ++i) to[i] = 0.0f;
  const float rate = __builtin_expf(number(c.A_log, h * c.A_log.head));
  const float* bias = c.dt_bias.data ? room : nullptr;
  if (bias) read_row(c.dt_bias, h * c.K * c.dt_bias.head, c.K, padded, room);
  form_log_decays(rate, c.lower_bound, bias, padded, to);
}

// log alpha = -exp(A_log) softplus(a + dt_bias), or the bounded one; beta = factor sigmoid(b).
void form_gates(const GdnToken& c, int64_t row, int64_t head, const TokenRows& x) {
  for (int64_t r = 0; r < c.R; ++r) {
    const int64_t h = head * c.R + r, a = row * c.a.row + head * c.a.token + r * c.a.head;
    if (c.a.data && c.decay_of_channels) {
      form_channel_decays(c, a, h, x.log_alpha + r * decay_width(c), x.rest);
    } else if (c.a.data) {
      float step = number(c.a, a);
      if (c.dt_bias.data) step += number(c.dt_bias, h * c.dt_bias.head);
      const float rate = __builtin_expf(number(c.A_log, h * c.A_log.head));
      if (c.lower_bound < 0.0f) {
        // An infinite step would give NaN beside a rate of 0.
        step = step > __FLT_MAX__ ? __FLT_MAX__ : step < -__FLT_MAX__ ? -__FLT_MAX__ : step;
        x.log_alpha[r] = c.lower_bound / (1.0f + __builtin_expf(-rate * step));
      } else {
        const float softplus = step > 20.0f ? step : __builtin_log1pf(__builtin_expf(step));
        x.log_alpha[r] = -rate * softplus;
      }
    }
    const float b = number(c.b, row * c.b.row + head * c.b.token + r * c.b.head);
    x.beta[r] = c.beta_factor / (1.0f + __builtin_expf(-b));
  }
}

// o of the value heads of a key head, normalised and gated, to where it belongs.
void finish_rows(const GdnToken& c, int64_t row, int64_t head, const TokenRows& x) {
  GdnNorm norm = {};
  norm.x = {x.o, 0, 0, c.V, kGdnFloat32};
  norm.z = from(c.z, row * c.z.row + head * c.z.token);
  norm.y = from(c.o, row * c.o.row + head * c.o.token);
  norm.weight = c.norm;
  norm.B = norm.T = 1;
  norm.H = c.R;
  norm.width = c.V;
  norm.gate = c.gate;
  norm.eps = c.eps;
  run_norm(norm, 0, c.R, x.rest);
}

void run_token(const GdnToken& c, int64_t row, int64_t head, float* memory) {
  const TokenRows x = token_rows(c, memory);
  const int64_t keys = c.H * c.K;
  const int64_t q = row * c.q.row + head * c.q.token, k = row * c.k.row + head * c.k.token;
  form_row(c, c.q, q, row, head * c.K, c.K, c.has_silu, x.q, x.rest);
  form_row(c, c.k, k, row, keys + head * c.K, c.K, c.has_silu, x.k, x.rest);
  for (int64_t r = 0; r < c.R; ++r) {
    const int64_t v = row * c.v.row + head * c.v.token + r * c.v.head;
    const int64_t channel = 2 * keys + (head * c.R + r) * c.V;
    form_row(c, c.v, v, row, channel, c.V, true, x.v + r * c.V, x.rest);
  }
  form_gates(c, row, head, x);
  GdnSteps s = token_steps(c);
  const int64_t size = c.state_type == kGdnFloat32 ? 4 : 2, first = head * c.R;
  const int64_t from = row * c.state_row + first * c.state_head;
  const int64_t to = row * c.new_state_row + first * c.new_state_head;
  s.state = static_cast<char*>(c.state) + from * size;
  s.new_state = static_cast<char*>(c.new_state) + to * size;
  s.q = {x.q, 0, 0, 0, kGdnFloat32};
  s.k = {x.k, 0, 0, 0, kGdnFloat32};
  s.v = {x.v, 0, 0, c.V, kGdnFloat32};
  s.o = {x.o, 0, 0, c.V, kGdnFloat32};
  if (c.a.data) s.decay = {x.log_alpha, 0, 0, decay_width(c), kGdnFloat32};
  s.beta = {x.beta, 0, 0, 1, kGdnFloat32};
  decode_heads(s, x.rest);
  finish_rows(c, row, head, x);
}

}  // namespace
