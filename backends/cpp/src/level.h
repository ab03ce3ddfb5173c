// One level: the same kernels compiled for one kind of processor. `library.cc` chooses among them.
#pragma once

#include "interface.h"

// How a call is cut into tasks, and the floats of memory that a task works in.
struct GdnPlan {
  int64_t tasks, splits, floats;
  // Of a backward whose key heads are several tasks: by value heads, times by columns of V. Each
  // leaves its part of the sums in `sums`, and who is last to finish a key head adds them up.
  int64_t values = 1, sum_floats = 0;
  float* sums = nullptr;
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
};
