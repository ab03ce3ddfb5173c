// The gated norm of rows: y = w n gate(z), n = x / sqrt(mean(x^2) + eps), and its gradients:
//
//     d_w = sum d_y n gate           d_z = d_y n w gate'
//     d_n = d_y gate w               d_x = (d_n - n mean(d_n n)) / sqrt(mean(x^2) + eps)
#pragma once

#include "activations.h"
#include "rows.h"

namespace {

constexpr int64_t SUMMED = 64;  // rows whose part of d_w is summed on its own

GDN_INLINE int64_t norm_row(const GdnNorm& c, const GdnArray& x, int64_t index) {
  const int64_t head = index % c.H, token = index / c.H;
  return token / c.T * x.row + token % c.T * x.token + head * x.head;
}

// Return a row as float32, in its own place if it is whole vectors of them, else in `room`.
GDN_INLINE const float* norm_read(const GdnNorm& c, const GdnArray& x, int64_t index,
                                  float* room) {
  const int64_t from = norm_row(c, x, index), padded = round_up(c.width, W);
  if (x.type == kGdnFloat32 && padded == c.width) return static_cast<const float*>(x.data) + from;
  widen(x.data, x.type, from, room, c.width);
  for (int64_t i = c.width; i < padded; ++i) room[i] = 0.0f;
  return room;
}

// Where a row is formed, and what writes it if that is not its own place.
GDN_INLINE float* norm_place(const GdnNorm& c, const GdnArray& x, int64_t index, float* room) {
  const bool is_direct = x.type == kGdnFloat32 && c.width % W == 0;
  return is_direct ? static_cast<float*>(x.data) + norm_row(c, x, index) : room;
}

GDN_INLINE void norm_write(const GdnNorm& c, const GdnArray& x, int64_t index,
                           const float* room, const float* formed) {
  if (formed == room) narrow(room, x.data, x.type, norm_row(c, x, index), c.width);
}

int64_t norm_floats(const GdnNorm& c) { return 8 * round_up(c.width, W); }

float* norm_weight(const GdnNorm& c, float* memory) {
  read_row(c.weight, 0, c.width, round_up(c.width, W), memory);
  return memory + round_up(c.width, W);
}

GDN_INLINE float norm_scale(const GdnNorm& c, const float* x, int64_t padded) {
  Vec squares = {};
  for (int64_t i = 0; i < padded; i += W) squares += load(x + i) * load(x + i);
  return 1.0f / __builtin_sqrtf(sum(squares) / float(c.width) + c.eps);
}

template <bool has_silu>
GDN_INLINE void gate_row(float* y, const float* z, int64_t padded) {
  for (int64_t i = 0; i < padded; i += W) {
    const Vec x = load(z + i), s = sigmoid(x);
    store(y + i, load(y + i) * (has_silu ? x * s : s));
  }
}

void run_norm(const GdnNorm& c, int64_t first, int64_t last, float* memory) {
  const int64_t padded = round_up(c.width, W);
  const float* w = memory;
  float *x_room = norm_weight(c, memory), *z_room = x_room + padded, *y_room = z_room + padded;
  for (int64_t r = first; r < last; ++r) {
    const float* x = norm_read(c, c.x, r, x_room);
    float* y = norm_place(c, c.y, r, y_room);
    const Vec scale = all(norm_scale(c, x, padded));
    for (int64_t i = 0; i < padded; i += W) store(y + i, load(x + i) * scale * load(w + i));
    if (c.gate == kGdnSilu) gate_row<true>(y, norm_read(c, c.z, r, z_room), padded);
    if (c.gate == kGdnSigmoid) gate_row<false>(y, norm_read(c, c.z, r, z_room), padded);
    norm_write(c, c.y, r, y_room, y);
  }
}

// The rows of one part of the sums.
GDN_INLINE int64_t norm_part(const GdnNorm& c) {
  const int64_t rows = c.B * c.T * c.H, each = (rows + GDN_PARTIALS - 1) / GDN_PARTIALS;
  return each > SUMMED ? each : SUMMED;
}

// Gradients of one row; its part of d_w is added to `sums`.
GDN_INLINE void differentiate_row(const GdnNorm& c, const float* w, const float* x,
                                  const float* z, const float* d_y, float* d_x, float* d_z,
                                  float* d_n, float* sums) {
  const int64_t padded = round_up(c.width, W);
  const Vec scale = all(norm_scale(c, x, padded));
  Vec products = {};
  for (int64_t i = 0; i < padded; i += W) {
    const Vec n = load(x + i) * scale, d = load(d_y + i);
    Gated gate = {all(1.0f), Vec{}};
    if (z) gate = gate_of(load(z + i), c.gate);
    const Vec d_gated = d * n;
    store(sums + i, load(sums + i) + d_gated * gate.value);
    if (z) store(d_z + i, d_gated * load(w + i) * gate.slope);
    const Vec slope = d * gate.value * load(w + i);
    products += slope * n;
    store(d_n + i, slope);
  }
  const Vec mean = all(sum(products) / float(c.width));
  for (int64_t i = 0; i < padded; i += W) {
    store(d_x + i, (load(d_n + i) - load(x + i) * scale * mean) * scale);
  }
}

void run_norm_backward(const GdnNorm& c, const GdnNormGradients& to, int64_t part,
                       float* memory) {
  const int64_t padded = round_up(c.width, W), each = norm_part(c);
  const int64_t first = part * each, last = least(first + each, c.B * c.T * c.H);
  const float* w = memory;
  float* room[7];
  room[0] = norm_weight(c, memory);
  for (int i = 1; i < 7; ++i) room[i] = room[i - 1] + padded;
  float *d_n = room[5], *sums = room[6], *total = to.partials + part * c.width;
  for (int64_t i = 0; i < c.width; ++i) total[i] = 0.0f;
  for (int64_t start = first; start < last; start += SUMMED) {
    memset(sums, 0, size_t(padded) * 4);
    for (int64_t r = start; r < least(start + SUMMED, last); ++r) {
      const float* x = norm_read(c, c.x, r, room[0]);
      const float* z = c.gate ? norm_read(c, c.z, r, room[1]) : nullptr;
      const float* d_y = norm_read(c, to.d_y, r, room[2]);
      float* d_x = norm_place(c, to.d_x, r, room[3]);
      float* d_z = c.gate ? norm_place(c, to.d_z, r, room[4]) : nullptr;
      differentiate_row(c, w, x, z, d_y, d_x, d_z, d_n, sums);
      norm_write(c, to.d_x, r, room[3], d_x);
      if (c.gate) norm_write(c, to.d_z, r, room[4], d_z);
    }
    for (int64_t i = 0; i < c.width; ++i) total[i] += sums[i];
  }
}

// d_w: the sum of its parts.
void finish_norm_backward(const GdnNorm& c, const GdnNormGradients& to) {
  const int64_t each = norm_part(c), parts = (c.B * c.T * c.H + each - 1) / each;
  for (int64_t i = 0; i < c.width; ++i) to.d_weight[i] = 0.0f;
  for (int64_t part = 0; part < parts; ++part) {
    for (int64_t i = 0; i < c.width; ++i) to.d_weight[i] += to.partials[part * c.width + i];
  }
}

}  // namespace
