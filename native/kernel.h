// A node of an operator: its attributes, the types and shapes of its inputs, and one run of it.
#pragma once

#include <onnxruntime_c_api.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <iterator>
#include <new>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "sequence.h"
#include "shapes.h"
#include "step.h"

namespace {

// An operator: its name in errors, and whether its tensors have tokens.
struct Kind {
  const char* name;
  bool is_sequence;
};
constexpr Kind kStep = {"GatedDeltaStep", false}, kSequence = {"GatedDelta", true};

constexpr const char* kRules[] = {"gated_delta", "delta", "gated", "linear"};
constexpr const char* kInputs[] = {"q", "k", "v", "log_alpha", "beta", "state"};
enum Input { kQ, kK, kV, kLogAlpha, kBeta, kState, kInputCount };

struct Kernel {
  Kernel(const OrtApi& api, const OrtKernelInfo* info, const GdnLevel* level, Kind kind,
         Type activation, GdnType state)
      : api_(api), level_(*level), kind_(kind), activation_(activation) {
    call_.state_type = state;
    // onnxruntime does not say how many threads it has.
    call_.threads = std::max(1u, std::thread::hardware_concurrency());
    read_attributes(info);
    check_inputs(info);
  }

  OrtStatus* run(OrtKernelContext* context) const {
    return guarded(api_, kind_.name, [&] { compute(context); });
  }

 private:
  void compute(OrtKernelContext* context) const;
  void run_tokens(OrtKernelContext* context, const GdnSteps& x) const;
  void run_forward(OrtKernelContext* context, const GdnSteps& x) const;
  template <class Call>
  void run_tasks(OrtKernelContext* context, const Call& call, const GdnPlan& plan,
                 void (*kernel)(const Call&, const GdnPlan&, int64_t, float*)) const;
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
  const Kind kind_;
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
  Axis B{"B"}, T{"T"}, H{"H", x.H, "num_qk_heads"}, HV{"HV", x.HV, "num_v_heads"}, K{"K"}, V{"V"};
  const auto tokens = [&](std::initializer_list<Axis*> own) {
    Axes axes = {{&B}, 1};
    if (kind_.is_sequence) axes.of[axes.rank++] = &T;
    for (Axis* axis : own) axes.of[axes.rank++] = axis;
    return axes;
  };
  const Axes decay = x.decay_of_channels ? tokens({&HV, &K}) : tokens({&HV});
  const Axes axes_of[] = {tokens({&H, &K}), tokens({&H, &K}), tokens({&HV, &V}),
                          decay,            tokens({&HV}),    {{&B, &HV, &K, &V}, 4}};
  void* data[kInputCount] = {};
  for (int i = 0; i < kInputCount; ++i) {
    if (is_there_[i]) data[i] = read_input(context, i, axes_of[i]);
  }
  for (const Axis* axis : {&K, &V}) {
    if (axis->size > 0) continue;
    throw Mistake(std::string(axis->holder) + " has " + axis->name + "=0, should be at least 1");
  }
  x.B = B.size;
  x.T = kind_.is_sequence ? T.size : 1;
  x.K = K.size;
  x.V = V.size;
  place(x.q, data[kQ], x.T, x.H, x.K);
  place(x.k, data[kK], x.T, x.H, x.K);
  place(x.v, data[kV], x.T, x.HV, x.V);
  place(x.decay, data[kLogAlpha], x.T, x.HV, x.decay_of_channels ? x.K : 1);
  place(x.beta, data[kBeta], x.T, x.HV, 1);
  x.state = data[kState];
  void* o = kind_.is_sequence ? create_output(context, 0, {x.B, x.T, x.HV, x.V})
                              : create_output(context, 0, {x.B, x.HV, x.V});
  place(x.o, o, x.T, x.HV, x.V);
  x.new_state = create_output(context, 1, {x.B, x.HV, x.K, x.V});
  x.state_head = x.new_state_head = x.K * x.V;
  x.state_row = x.new_state_row = x.HV * x.state_head;
  if (x.B == 0) return;
  if (x.T == 0) {
    std::memmove(x.new_state, x.state, size_t(x.B * x.state_row * bytes_of(x.state_type)));
  } else if (kind_.is_sequence && x.state_type != kGdnFloat64) {
    run_forward(context, x);
  } else {
    run_tokens(context, x);
  }
}

// One token after another. A task keeps some tokens of a head at once; a float64 state loses
// nothing between them.
void Kernel::run_tokens(OrtKernelContext* context, const GdnSteps& x) const {
  constexpr int64_t kTokens = 64;
  for (int64_t first = 0; first < x.T; first += kTokens) {
    const GdnSteps part = tokens_from(x, first, kTokens);
    run_tasks(context, part, level_.plan_decode(part), level_.run_decode);
  }
}

// Chunk after chunk, on a copy of a state of 16 bits.
void Kernel::run_forward(OrtKernelContext* context, const GdnSteps& x) const {
  const bool is_narrow = x.state_type != kGdnFloat32;
  const int64_t size = x.B * x.state_row;
  std::vector<float> copy(is_narrow ? size_t(size) : 0);
  if (is_narrow) widen_state(x.state, x.state_type, copy.data(), size);
  const auto* initial = is_narrow ? copy.data() : static_cast<const float*>(x.state);
  auto* final = is_narrow ? copy.data() : static_cast<float*>(x.new_state);
  const GdnSequences call = sequences_of(x, initial, final);
  run_tasks(context, call, level_.plan_forward(call), level_.run_forward);
  if (is_narrow) narrow_state(copy.data(), x.state_type, x.new_state, size);
}

template <class Call>
void Kernel::run_tasks(OrtKernelContext* context, const Call& call, const GdnPlan& plan,
                       void (*kernel)(const Call&, const GdnPlan&, int64_t, float*)) const {
  Tasks<Call> tasks{kernel, call, plan};
  const size_t count = size_t(plan.tasks);
  if (count == 1) {
    Tasks<Call>::run(&tasks, 0);
  } else {
    check(api_, api_.KernelContext_ParallelFor(context, Tasks<Call>::run, count, 0, &tasks));
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
