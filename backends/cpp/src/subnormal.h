// Numbers below 2^-126: a processor needs over 100 cycles for an operation on one, and products of
// strong decays are such numbers in every chunk.
//
// They are taken for zero while a chunk is computed whose operands are all of ordinary size, if it
// has results beside which the lost terms, below 2^-100, are nothing: see `Sizes` and
// `may_flush_back`. Elsewhere a faint decay acts as it is (docs/math.md §4).
#pragma once

#include "chunk.h"
#include "strengths.h"

namespace {

// Takes subnormal operands and results for zero while it lives, in its thread, if asked to.
class Flushed {
#if defined(__x86_64__)
  typedef uint32_t Mode;
  static constexpr Mode kFlush = 0x8040;
  static Mode mode() {
    Mode mode;
    asm volatile("stmxcsr %0" : "=m"(mode) : : "memory");
    return mode;
  }
  static void set(Mode mode) { asm volatile("ldmxcsr %0" : : "m"(mode) : "memory"); }
#elif defined(__aarch64__)
  typedef uint64_t Mode;
  static constexpr Mode kFlush = Mode{1} << 24;
  static Mode mode() {
    Mode mode;
    asm volatile("mrs %0, fpcr" : "=r"(mode) : : "memory");
    return mode;
  }
  static void set(Mode mode) { asm volatile("msr fpcr, %0" : : "r"(mode) : "memory"); }
#else
  typedef uint32_t Mode;
  static constexpr Mode kFlush = 0;
  static Mode mode() { return 0; }
  static void set(Mode) {}
#endif
  const bool is_asked;
  Mode before = 0;

 public:
  explicit Flushed(bool asked) : is_asked(asked) {
    if (!is_asked) return;
    before = mode();
    set(before | kFlush);
  }
  Flushed(const Flushed&) = delete;
  ~Flushed() {
    if (is_asked) set(before);
  }
};

template <class Function>
GDN_INLINE void with_flushing(bool is_asked, const Function& function) {
  const Flushed flushed(is_asked);
  function();
}

// The largest of n sizes; NaN if one is that.
GDN_INLINE float largest(const float* x, int64_t n) {
  Ints most = {};
  int64_t i = 0;
  // Sizes of floats are ordered like their bits, and NaN lies above infinity.
  for (; i + W <= n; i += W) {
    const Ints size = (Ints)((Bits)load(x + i) & 0x7fffffffu);
    most = size > most ? size : most;
  }
  int32_t found = 0;
  for (int l = 0; l < W; ++l) found = found > most[l] ? found : most[l];
  for (; i < n; ++i) {
    int32_t size;
    memcpy(&size, x + i, 4);
    size &= 0x7fffffff;
    found = found > size ? found : size;
  }
  float value;
  memcpy(&value, &found, 4);
  return value;
}

// The largest size in a row of a tensor.
float largest_of(const GdnArray& x, int64_t index, int64_t n) {
  float some[256], most = 0.0f;
  for (int64_t j = 0; j < n; j += 256) {
    const int64_t m = least(256, n - j);
    widen(x.data, x.type, index + j, some, m);
    const float found = largest(some, m);
    if (found != found) return found;
    most = found > most ? found : most;
  }
  return most;
}

// The largest size in what a token of a value head writes, but for a factor beta.
float largest_write(const GdnSequences& c, const Task& t, int64_t token, int64_t head) {
  const int64_t index = at(c.v, t.row, token, head);
  if (!c.write.data) return largest_of(c.v, index, c.V);
  float some[256], most = 0.0f;
  for (int64_t j = 0; j < c.V; j += 256) {
    const int64_t n = least(256, c.V - j);
    widen(c.v.data, c.v.type, index + j, some, n);
    scale_by(c.write, at(c.write, t.row, token, head), c.write_of_channels, j, n, some);
    const float found = largest(some, n);
    if (found != found) return found;
    most = found > most ? found : most;
  }
  return most;
}

// Bounds of ordinary sizes.
constexpr float kLargest = 0x1p24f;  // of values, states and their gradients
constexpr float kLeastWrite = 0x1p-24f, kLeastGradient = 0x1p-56f;
constexpr float kLeastKey = 0x1p-16f, kLargestKey = 0x1p16f;
constexpr float kKept = 0x1p-32f;  // of decays

GDN_INLINE bool is_ordinary(const float* state, int64_t n) {
  return largest(state, n) <= kLargest;
}

// The sizes of a chunk of one value head, as far as the forward asks for them.
struct Sizes {
  bool may_flush;  // decays are strong, nothing is large, and the state behind holds a write
  bool writes[C];  // token i writes something of ordinary size, and reads it
};

Sizes sizes_of(const GdnSequences& c, const Task& t, int64_t token, int64_t count, int64_t head,
               const Gates& g) {
  Sizes x = {};
  if (!g.are_strong) return x;
  bool is_kept = false;
  for (int64_t i = 0; i < count; ++i) {
    const float k = largest_of(c.k, at(c.k, t.row, token + i, t.head), c.K);
    const float q = largest_of(c.q, at(c.q, t.row, token + i, t.head), c.K);
    const float v = largest_of(c.v, at(c.v, t.row, token + i, head), c.V);
    if (!(k <= kLargestKey && q <= kLargestKey && v <= kLargest)) return {};
    const float written = c.is_apart ? largest_write(c, t, token + i, head) : v * g.beta[i];
    x.writes[i] = k >= kLeastKey && q * c.scale >= kLeastKey && written >= kLeastWrite;
    is_kept |= x.writes[i] && g.d[i] >= kKept;
  }
  x.may_flush = is_kept;
  return x;
}

// Whether the backward of a chunk may flush too: an output of ordinary size counts, which reads what
// its token and the one before it wrote.
bool may_flush_back(const GdnSequences& c, const GdnArray& d_o, const Task& t, int64_t token,
                    int64_t count, int64_t head, const Gates& g) {
  const Sizes x = sizes_of(c, t, token, count, head, g);
  if (!x.may_flush) return false;
  bool is_seen = false;
  for (int64_t i = 0; i < count; ++i) {
    const float d = largest_of(d_o, at(d_o, t.row, token + i, head), c.V);
    if (!(d <= kLargest)) return false;
    is_seen |= i > 0 && d >= kLeastGradient && x.writes[i] && x.writes[i - 1];
  }
  return is_seen;
}

// The token up to which faint traces may be all that there is of the gradient of the initial state:
// none, so the first token, if an output counts that reads this state, else where it has faded.
int64_t faint_end(const GdnSequences& c, const GdnArray& d_o, const Task& t, int64_t head) {
  float decay = 1.0f;
  for (int64_t token = t.first; token < t.last; ++token) {
    if (c.decay.data) decay *= decay_of(c, t, token, head);
    if (decay == 0.0f) return token;
    const bool is_read = c.scale * largest_of(c.q, at(c.q, t.row, token, t.head), c.K) >= kLeastKey;
    const float d = largest_of(d_o, at(d_o, t.row, token, head), c.V);
    if (decay >= kKept && is_read && d >= kLeastGradient) return t.first;
  }
  return t.last;
}

}  // namespace
