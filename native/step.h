// One step over all heads: rows of any type, and the heads as tasks for a pool of threads.
#pragma once

#include <onnxruntime_c_api.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <memory>
#include <numeric>

#include "advance.h"

namespace {

using Type = ONNXTensorElementDataType;
constexpr Type kFloat16 = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
constexpr Type kBfloat16 = ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
constexpr Type kFloat32 = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
constexpr Type kFloat64 = ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE;
constexpr Type kTypes[] = {kFloat32, kFloat16, kBfloat16, kFloat64};

int64_t bytes_of(Type type) {
  return type == kFloat64 ? 8 : type == kFloat32 ? 4 : 2;
}

const char* name_of(Type type) {
  static constexpr const char* kNames[] = {
      "undefined", "float32", "uint8", "int8",    "uint16", "int16",  "int32",    "int64",
      "string",    "bool",    "float16", "float64", "uint32", "uint64", "complex64", "complex128",
      "bfloat16"};
  return size_t(type) < std::size(kNames) ? kNames[type] : "another type";
}

template <class To, class From>
void convert(const From* from, To* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = To(from[i]);
}

// Read n elements, the first of them `first`.
template <class C>
void read(const Level& level, Type type, const char* data, int64_t first, int64_t n, C* to) {
  const char* from = data + first * bytes_of(type);
  const auto* narrow = reinterpret_cast<const uint16_t*>(from);
  if (type == kFloat32) return convert(reinterpret_cast<const float*>(from), to, n);
  if (type == kFloat64) return convert(reinterpret_cast<const double*>(from), to, n);
  if constexpr (sizeof(C) == 4) {
    (type == kFloat16 ? level.widen_half : level.widen_bfloat)(narrow, to, n);
  } else {
    for (int64_t i = 0; i < n; ++i) {
      to[i] = type == kFloat16 ? half_to_float(narrow[i]) : bfloat_to_float(narrow[i]);
    }
  }
}

template <class C>
void write(const Level& level, Type type, const C* from, char* data, int64_t first, int64_t n) {
  char* to = data + first * bytes_of(type);
  auto* narrow = reinterpret_cast<uint16_t*>(to);
  if (type == kFloat32) return convert(from, reinterpret_cast<float*>(to), n);
  if (type == kFloat64) return convert(from, reinterpret_cast<double*>(to), n);
  if constexpr (sizeof(C) == 4) {
    (type == kFloat16 ? level.narrow_half : level.narrow_bfloat)(from, narrow, n);
  } else {
    for (int64_t i = 0; i < n; ++i) {
      const float x = float(from[i]);
      narrow[i] = type == kFloat16 ? float_to_half(x) : float_to_bfloat(x);
    }
  }
}

struct Types {
  Type activation, gate, state;
};

// Inputs and outputs of one step, checked. log_alpha and beta may be null.
struct Step {
  const Level* level;
  Types types;
  int64_t B, H, HV, K, V;
  double scale;
  bool has_erase, qk_l2norm;
  const char *q, *k, *v, *log_alpha, *beta, *state;
  char *o, *new_state;
};

constexpr int64_t kBlock = 128;

// k or q of one head, normalised where that is asked for.
template <class C>
void read_key(const Step& x, const char* data, int64_t head, C* to) {
  read(*x.level, x.types.activation, data, head * x.K, x.K, to);
  if (!x.qk_l2norm) return;
  // x / sqrt(sum of x^2 + 1e-6), as in every backend.
  // Eight sums, so that no addition waits for the one before it.
  C squares[8] = {};
  for (int64_t i = 0; i < x.K; ++i) squares[i % 8] += to[i] * to[i];
  const C sum = std::accumulate(std::begin(squares), std::end(squares), C(0));
  const C inverse_norm = C(1) / std::sqrt(sum + C(1e-6));
  for (int64_t i = 0; i < x.K; ++i) to[i] *= inverse_norm;
}

template <class C>
C read_gate(const Step& x, const char* data, int64_t head) {
  C gate;
  read(*x.level, x.types.gate, data, head, 1, &gate);
  return gate;
}

void advance_level(const Level& level, const Head<float>& head) { level.advance32(head); }
void advance_level(const Level& level, const Head<double>& head) { level.advance64(head); }

// A state in the type of the arithmetic is read and written where it is.
template <class C>
void advance_wide(const Step& x, Head<C> head, int64_t row) {
  const int64_t first = row * x.K * x.V;
  head.state = reinterpret_cast<const C*>(x.state) + first;
  head.new_state = reinterpret_cast<C*>(x.new_state) + first;
  head.columns = head.stride = x.V;
  advance_level(*x.level, head);
}

// A 16-bit state is widened into `block` (K, kBlock), a block of columns at a time.
void advance_narrow(const Step& x, Head<float> head, int64_t row, float* block) {
  float *u = head.u, *o = head.o;
  head.state = head.new_state = block;
  for (int64_t j = 0; j < x.V; j += kBlock) {
    const int64_t first = row * x.K * x.V + j;
    head.columns = head.stride = std::min(kBlock, x.V - j);
    head.u = u + j;
    head.o = o + j;
    for (int64_t i = 0; i < x.K; ++i) {
      read(*x.level, x.types.state, x.state, first + i * x.V, head.columns,
           block + i * head.stride);
    }
    advance_level(*x.level, head);
    for (int64_t i = 0; i < x.K; ++i) {
      write(*x.level, x.types.state, block + i * head.stride, x.new_state, first + i * x.V,
            head.columns);
    }
  }
}

// Value heads first, ..., last - 1 of all B HV of them.
template <class C>
void advance_heads(const Step& x, int64_t first, int64_t last) {
  const bool is_narrow = bytes_of(x.types.state) == 2;
  const int64_t block_size = is_narrow ? x.K * std::min(kBlock, x.V) : 0;
  const std::unique_ptr<C[]> scratch(new C[2 * x.K + 2 * x.V + block_size]);
  C *k = scratch.get(), *q = k + x.K, *u = q + x.K, *o = u + x.V, *block = o + x.V;
  for (int64_t row = first; row < last; ++row) {
    const int64_t key_head = row / x.HV * x.H + row % x.HV / (x.HV / x.H);
    read_key(x, x.k, key_head, k);
    read_key(x, x.q, key_head, q);
    read(*x.level, x.types.activation, x.v, row * x.V, x.V, u);
    Head<C> head{};
    head.K = x.K;
    head.k = k;
    head.q = q;
    head.u = u;
    head.o = o;
    head.alpha = x.log_alpha ? std::exp(read_gate<C>(x, x.log_alpha, row)) : C(1);
    head.beta = x.beta ? read_gate<C>(x, x.beta, row) : C(1);
    head.scale = C(x.scale);
    head.has_erase = x.has_erase;
    if constexpr (sizeof(C) == 4) {
      if (is_narrow) {
        advance_narrow(x, head, row, block);
      } else {
        advance_wide(x, head, row);
      }
    } else {
      advance_wide(x, head, row);
    }
    write(*x.level, x.types.activation, o, x.o, row * x.V, x.V);
  }
}

// A share of the heads, as a task of onnxruntime's threads. Nothing may be thrown through them.
struct Tasks {
  const Step& step;
  int64_t heads_each;
  std::atomic<bool> has_failed{false};

  static void run(void* self, size_t index) {
    auto& tasks = *static_cast<Tasks*>(self);
    const Step& x = tasks.step;
    const int64_t first = int64_t(index) * tasks.heads_each;
    const int64_t last = std::min(first + tasks.heads_each, x.B * x.HV);
    try {
      if (x.types.state == kFloat64) {
        advance_heads<double>(x, first, last);
      } else {
        advance_heads<float>(x, first, last);
      }
    } catch (...) {
      tasks.has_failed = true;
    }
  }
};

}  // namespace
