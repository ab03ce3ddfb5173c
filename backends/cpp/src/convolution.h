// The short causal depthwise convolution: blocks of tokens of some channels, channels in vectors.
//
// A block is loaded as float32 rows, whatever the memory of x is like, behind the last taps - 1
// inputs before it. Every number of y and of d_x is formed from the same operands in the same order
// however the work is cut, and so are the sums over tokens: a task of the backward has all of them.
#pragma once

#include "activations.h"
#include "rows.h"

namespace {

constexpr int64_t TOKENS = 16;  // of a block

GDN_INLINE int64_t place(const GdnArray& x, int64_t row, int64_t token, int64_t channel) {
  return row * x.row + token * x.token + channel * x.head;
}

// The channels of one task, in rows of `padded` floats.
struct Channels {
  int64_t first, width, padded;
  float *taps, *bias;  // [taps][padded], [padded]
  float* window;       // [taps - 1 + TOKENS][padded]: inputs
  float* out;          // [TOKENS][padded]
};

int64_t convolution_floats(const GdnConvolution& c, int64_t width) {
  return (2 * c.taps + 2 * TOKENS) * round_up(width, W);
}

// Lay the memory of a task out and load its parameters; return what is left of the memory.
float* load_channels(const GdnConvolution& c, int64_t first, int64_t width, float* memory,
                     Channels& x) {
  x.first = first;
  x.width = least(width, c.D - first);
  x.padded = round_up(x.width, W);
  x.taps = memory;
  x.bias = x.taps + c.taps * x.padded;
  x.window = x.bias + x.padded;
  x.out = x.window + (c.taps - 1 + TOKENS) * x.padded;
  const int64_t weight = place(c.weight, 0, 0, first);
  read_block(c.weight, weight, c.taps, x.width, x.padded, x.taps);
  memset(x.bias, 0, size_t(x.padded) * 4);
  if (c.bias.data) read_row(c.bias, place(c.bias, 0, 0, first), x.width, x.padded, x.bias);
  return x.out + TOKENS * x.padded;
}

// One sequence: its row, its first token, the one behind its last, and the same without padding.
struct Sequence {
  int64_t n, row, first, last, end;
};

GDN_INLINE Sequence sequence_of(const GdnConvolution& c, int64_t n) {
  if (c.starts) return {n, 0, c.starts[n], c.starts[n + 1], c.starts[n + 1]};
  return {n, n, 0, c.T, c.lengths ? c.lengths[n] : c.T};
}

// The token of a row whose task writes the last inputs of a sequence, which may be empty.
GDN_INLINE int64_t last_place(const Sequence& s) { return s.end > 0 ? s.end - 1 : 0; }

// The first sequence of a row that has tokens, or a last place, from a token on.
int64_t first_sequence(const GdnConvolution& c, int64_t row, int64_t token) {
  if (!c.starts) return row;
  int64_t low = 0, high = c.N;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (last_place(sequence_of(c, middle)) >= token) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// Read `count` inputs from a token of a sequence on, those before its first one from the state.
void read_inputs(const GdnConvolution& c, const Channels& x, const Sequence& s, int64_t token,
                 int64_t count, float* to) {
  const int64_t past = token < 0 ? least(-token, count) : 0, own = count - past;
  const int64_t first = s.first + token + past;
  if (past && c.state.data) {
    read_block(c.state, place(c.state, s.n, c.kept + token, x.first), past, x.width, x.padded, to);
  } else {
    memset(to, 0, size_t(past * x.padded) * 4);
  }
  if (!own) return;
  read_block(c.x, place(c.x, s.row, first, x.first), own, x.width, x.padded, to + past * x.padded);
}

// Load the taps - 1 inputs before a token of a sequence.
GDN_INLINE void load_past(const GdnConvolution& c, const Channels& x, const Sequence& s,
                          int64_t token) {
  read_inputs(c, x, s, token - (c.taps - 1), c.taps - 1, x.window);
}

// Move the last rows of `count` tokens before the next ones.
GDN_INLINE void move_back(float* window, int64_t reach, int64_t count, int64_t padded) {
  memmove(window, window + count * padded, size_t(reach * padded) * 4);
}

// Rows of float32: those that a block reads, the first of them taps - 1 before it, or writes.
struct Rows {
  float* first;
  int64_t stride;
};

// y of `count` tokens; `known` is the number of taps where the compiler may know it, else 0.
template <int known, bool has_silu>
GDN_INLINE void convolve_rows(const Channels& x, int64_t given, const Rows& in, const Rows& out,
                              int64_t count) {
  const int64_t taps = known ? known : given;
  for (int64_t i = 0; i < count; ++i) {
    const float* from = in.first + i * in.stride;
    for (int64_t v = 0; v < x.padded; v += W) {
      Vec p = load(x.bias + v);
      for (int64_t j = 0; j < taps; ++j) {
        p += load(x.taps + j * x.padded + v) * load(from + j * in.stride + v);
      }
      store(out.first + i * out.stride + v, has_silu ? p * sigmoid(p) : p);
    }
  }
}

void convolve(const GdnConvolution& c, const Channels& x, const Rows& in, const Rows& out,
              int64_t count) {
  if (c.taps == 4) {
    if (c.has_silu) return convolve_rows<4, true>(x, 4, in, out, count);
    return convolve_rows<4, false>(x, 4, in, out, count);
  }
  if (c.has_silu) return convolve_rows<0, true>(x, c.taps, in, out, count);
  convolve_rows<0, false>(x, c.taps, in, out, count);
}

// Whether the channels of a task are whole vectors of float32 in an array.
GDN_INLINE bool is_direct(const GdnArray& array, const Channels& x) {
  return array.type == kGdnFloat32 && array.head == 1 && x.width == x.padded;
}

GDN_INLINE float* element(const GdnArray& x, int64_t index) {
  return static_cast<float*>(x.data) + index;
}

// Write the last inputs of a sequence; they are read before they are written over, should `final`
// be the state.
void keep_inputs(const GdnConvolution& c, const Channels& x, const Sequence& s) {
  for (int64_t i = 0; i < c.kept; i += TOKENS) {
    const int64_t count = least(TOKENS, c.kept - i);
    read_inputs(c, x, s, s.end - s.first - c.kept + i, count, x.out);
    write_block(x.out, count, x.width, x.padded, c.final, place(c.final, s.n, i, x.first));
  }
}

// The tokens of one sequence from `token` to `stop`, in rows of the arrays themselves or in blocks.
void convolve_tokens(const GdnConvolution& c, const Channels& x, const Sequence& s, int64_t token,
                     int64_t stop) {
  const int64_t reach = c.taps - 1;
  const bool reads_x = is_direct(c.x, x), writes_y = is_direct(c.y, x);
  bool has_past = false;
  while (token < stop) {
    const int64_t count = least(TOKENS, stop - token);
    const int64_t at = place(c.x, s.row, token, x.first), to = place(c.y, s.row, token, x.first);
    Rows in = {x.window, x.padded}, out = {x.out, x.padded};
    if (writes_y) out = {element(c.y, to), c.y.token};
    if (reads_x && token - s.first >= reach) {
      in = {element(c.x, at - reach * c.x.token), c.x.token};
    } else {
      if (!has_past) load_past(c, x, s, token - s.first);
      has_past = !reads_x;
      read_block(c.x, at, count, x.width, x.padded, x.window + reach * x.padded);
    }
    convolve(c, x, in, out, count);
    if (!writes_y) write_block(x.out, count, x.width, x.padded, c.y, to);
    if (has_past) move_back(x.window, reach, count, x.padded);
    token += count;
  }
}

// Tokens `from` to `to` of a row, and the last inputs of the sequences that end there.
void run_convolution(const GdnConvolution& c, int64_t row, int64_t from, int64_t to,
                     const Channels& x) {
  const int64_t end = c.starts ? c.N : row + 1;
  for (int64_t n = first_sequence(c, row, from); n < end; ++n) {
    const Sequence s = sequence_of(c, n);
    const int64_t last = last_place(s);
    if (s.first >= to && last >= to) break;
    convolve_tokens(c, x, s, s.first > from ? s.first : from, least(s.last, to));
    if (c.final.data && from <= last && last < to) keep_inputs(c, x, s);
  }
}

}  // namespace
