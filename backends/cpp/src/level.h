// One level: the same kernels compiled for one kind of processor. `library.cc` chooses among them.
#pragma once

#include "interface.h"

// How a call is cut into tasks, and the floats of memory that a task works in.
struct GdnPlan {
  int64_t tasks, splits, floats;
};

struct GdnLevel {
  const char* name;
  int (*is_there)();
  GdnPlan (*plan_forward)(const GdnSequences&);
  void (*run_forward)(const GdnSequences&, const GdnPlan&, int64_t task, float* memory);
  GdnPlan (*plan_backward)(const GdnSequences&);
  void (*run_backward)(const GdnSequences&, const GdnGradients&, int64_t task, float* memory);
  GdnPlan (*plan_decode)(const GdnSteps&);
  void (*run_decode)(const GdnSteps&, const GdnPlan&, int64_t task, float* memory);
};
