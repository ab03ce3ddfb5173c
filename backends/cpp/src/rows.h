// Rows of channels in any memory, read as float32 and written from it: `head` is the stride of the
// channels, `token` that of the rows.
#pragma once

#include "vectors.h"

namespace {

// Call work(read) with a function that reads an element of the array, its type known.
template <class F>
GDN_INLINE void with_reader(const GdnArray& x, F work) {
  if (x.type == kGdnFloat32) {
    const float* data = static_cast<const float*>(x.data);
    work([=](int64_t i) { return data[i]; });
  } else if (x.type == kGdnBfloat16) {
    const uint16_t* data = static_cast<const uint16_t*>(x.data);
    work([=](int64_t i) { return bfloat_to_float(data[i]); });
  } else {
    const uint16_t* data = static_cast<const uint16_t*>(x.data);
    work([=](int64_t i) { return half_to_float(data[i]); });
  }
}

// Columns of few numbers behind one another, as the taps of a channel are: so many channels are
// read or written together, of at most so many numbers each.
constexpr int64_t TOGETHER = 64, FEW = 4;

GDN_INLINE bool is_few(const GdnArray& x) { return x.token == 1 && x.head > 1 && x.head <= FEW; }

template <int few>
GDN_INLINE void take_apart(const float* room, int64_t count, int64_t n, int64_t padded, float* to) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j < n; ++j) to[i * padded + j] = room[j * few + i];
  }
}

// The same as `read_block` where `is_few`.
void read_few(const GdnArray& x, int64_t from, int64_t count, int64_t width, int64_t padded,
              float* to) {
  float room[TOGETHER * FEW];
  for (int64_t j = 0; j < width; j += TOGETHER) {
    const int64_t n = least(TOGETHER, width - j);
    widen(x.data, x.type, from + j * x.head, room, (n - 1) * x.head + count);
    if (x.head == 4) take_apart<4>(room, count, n, padded, to + j);
    if (x.head == 3) take_apart<3>(room, count, n, padded, to + j);
    if (x.head == 2) take_apart<2>(room, count, n, padded, to + j);
  }
}

// Read `count` rows of `width` channels from an element on; zeros fill them up to `padded`.
void read_block(const GdnArray& x, int64_t from, int64_t count, int64_t width, int64_t padded,
                float* to) {
  for (int64_t i = 0; i < count && width < padded; ++i) {
    memset(to + i * padded + width, 0, size_t(padded - width) * 4);
  }
  if (x.head == 1) {
    for (int64_t i = 0; i < count; ++i) {
      widen(x.data, x.type, from + i * x.token, to + i * padded, width);
    }
    return;
  }
  if (is_few(x)) return read_few(x, from, count, width, padded, to);
  with_reader(x, [&](auto read) {
    for (int64_t j = 0; j < width; ++j) {
      const int64_t first = from + j * x.head;
      for (int64_t i = 0; i < count; ++i) to[i * padded + j] = read(first + i * x.token);
    }
  });
}

GDN_INLINE void read_row(const GdnArray& x, int64_t from, int64_t width, int64_t padded,
                         float* to) {
  read_block(x, from, 1, width, padded, to);
}

template <int few>
GDN_INLINE void put_together(const float* from, int64_t n, int64_t padded, float* room) {
  for (int64_t j = 0; j < n; ++j) {
    for (int i = 0; i < few; ++i) room[j * few + i] = from[i * padded + j];
  }
}

// Write `count` rows of `width` channels.
void write_block(const float* from, int64_t count, int64_t width, int64_t padded,
                 const GdnArray& x, int64_t to) {
  if (x.head == 1) {
    for (int64_t i = 0; i < count; ++i) {
      narrow(from + i * padded, x.data, x.type, to + i * x.token, width);
    }
    return;
  }
  if (is_few(x) && x.head == count) {
    float room[TOGETHER * FEW];
    for (int64_t j = 0; j < width; j += TOGETHER) {
      const int64_t n = least(TOGETHER, width - j);
      if (count == 4) put_together<4>(from + j, n, padded, room);
      if (count == 3) put_together<3>(from + j, n, padded, room);
      if (count == 2) put_together<2>(from + j, n, padded, room);
      narrow(room, x.data, x.type, to + j * count, n * count);
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j < width; ++j) {
      narrow(from + i * padded + j, x.data, x.type, to + i * x.token + j * x.head, 1);
    }
  }
}

}  // namespace
