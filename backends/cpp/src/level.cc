// The kernels of one level: compiled once for each, with GDN_LEVEL, GDN_LANES and GDN_ROWS.
#include "level.h"

#include "backward.h"
#include "decode.h"
#include "processor.h"
#include "rate.h"
#if GDN_FEATURES == 4
#include "forward_bf16.h"
#endif

namespace {

// Over sequences and key heads, and over panels of columns of V where those are few.
GdnPlan plan_forward(const GdnSequences& c) {
  const int64_t heads = c.N * c.H, panels = round_up(c.V, P) / P, threads = c.threads;
  int64_t splits = 1;
  while (splits < panels && heads * splits < 4 * threads && heads * splits % threads) ++splits;
  const int64_t each = round_up(panels, splits) / splits;
#if GDN_FEATURES == 4
  return {heads * splits, splits, forward_bf16_floats(c, each)};
#else
  return {heads * splits, splits, forward_floats(c, each)};
#endif
}

void run_forward_task(const GdnSequences& c, const GdnPlan& plan, int64_t index, float* memory) {
  const int64_t panels = round_up(c.V, P) / P, each = round_up(panels, plan.splits) / plan.splits;
  Task t = task_of(c, index / plan.splits / c.H);
  t.head = index / plan.splits % c.H;
  t.panel = index % plan.splits * each;
  t.panels = least(each, panels - t.panel);
  if (t.panels <= 0) return;
#if GDN_FEATURES == 4
  // A few tokens gain nothing from pairs, and are exact without them.
  if (c.q.type == kGdnBfloat16 && c.T > 16) return run_forward_bf16(c, t, memory);
#endif
  run_forward(c, t, memory);
}

// Over sequences and key heads; where those are few, over value heads and panels of columns of V.
// Up to 8 threads, their number decides nothing, so that it changes no bit.
GdnPlan plan_backward(const GdnSequences& c) {
  const int64_t heads = c.N * c.H, R = c.HV / c.H, panels = round_up(c.V, P) / P;
  const int64_t wanted = c.threads > 8 ? c.threads : 8;
  int64_t values = 1, columns = 1;
  if (c.T > C * c.chunks_per_state) {
    while (values < R && heads * values < wanted) ++values;
    while (columns < panels && heads * values * columns < wanted) ++columns;
  }
  const int64_t parts = values * columns;
  return {heads * parts, parts, backward_floats(c), values, parts > 1 ? sum_floats(c, parts) : 0,
          nullptr};
}

// Part `part` of key head `index` of all, with its share of value heads and columns.
Task backward_task(const GdnSequences& c, const GdnPlan& plan, int64_t index, int64_t part) {
  const int64_t R = c.HV / c.H, panels = round_up(c.V, P) / P, columns = plan.splits / plan.values;
  const int64_t value = part / columns, column = part % columns;
  Task t = task_of(c, index / c.H);
  t.head = index % c.H;
  t.value = value * R / plan.values;
  t.values = (value + 1) * R / plan.values - t.value;
  t.panel = column * panels / columns;
  t.panels = (column + 1) * panels / columns - t.panel;
  return t;
}

void run_backward_task(const GdnSequences& c, const GdnGradients& to, const GdnPlan& plan,
                       int64_t index, float* memory) {
  const int64_t part = index % plan.splits;
  const Task t = backward_task(c, plan, index / plan.splits, part);
  run_backward(c, to, t, plan.sums ? sums_of(c, plan.sums, plan.splits, part) : Sums{}, memory);
}

void finish_backward(const GdnSequences& c, const GdnGradients& to, const GdnPlan& plan,
                     int64_t head, float* memory) {
  const Task t = backward_task(c, plan, head, 0);
  add_sums(c, to, t, plan.sums, plan.values, plan.splits / plan.values, memory);
}

// Over rows and value heads; a task is worth a microsecond or more.
GdnPlan plan_decode(const GdnSteps& c) {
  const int64_t heads = c.B * c.HV, each = 1 + 4096 / (c.K * c.V * c.T);
  return {(heads + each - 1) / each, each, decode_floats(c)};
}

void run_decode_task(const GdnSteps& c, const GdnPlan& plan, int64_t index, float* memory) {
  const int64_t last = least((index + 1) * plan.splits, c.B * c.HV);
  for (int64_t i = index * plan.splits; i < last; ++i) run_decode(c, i / c.HV, i % c.HV, memory);
}

}  // namespace

#define GDN_NAME(level) gdn_level_##level
#define GDN_OF(level) GDN_NAME(level)
#define GDN_QUOTE(level) #level
#define GDN_TEXT(level) GDN_QUOTE(level)

extern const GdnLevel GDN_OF(GDN_LEVEL);
const GdnLevel GDN_OF(GDN_LEVEL) = {GDN_TEXT(GDN_LEVEL), is_there,          is_best,
                                    plan_forward,        run_forward_task,  plan_backward,
                                    run_backward_task,   finish_backward,   plan_decode,
                                    run_decode_task,     run_multiply_adds};
