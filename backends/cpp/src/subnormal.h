// Numbers below 2^-126: a processor needs over 100 cycles for an operation on one, and products of
// the decays of trained gates are such numbers in every chunk.
//
// Where nothing beyond 2^40 meets a decay that is hardly above them, they are taken for zero: what
// is lost is below 2^-86. Elsewhere a faint decay of a large state is computed as it is.
#pragma once

#include "chunk.h"
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace {

// Takes subnormal operands and results for zero while it lives, in its thread, if asked to.
struct Flushed {
#if defined(__x86_64__)
  const unsigned before = _mm_getcsr();
  explicit Flushed(bool is_asked) {
    if (is_asked) _mm_setcsr(before | 0x8040u);
  }
  ~Flushed() { _mm_setcsr(before); }
#elif defined(__aarch64__)
  uint64_t before;
  explicit Flushed(bool is_asked) {
    asm volatile("mrs %0, fpcr" : "=r"(before));
    if (is_asked) asm volatile("msr fpcr, %0" : : "r"(before | uint64_t{1} << 24));
  }
  ~Flushed() { asm volatile("msr fpcr, %0" : : "r"(before)); }
#else
  explicit Flushed(bool) {}
  ~Flushed() {}
#endif
};

// Whether one of n numbers is beyond 2^40, or no number.
bool has_large(const float* x, int64_t n) {
  bool found = false;
  for (int64_t i = 0; i < n; ++i) found |= !(__builtin_fabsf(x[i]) < 0x1p40f);
  return found;
}

// Whether a decay of the value heads of a task is below 2^-118, and not so small that it is zero.
bool has_faint_decay(const GdnSequences& c, const Task& t) {
  const int64_t R = c.HV / c.H;
  bool found = false;
  for (int64_t token = t.first; token < t.last && c.decay.data; ++token) {
    for (int64_t r = 0; r < R; ++r) {
      const float x = number(c.decay, at(c.decay, t.row, token, t.head * R + r));
      found |= c.decay_is_log ? x > -104.0f && x < -81.7f : x > 0.0f && x < 0x1p-118f;
    }
  }
  return found;
}

// Whether a large value or state may meet a faint decay in a task.
bool needs_subnormals(const GdnSequences& c, const Task& t) {
  if (!has_faint_decay(c, t)) return false;
  const int64_t R = c.HV / c.H, head = t.head * R, size = R * c.K * c.V;
  if (c.initial && has_large(c.initial + (t.n * c.HV + head) * c.K * c.V, size)) return true;
  float some[64];
  for (int64_t token = t.first; token < t.last; ++token) {
    for (int64_t r = 0; r < R; ++r) {
      for (int64_t j = 0; j < c.V; j += 64) {
        const int64_t n = least(64, c.V - j);
        widen(c.v.data, c.v.type, at(c.v, t.row, token, head + r) + j, some, n);
        if (has_large(some, n)) return true;
      }
    }
  }
  return false;
}

}  // namespace
