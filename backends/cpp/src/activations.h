// Exponentials of whole vectors, and the activations made of them: within two units in the last
// place of float32.
#pragma once

#include "interface_layers.h"
#include "vectors.h"

namespace {

typedef int32_t Ints __attribute__((vector_size(4 * W), aligned(4)));

// a where a mask is set, else b.
GDN_INLINE Vec choose(Ints is, Vec a, Vec b) {
  return (Vec)(((Bits)is & (Bits)a) | (~(Bits)is & (Bits)b));
}

// e^r of |r| <= ln 2 / 2.
GDN_INLINE Vec polynomial(Vec r) {
  Vec p = all(1.9875691500e-4f);
  p = p * r + all(1.3981999507e-3f);
  p = p * r + all(8.3334519073e-3f);
  p = p * r + all(4.1665795894e-2f);
  p = p * r + all(1.6666665459e-1f);
  p = p * r + all(5.0000001201e-1f);
  return p * (r * r) + r + all(1.0f);
}

// e^x of x moved into [-87, 87]; NaN stays NaN.
GDN_INLINE Vec exponential(Vec x) {
  x = choose(x > all(87.0f), all(87.0f), x);
  x = choose(x < all(-87.0f), all(-87.0f), x);
  // x = n ln 2 + r; the sum with 1.5 * 2^23 rounds to a whole number in the last bits.
  const Vec shift = all(12582912.0f);
  const Vec shifted = x * all(1.44269504088896341f) + shift;
  const Vec n = shifted - shift;
  const Vec r = x - n * all(0.693359375f) + n * all(2.12194440e-4f);
  const Vec p = polynomial(r);
  // Adding n to the exponent multiplies by 2^n.
  return (Vec)((Bits)p + ((Bits)shifted << 23));
}

// 2^n as a normal number.
GDN_INLINE Vec power_of_two(Ints n) { return (Vec)((n + 127) << 23); }

// e^x of x up to 87: below 2^-126 it is the nearest number too, and of -inf it is 0.
GDN_INLINE Vec exponential_to_zero(Vec x) {
  const Ints is_zero = x < all(-104.0f);
  x = choose(is_zero, Vec{}, x);
  // As above; n is added in two steps, of which the last alone leaves the range of numbers.
  const Vec shift = all(12582912.0f);
  const Vec shifted = x * all(1.44269504088896341f) + shift;
  const Vec n = shifted - shift;
  const Ints whole = (Ints)shifted - (Ints)shift, half = whole >> 1;
  const Vec p = polynomial(x - n * all(0.693359375f) + n * all(2.12194440e-4f));
  return choose(is_zero, Vec{}, p * power_of_two(half) * power_of_two(whole - half));
}

// Of x below -87 it is 0, and the products with such x are 0 too.
GDN_INLINE Vec sigmoid(Vec x) {
  return choose(x < all(-87.0f), Vec{}, all(1.0f) / (all(1.0f) + exponential(-x)));
}

// The value of a gate, and its derivative.
struct Gated {
  Vec value, slope;
};

GDN_INLINE Gated silu(Vec x) {
  const Vec s = sigmoid(x), value = x * s;
  return {value, s + value * (all(1.0f) - s)};
}

GDN_INLINE Vec silu_slope(Vec x) {
  const Vec s = sigmoid(x);
  return s + x * s * (all(1.0f) - s);
}

GDN_INLINE Gated gate_of(Vec z, int64_t kind) {
  if (kind == kGdnSilu) return silu(z);
  const Vec s = sigmoid(z);
  return {s, s * (all(1.0f) - s)};
}

}  // namespace
