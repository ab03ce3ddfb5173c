// Matrix products of small row-major blocks, kept in registers: the inner loops of all kernels.
#pragma once

#include "vectors.h"

namespace {

constexpr int C = kGdnChunk;    // tokens of a chunk
constexpr int MR = GDN_ROWS;    // rows of a register block; divides C
constexpr int NV = 2;           // vectors of a register block
constexpr int P = NV * W;       // columns of a panel
static_assert(C % MR == 0 && C % P == 0, "blocks fill a chunk");

// Clang takes a reference to a block for one that is aligned like a whole vector.
#if defined(__clang__)
typedef Vec Block[MR][NV] __attribute__((aligned(4 * W)));
#else
typedef Vec Block[MR][NV];
#endif

// Tokens of a chunk of `count` that are worked on: whole blocks and whole vectors.
constexpr int64_t reach_of(int64_t count) { return round_up(count, MR > W ? MR : W); }

// acc += A B over `depth`: A(m, k) = a[m lda + k ka], B(k, n) = b[k ldb + n].
GDN_INLINE void multiply_add(Block& acc, const float* a, int64_t lda, int64_t ka, const float* b,
                             int64_t ldb, int64_t depth) {
  for (int64_t k = 0; k < depth; ++k) {
    Vec row[NV];
    for (int n = 0; n < NV; ++n) row[n] = load(b + n * W);
    for (int m = 0; m < MR; ++m) {
      const Vec factor = all(a[m * lda]);
      for (int n = 0; n < NV; ++n) acc[m][n] += factor * row[n];
    }
    a += ka;
    b += ldb;
  }
}

GDN_INLINE void multiply_subtract(Block& acc, const float* a, int64_t lda, int64_t ka,
                                  const float* b, int64_t ldb, int64_t depth) {
  for (int64_t k = 0; k < depth; ++k) {
    Vec row[NV];
    for (int n = 0; n < NV; ++n) row[n] = load(b + n * W);
    for (int m = 0; m < MR; ++m) {
      const Vec factor = all(a[m * lda]);
      for (int n = 0; n < NV; ++n) acc[m][n] -= factor * row[n];
    }
    a += ka;
    b += ldb;
  }
}

GDN_INLINE void clear(Block& acc) {
  for (int m = 0; m < MR; ++m) {
    for (int n = 0; n < NV; ++n) acc[m][n] = Vec{};
  }
}

// acc(m, :) = factor[m] x(m, :), or its sum with acc.
GDN_INLINE void load_block(Block& acc, const float* x, int64_t ldx) {
  for (int m = 0; m < MR; ++m) {
    for (int n = 0; n < NV; ++n) acc[m][n] = load(x + m * ldx + n * W);
  }
}

GDN_INLINE void store_block(const Block& acc, float* x, int64_t ldx) {
  for (int m = 0; m < MR; ++m) {
    for (int n = 0; n < NV; ++n) store(x + m * ldx + n * W, acc[m][n]);
  }
}

// Store a block past the caches; its rows are whole cache lines.
GDN_INLINE void stream_block(const Block& acc, float* x, int64_t ldx) {
  for (int m = 0; m < MR; ++m) {
    for (int n = 0; n < NV; ++n) stream(x + m * ldx + n * W, acc[m][n]);
  }
}

GDN_INLINE void scale_rows(Block& acc, const float* factors) {
  for (int m = 0; m < MR; ++m) {
    for (int n = 0; n < NV; ++n) acc[m][n] *= all(factors[m]);
  }
}

GDN_INLINE void scale_columns(Block& acc, const float* factors) {
  for (int n = 0; n < NV; ++n) {
    const Vec factor = load(factors + n * W);
    for (int m = 0; m < MR; ++m) acc[m][n] *= factor;
  }
}

// to(j, i) = from(i, j) of W x W numbers: log2(W) times, the first and the second half of the rows
// are shuffled into one another.
GDN_INLINE void transpose_block(const float* from, int64_t ld_from, float* to, int64_t ld_to) {
  Vec x[W], y[W];
  GDN_UNROLL for (int i = 0; i < W; ++i) x[i] = load(from + i * ld_from);
  GDN_UNROLL for (int done = 1; done < W; done *= 2) {
    GDN_UNROLL for (int i = 0; i < W / 2; ++i) {
      y[2 * i] = zip_low(x[i], x[i + W / 2]);
      y[2 * i + 1] = zip_high(x[i], x[i + W / 2]);
    }
    GDN_UNROLL for (int i = 0; i < W; ++i) x[i] = y[i];
  }
  GDN_UNROLL for (int i = 0; i < W; ++i) store(to + i * ld_to, x[i]);
}

// to(j, i) = from(i, j), `rows` x `columns`, both multiples of W.
GDN_INLINE void transpose(const float* from, int64_t ld_from, float* to, int64_t ld_to,
                          int64_t rows, int64_t columns) {
  for (int64_t j = 0; j < columns; j += W) {
    for (int64_t i = 0; i < rows; i += W) {
      transpose_block(from + i * ld_from + j, ld_from, to + j * ld_to + i, ld_to);
    }
  }
}

}  // namespace
