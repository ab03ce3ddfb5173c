// Tokens of a prompt: calls of the forward, and of states that it does not hold.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "step.h"

namespace {

// The call of the forward for tokens of rows; its states are float32, contiguous.
GdnSequences sequences_of(const GdnSteps& x, const float* initial, float* final) {
  GdnSequences c{};
  c.q = x.q;
  c.k = x.k;
  c.v = x.v;
  c.decay = x.decay;
  c.beta = x.beta;
  c.o = x.o;
  c.initial = const_cast<float*>(initial);
  c.final = final;
  c.N = x.B;
  c.T = x.T;
  c.H = x.H;
  c.HV = x.HV;
  c.K = x.K;
  c.V = x.V;
  c.decay_is_log = x.decay_is_log;
  c.decay_of_channels = x.decay_of_channels;
  c.has_erase = x.has_erase;
  c.qk_l2norm = x.qk_l2norm;
  c.chunks_per_state = 1;
  c.least_tasks = 1;
  c.scale = x.scale;
  c.threads = int32_t(x.threads);
  return c;
}

int64_t bytes_of(int64_t type) {
  return type == kGdnFloat64 ? 8 : type == kGdnFloat32 ? 4 : 2;
}

// The tokens from `first` on, at most `count`, of a call.
GdnSteps tokens_from(const GdnSteps& x, int64_t first, int64_t count) {
  GdnSteps part = x;
  part.T = x.T - first < count ? x.T - first : count;
  for (GdnArray* array : {&part.q, &part.k, &part.v, &part.decay, &part.beta, &part.o}) {
    if (array->data == nullptr) continue;
    array->data = static_cast<char*>(array->data) + first * array->token * bytes_of(array->type);
  }
  if (first > 0) part.state = x.new_state;
  return part;
}

// ---------------------------------------------------------------------------------------------
// States of 16 bits
// ---------------------------------------------------------------------------------------------

template <class To, class From>
To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  std::memcpy(&to, &x, sizeof(to));
  return to;
}

float from_bfloat16(uint16_t x) { return bits_as<float>(uint32_t(x) << 16); }

uint16_t to_bfloat16(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  if (std::isnan(x)) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float from_float16(uint16_t x) {
  const uint32_t sign = uint32_t(x & 0x8000) << 16, rest = x & 0x7fff;
  if (rest >= 0x7c00) return bits_as<float>(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  // Numbers below the normal ones are multiples of 2^-24.
  const float size =
      rest < 0x400 ? float(rest) * 0x1p-24f : bits_as<float>((rest << 13) + 0x38000000);
  return bits_as<float>(sign | bits_as<uint32_t>(size));
}

uint16_t to_float16(float x) {
  const uint32_t bits = bits_as<uint32_t>(x), rest = bits & 0x7fffffff;
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  if (rest > 0x7f800000) return sign | 0x7e00 | uint16_t(rest >> 13 & 0x3ff);
  if (rest >= 0x47800000) return sign | 0x7c00;
  // The sum rounds to multiples of 2^-24, the distance of numbers around 1/2.
  if (rest < 0x38800000) {
    const float sum = bits_as<float>(rest) + 0.5f;
    return sign | uint16_t(bits_as<uint32_t>(sum) - bits_as<uint32_t>(0.5f));
  }
  return sign | uint16_t((rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13);
}

void widen_state(const void* from, int64_t type, float* to, int64_t size) {
  const auto* numbers = static_cast<const uint16_t*>(from);
  for (int64_t i = 0; i < size; ++i) {
    to[i] = type == kGdnFloat16 ? from_float16(numbers[i]) : from_bfloat16(numbers[i]);
  }
}

void narrow_state(const float* from, int64_t type, void* to, int64_t size) {
  auto* numbers = static_cast<uint16_t*>(to);
  for (int64_t i = 0; i < size; ++i) {
    numbers[i] = type == kGdnFloat16 ? to_float16(from[i]) : to_bfloat16(from[i]);
  }
}

}  // namespace
