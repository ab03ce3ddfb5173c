// What the kernels of backends/cpp/src are called with, and the tasks of a call for a pool of
// threads.
#pragma once

#include <onnxruntime_c_api.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <memory>
#include <new>

#include "levels.h"

namespace {

using Type = ONNXTensorElementDataType;

// The types of tensors, and what the kernels call them.
struct KnownType {
  Type type;
  GdnType kernel_type;
};
constexpr KnownType kTypes[] = {
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, kGdnFloat32},
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, kGdnFloat16},
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16, kGdnBfloat16},
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE, kGdnFloat64},
};

// Null for a type that no tensor here may have.
const KnownType* find_type(Type type) {
  for (const KnownType& known : kTypes) {
    if (known.type == type) return &known;
  }
  return nullptr;
}

const char* name_of(Type type) {
  static constexpr const char* kNames[] = {
      "undefined", "float32", "uint8", "int8",    "uint16", "int16",  "int32",    "int64",
      "string",    "bool",    "float16", "float64", "uint32", "uint64", "complex64", "complex128",
      "bfloat16"};
  return size_t(type) < std::size(kNames) ? kNames[type] : "another type";
}

// Say where a tensor (B, T, heads, ...) of `width` numbers a head lies.
void place(GdnArray& array, void* data, int64_t tokens, int64_t heads, int64_t width) {
  array.data = data;
  array.row = tokens * heads * width;
  array.token = heads * width;
  array.head = width;
}

// A share of the heads, as a task of onnxruntime's threads. Nothing may be thrown through them.
template <class Call>
struct Tasks {
  void (*const kernel)(const Call&, const GdnPlan&, int64_t, float*);
  const Call& call;
  const GdnPlan plan;
  std::atomic<bool> has_failed{false};

  static void run(void* self, size_t index) {
    auto& tasks = *static_cast<Tasks*>(self);
    const std::unique_ptr<float[]> memory(new (std::nothrow) float[size_t(tasks.plan.floats)]);
    if (memory == nullptr) {
      tasks.has_failed = true;
      return;
    }
    tasks.kernel(tasks.call, tasks.plan, int64_t(index), memory.get());
  }
};

}  // namespace
