// Erase and write, which stand in place of beta (docs/math.md §9): the error is taken with the keys
// erase . k, and what is written is write . v.
#pragma once

#include "decays.h"

namespace {

// Read a strength of `width` channels from channel `first` on: one number of a head, or 1, is that of
// all of them.
template <class S>
void read_strengths(const GdnArray& x, int64_t index, bool of_channels, int64_t first,
                    int64_t width, S* to) {
  if (x.data && of_channels) return widen(x.data, x.type, index + first, to, width);
  const S one = x.data ? number_of<S>(x, index) : S(1);
  for (int64_t i = 0; i < width; ++i) to[i] = one;
}

// Multiply numbers of channels by such a strength.
template <class S>
void scale_by(const GdnArray& x, int64_t index, bool of_channels, int64_t first, int64_t width,
              S* row) {
  if (!x.data) return;
  S some[256];
  for (int64_t j = 0; j < width; j += 256) {
    const int64_t n = width - j < 256 ? width - j : 256;
    read_strengths(x, index, of_channels, first + j, n, some);
    for (int64_t i = 0; i < n; ++i) row[j + i] *= some[i];
  }
}

}  // namespace
