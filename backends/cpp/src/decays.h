// The decays of all key channels of a token (docs/math.md §9).
#pragma once

#include "activations.h"

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

}  // namespace
