// The decays of a head's key channels from what a layer projects, in vectors (docs/gates.md):
//
//     softplus    log alpha = -e^A_log softplus(g + dt_bias)
//     bounded     log alpha = bound sigmoid(e^A_log (g + dt_bias))
#pragma once

#include "activations.h"
#include "rows.h"

namespace {

// log(1 + y) of y in [0, 1], as the series of 2 artanh(s), s = y / (2 + y) <= 1/3.
GDN_INLINE Vec log_of_one_plus(Vec y) {
  const Vec s = y / (all(2.0f) + y), z = s * s;
  Vec p = all(2.0f / 13.0f);
  p = p * z + all(2.0f / 11.0f);
  p = p * z + all(2.0f / 9.0f);
  p = p * z + all(2.0f / 7.0f);
  p = p * z + all(2.0f / 5.0f);
  p = p * z + all(2.0f / 3.0f);
  return p * z * s + (s + s);
}

// log(1 + e^x); NaN stays NaN.
GDN_INLINE Vec softplus(Vec x) {
  const Ints is_negative = x < Vec{};
  const Vec below = choose(is_negative, x, -x);
  return choose(is_negative, Vec{}, x) + log_of_one_plus(exponential_to_zero(below));
}

// A finite step: an infinite one would give NaN beside a rate of 0.
GDN_INLINE Vec finite(Vec x) {
  const Vec most = all(__FLT_MAX__);
  x = choose(x > most, most, x);
  return choose(x < -most, -most, x);
}

// log alpha of a row g in its place, `padded` to whole vectors; a bound of 0 is the softplus gate.
void form_log_decays(float rate, float bound, const float* bias, int64_t padded, float* g) {
  const Vec rates = all(rate), bounds = all(bound);
  for (int64_t i = 0; i < padded; i += W) {
    Vec x = load(g + i);
    if (bias) x += load(bias + i);
    store(g + i, bound < 0.0f ? bounds * sigmoid(rates * finite(x)) : -rates * softplus(x));
  }
}

}  // namespace
