// One level: the same kernels compiled for one kind of processor. `library.cc` chooses among them.
#pragma once

#include "interface_layers.h"

// How a call is cut into tasks, and the floats of memory that a task works in.
struct GdnPlan {
  int64_t tasks, splits, floats;
  // Of a backward whose key heads are several tasks: by value heads, times by columns of V. Each
  // leaves its part of the sums in `sums`, and who is last to finish a key head adds them up.
  int64_t values = 1, sum_floats = 0;
  float* sums = nullptr;
};

// The kernels of what stands around the rule in a layer.
struct GdnLayers {
  GdnPlan (*plan_convolution)(const GdnConvolution&);
  void (*run_convolution)(const GdnConvolution&, const GdnPlan&, int64_t task, float* memory);
  GdnPlan (*plan_convolution_backward)(const GdnConvolution&);
  void (*run_convolution_backward)(const GdnConvolution&, const GdnConvolutionGradients&,
                                   const GdnPlan&, int64_t task, float* memory);
  GdnPlan (*plan_norm)(const GdnNorm&);
  void (*run_norm)(const GdnNorm&, const GdnPlan&, int64_t task, float* memory);
  GdnPlan (*plan_norm_backward)(const GdnNorm&);
  void (*run_norm_backward)(const GdnNorm&, const GdnNormGradients&, const GdnPlan&, int64_t task,
                            float* memory);
  void (*finish_norm_backward)(const GdnNorm&, const GdnNormGradients&);
  GdnPlan (*plan_token)(const GdnToken&);
  void (*run_token)(const GdnToken&, const GdnPlan&, int64_t task, float* memory);
};

struct GdnLevel {
  const char* name;
  int (*is_there)();  // whether the processor has it
  int (*is_best)();   // whether it is faster there than the levels behind it
  GdnPlan (*plan_forward)(const GdnSequences&);
  void (*run_forward)(const GdnSequences&, const GdnPlan&, int64_t task, float* memory);
  GdnPlan (*plan_backward)(const GdnSequences&);
  void (*run_backward)(const GdnSequences&, const GdnGradients&, const GdnPlan&, int64_t task,
                       float* memory);
  void (*finish_backward)(const GdnSequences&, const GdnGradients&, const GdnPlan&, int64_t head,
                          float* memory);
  GdnPlan (*plan_decode)(const GdnSteps&);
  void (*run_decode)(const GdnSteps&, const GdnPlan&, int64_t task, float* memory);
  int64_t (*run_multiply_adds)(int64_t rounds, int64_t type, float* memory);
  const GdnLayers* layers;
};
