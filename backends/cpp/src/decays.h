// The decays of all key channels of a token (docs/math.md §9).
#pragma once

#include "raw_decays.h"

namespace {

// Read the decays of K channels from an element on; ones fill them up to `padded`.
template <class S>
void read_decays(const GdnArray& x, int64_t index, bool is_log, int64_t K, int64_t padded, S* to) {
  widen(x.data, x.type, index, to, K);
  for (int64_t i = K; i < padded; ++i) to[i] = is_log ? S(0) : S(1);
  if constexpr (std::is_same_v<S, float>) {
    for (int64_t i = 0; is_log && i < padded; i += W) {
      store(to + i, exponential_to_zero(load(to + i)));
    }
  } else {
    for (int64_t i = 0; is_log && i < K; ++i) to[i] = std::exp(to[i]);
    for (int64_t i = K; is_log && i < padded; ++i) to[i] = S(1);
  }
}

// Turn raw decays of a head, padded to whole vectors, into alpha; `bias` is added to them, or null.
template <class S>
void gate_decays(const GdnSteps& c, S rate, const float* bias, int64_t K, int64_t padded, S* x) {
  for (int64_t i = 0; bias && i < K; ++i) x[i] += S(bias[i]);
  const bool is_bounded = c.raw_decay == kGdnBounded;
  if constexpr (std::is_same_v<S, float>) {
    form_log_decays(rate, is_bounded ? c.lower_bound : 0.0f, nullptr, padded, x);
    for (int64_t i = 0; i < padded; i += W) store(x + i, exponential_to_zero(load(x + i)));
  } else {
    for (int64_t i = 0; i < K; ++i) {
      const S y = x[i], lowest = c.lower_bound;
      const S log = is_bounded ? lowest / (S(1) + std::exp(-rate * y))
                               : -rate * (y > S(40) ? y : std::log1p(std::exp(y)));
      x[i] = std::exp(log);
    }
  }
  for (int64_t i = K; i < padded; ++i) x[i] = S(1);
}

}  // namespace
