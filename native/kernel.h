// The node: its attributes, the types and shapes of its inputs, and one run of it.
#pragma once

#include <onnxruntime_c_api.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <iterator>
#include <new>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "step.h"

namespace {

constexpr const char* kPrefix = "gdn_ops::GatedDeltaStep: ";
constexpr const char* kRules[] = {"gated_delta", "delta", "gated", "linear"};
constexpr const char* kInputs[] = {"q", "k", "v", "log_alpha", "beta", "state"};
enum Input { kQ, kK, kV, kLogAlpha, kBeta, kState, kInputCount };

// A user's mistake, in words; becomes a status before it reaches onnxruntime.
using Mistake = std::string;

// Throws what onnxruntime says. Only for calls that cannot be a user's mistake.
void check(const OrtApi& api, OrtStatus* status) {
  if (status == nullptr) return;
  const std::string message = api.GetErrorMessage(status);
  api.ReleaseStatus(status);
  throw Mistake(message);
}

// Whether a call went well, where not is an answer.
bool is_well(const OrtApi& api, OrtStatus* status) {
  if (status == nullptr) return true;
  api.ReleaseStatus(status);
  return false;
}

// Runs `body`; what it throws is returned as a status.
template <class Body>
OrtStatus* guarded(const OrtApi& api, Body body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const Mistake& mistake) {
    return api.CreateStatus(ORT_INVALID_ARGUMENT, (kPrefix + mistake).c_str());
  } catch (...) {
    return api.CreateStatus(ORT_FAIL, "gdn_ops::GatedDeltaStep: out of memory");
  }
}

// A size that several tensors share, and who fixed it.
struct Axis {
  const char* name;
  int64_t size = -1;
  const char* holder = nullptr;
};

struct Axes {
  Axis* of[4];
  size_t rank;
};

std::string printed(const std::vector<std::string>& parts) {
  std::string all = "(";
  for (size_t i = 0; i < parts.size(); ++i) all += (i ? ", " : "") + parts[i];
  return all + (parts.size() == 1 ? ",)" : ")");
}

std::string printed(const int64_t* sizes, size_t rank) {
  std::vector<std::string> parts;
  std::transform(sizes, sizes + rank, std::back_inserter(parts),
                 [](int64_t size) { return std::to_string(size); });
  return printed(parts);
}

// Checks one shape, and fixes the axes that no tensor before it had.
void check_shape(const char* name, const int64_t* shape, size_t rank,
                 const Axes& axes) {
  bool is_right = rank == axes.rank;
  for (size_t i = 0; is_right && i < rank; ++i) {
    Axis& axis = *axes.of[i];
    if (axis.size < 0) {
      axis.size = shape[i];
      axis.holder = name;
    }
    is_right = axis.size == shape[i];
  }
  if (is_right) return;

  std::vector<std::string> names, sizes;
  std::string reasons;
  for (size_t i = 0; i < axes.rank; ++i) {
    const Axis& axis = *axes.of[i];
    names.emplace_back(axis.name);
    if (rank != axes.rank) continue;
    // An axis that the loop above did not come to is not wrong.
    const int64_t size = axis.size < 0 ? shape[i] : axis.size;
    sizes.push_back(std::to_string(size));
    if (size == shape[i]) continue;
    reasons += std::string(reasons.empty() ? "; " : ", ") + axis.name + " is fixed by " +
               axis.holder;
  }
  const std::string is =
      std::string(name) + " has shape " + printed(shape, rank) + ", should be " + printed(names);
  if (rank != axes.rank) {
    throw Mistake(is + ": " + std::to_string(axes.rank) + " dimensions, not " +
                  std::to_string(rank));
  }
  throw Mistake(is + " = " + printed(sizes) + reasons);
}

struct Kernel {
  Kernel(const OrtApi& api, const OrtKernelInfo* info, const GdnLevel* level, Type activation,
         GdnType state)
      : api_(api), level_(*level), activation_(activation) {
    call_.state_type = state;
    call_.T = 1;
    // onnxruntime does not say how many threads it has.
    call_.threads = std::max(1u, std::thread::hardware_concurrency());
    read_attributes(info);
    check_inputs(info);
  }

  OrtStatus* run(OrtKernelContext* context) const {
    return guarded(api_, [&] { compute(context); });
  }

 private:
  void compute(OrtKernelContext* context) const;
  void* read_input(OrtKernelContext* context, int index,
                         const Axes& axes) const;
  void* create_output(OrtKernelContext* context, size_t index,
                      std::initializer_list<int64_t> shape) const;

  int64_t integer(const OrtKernelInfo* info, const char* name) const {
    int64_t value = 0;
    if (!is_well(api_, api_.KernelInfoGetAttribute_int64(info, name, &value))) {
      throw Mistake(std::string(name) + " is missing, should be an integer attribute");
    }
    return value;
  }

  // Nothing where there is no such attribute.
  std::optional<std::string> text(const OrtKernelInfo* info, const char* name) const {
    size_t size = 0;
    // The first call asks for the size, with the zero at the end.
    if (!is_well(api_, api_.KernelInfoGetAttribute_string(info, name, nullptr, &size))) return {};
    std::string value(size, 0);
    check(api_, api_.KernelInfoGetAttribute_string(info, name, &value[0], &size));
    value.resize(size - 1);
    return value;
  }

  void read_attributes(const OrtKernelInfo* info);
  void read_rule(const OrtKernelInfo* info);
  void check_inputs(const OrtKernelInfo* info);
  void check_type(const OrtKernelInfo* info, Input input, Input other, Type should) const;
  Type type_of(const OrtKernelInfo* info, Input input) const;

  const OrtApi& api_;
  const GdnLevel& level_;
  const Type activation_;
  GdnSteps call_{};  // without what changes from run to run
  std::string rule_;
  bool has_decay_ = true;
  bool is_there_[kInputCount] = {};
};

void Kernel::read_attributes(const OrtKernelInfo* info) {
  call_.H = integer(info, "num_qk_heads");
  call_.HV = integer(info, "num_v_heads");
  if (call_.H < 1) {
    throw Mistake("num_qk_heads is " + std::to_string(call_.H) + ", should be at least 1");
  }
  if (call_.HV < 1 || call_.HV % call_.H != 0) {
    throw Mistake("num_v_heads is " + std::to_string(call_.HV) +
                  ", should be a multiple of num_qk_heads=" + std::to_string(call_.H));
  }

  float scale = 0;
  if (!is_well(api_, api_.KernelInfoGetAttribute_float(info, "scale", &scale))) {
    throw Mistake("scale is missing, should be a float attribute");
  }
  if (!std::isfinite(scale)) {
    throw Mistake("scale is " + std::to_string(scale) + ", should be a finite number");
  }
  call_.scale = scale;

  const int64_t qk_l2norm = integer(info, "qk_l2norm");
  if (qk_l2norm != 0 && qk_l2norm != 1) {
    throw Mistake("qk_l2norm is " + std::to_string(qk_l2norm) + ", should be 0 or 1");
  }
  call_.qk_l2norm = qk_l2norm;
  read_rule(info);
}

void Kernel::read_rule(const OrtKernelInfo* info) {
  const std::string should = "should be one of gated_delta, delta, gated, linear";
  const auto rule = text(info, "rule");
  if (!rule) throw Mistake("rule is missing, " + should);
  rule_ = *rule;
  if (std::find(std::begin(kRules), std::end(kRules), rule_) == std::end(kRules)) {
    throw Mistake("rule is '" + rule_ + "', " + should);
  }
  has_decay_ = rule_ == "gated_delta" || rule_ == "gated";
  call_.decay_is_log = has_decay_;
  call_.has_erase = rule_ == "gated_delta" || rule_ == "delta";

  const std::string decay = text(info, "decay").value_or("scalar");
  call_.decay_of_channels = decay == "channel";
  if (decay == "scalar" || (has_decay_ && call_.decay_of_channels)) return;
  throw Mistake("decay is '" + decay + "', should be " +
                (has_decay_ ? "one of scalar, channel"
                            : "left out: rule '" + rule_ + "' has no decay"));
}

// onnxruntime has checked the types of q and state, and leaves those of the others to us.
void Kernel::check_inputs(const OrtKernelInfo* info) {
  for (int i = 0; i < kInputCount; ++i) {
    // An optional input that is not given has no name.
    size_t size = 0;
    check(api_, api_.KernelInfo_GetInputName(info, i, nullptr, &size));
    is_there_[i] = size > 1;
  }
  if (has_decay_ && !is_there_[kLogAlpha]) {
    throw Mistake("log_alpha is missing, should be an input: rule '" + rule_ + "' has a decay");
  }
  if (!has_decay_ && is_there_[kLogAlpha]) {
    throw Mistake("log_alpha is given, should be absent: rule '" + rule_ + "' has no decay");
  }
  check_type(info, kK, kQ, activation_);
  check_type(info, kV, kQ, activation_);
  for (GdnArray* array : {&call_.q, &call_.k, &call_.v, &call_.o}) {
    array->type = find_type(activation_)->kernel_type;
  }
  for (Input gate : {kBeta, kLogAlpha}) {
    if (!is_there_[gate]) continue;
    const Type type = type_of(info, gate);
    const KnownType* known = find_type(type);
    if (known == nullptr) {
      throw Mistake(std::string(kInputs[gate]) + " has dtype " + name_of(type) +
                    ", should be one of float32, float16, bfloat16, float64");
    }
    (gate == kBeta ? call_.beta : call_.decay).type = known->kernel_type;
  }
  if (is_there_[kBeta] && is_there_[kLogAlpha]) {
    check_type(info, kBeta, kLogAlpha, type_of(info, kLogAlpha));
  }
}

void Kernel::check_type(const OrtKernelInfo* info, Input input, Input other, Type should) const {
  const Type type = type_of(info, input);
  if (type == should) return;
  throw Mistake(std::string(kInputs[input]) + " has dtype " + name_of(type) + ", should be " +
                name_of(should) + ", the dtype of " + kInputs[other]);
}

Type Kernel::type_of(const OrtKernelInfo* info, Input input) const {
  OrtTypeInfo* type_info = nullptr;
  check(api_, api_.KernelInfo_GetInputTypeInfo(info, input, &type_info));
  const OrtTensorTypeAndShapeInfo* tensor = nullptr;
  Type type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  OrtStatus* status = api_.CastTypeInfoToTensorInfo(type_info, &tensor);
  if (status == nullptr && tensor != nullptr) status = api_.GetTensorElementType(tensor, &type);
  api_.ReleaseTypeInfo(type_info);
  check(api_, status);
  return type;
}

void Kernel::compute(OrtKernelContext* context) const {
  GdnSteps x = call_;
  Axis B{"B"}, H{"H", x.H, "num_qk_heads"}, HV{"HV", x.HV, "num_v_heads"}, K{"K"}, V{"V"};
  const Axes decay = {{&B, &HV, &K}, x.decay_of_channels ? size_t(3) : size_t(2)};
  const Axes axes_of[] = {{{&B, &H, &K}, 3}, {{&B, &H, &K}, 3}, {{&B, &HV, &V}, 3},
                          decay,             {{&B, &HV}, 2},    {{&B, &HV, &K, &V}, 4}};
  void* data[kInputCount] = {};
  for (int i = 0; i < kInputCount; ++i) {
    if (is_there_[i]) data[i] = read_input(context, i, axes_of[i]);
  }
  for (const Axis* axis : {&K, &V}) {
    if (axis->size > 0) continue;
    throw Mistake(std::string(axis->holder) + " has " + axis->name + "=0, should be at least 1");
  }
  x.B = B.size;
  x.K = K.size;
  x.V = V.size;
  place(x.q, data[kQ], x.H, x.K);
  place(x.k, data[kK], x.H, x.K);
  place(x.v, data[kV], x.HV, x.V);
  place(x.decay, data[kLogAlpha], x.HV, x.decay_of_channels ? x.K : 1);
  place(x.beta, data[kBeta], x.HV, 1);
  x.state = data[kState];
  place(x.o, create_output(context, 0, {x.B, x.HV, x.V}), x.HV, x.V);
  x.new_state = create_output(context, 1, {x.B, x.HV, x.K, x.V});
  x.state_head = x.new_state_head = x.K * x.V;
  x.state_row = x.new_state_row = x.HV * x.state_head;
  if (x.B == 0) return;

  Tasks tasks{level_, x, level_.plan_decode(x)};
  const size_t count = size_t(tasks.plan.tasks);
  if (count == 1) {
    Tasks::run(&tasks, 0);
  } else {
    check(api_, api_.KernelContext_ParallelFor(context, Tasks::run, count, 0, &tasks));
  }
  if (tasks.has_failed) throw std::bad_alloc();
}

void* Kernel::read_input(OrtKernelContext* context, int index,
                               const Axes& axes) const {
  const OrtValue* value = nullptr;
  check(api_, api_.KernelContext_GetInput(context, index, &value));
  OrtTensorTypeAndShapeInfo* info = nullptr;
  check(api_, api_.GetTensorTypeAndShape(value, &info));
  size_t rank = 0;
  OrtStatus* status = api_.GetDimensionsCount(info, &rank);
  std::vector<int64_t> shape(rank);
  if (status == nullptr) status = api_.GetDimensions(info, shape.data(), rank);
  api_.ReleaseTensorTypeAndShapeInfo(info);
  check(api_, status);
  check_shape(kInputs[index], shape.data(), rank, axes);
  void* data = nullptr;
  // The C API has no other way to read a tensor.
  check(api_, api_.GetTensorMutableData(const_cast<OrtValue*>(value), &data));
  return data;
}

void* Kernel::create_output(OrtKernelContext* context, size_t index,
                            std::initializer_list<int64_t> shape) const {
  OrtValue* value = nullptr;
  check(api_, api_.KernelContext_GetOutput(context, index, shape.begin(), shape.size(), &value));
  void* data = nullptr;
  check(api_, api_.GetTensorMutableData(value, &data));
  return data;
}

}  // namespace
