// The kernels of one level: compiled once for each, with GDN_LEVEL, GDN_LANES and GDN_ROWS.
#include "level.h"

#include "backward.h"
#include "decode.h"
#include "level_layers.h"
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
  const bool has_pairs = c.q.type == kGdnBfloat16 && c.T > 16 && !has_channels(c);
  if (has_pairs) return run_forward_bf16(c, t, memory);
#endif
  run_forward(c, t, memory);
}

// Over sequences and key heads; where those are few, over value heads and panels of columns of V, but
// where erase and write stand apart, whose gradients are sums over these columns. Up to 8 threads,
// their number decides nothing, so that it changes no bit.
GdnPlan plan_backward(const GdnSequences& c) {
  const int64_t heads = c.N * c.H, R = c.HV / c.H, panels = round_up(c.V, P) / P;
  const int64_t wanted = c.threads > c.least_tasks ? c.threads : c.least_tasks;
  int64_t values = 1, columns = 1;
  if (c.T > C * c.chunks_per_state) {
    while (values < R && heads * values < wanted) ++values;
    while (!c.is_apart && columns < panels && heads * values * columns < wanted) ++columns;
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

int64_t bytes_of(int64_t type) {
  return type == kGdnFloat64 ? 8 : type == kGdnFloat32 ? 4 : 2;
}

// Over rows and value heads. A task has 64 to 256 KiB of state, which take microseconds: the heads of
// one task overlap, and a thread that is disturbed leaves tasks to others.
GdnPlan plan_decode(const GdnSteps& c) {
  const int64_t heads = c.B * c.HV, bytes = c.K * c.V * bytes_of(c.state_type);
  const int64_t fewest = ((1 << 16) + bytes - 1) / bytes, most = (1 << 18) / bytes;
  int64_t each = least(heads / (4 * c.threads), most);
  if (each < fewest) each = fewest;
  if (c.threads == 1) each = heads;
  const bool is_double = c.state_type == kGdnFloat64;
  const int64_t floats = is_double ? 2 * decode_numbers<double>(c) : decode_numbers<float>(c);
  return {(heads + each - 1) / each, each, floats};
}

void run_decode_task(const GdnSteps& c, const GdnPlan& plan, int64_t index, float* memory) {
  const int64_t first = index * plan.splits, last = least(first + plan.splits, c.B * c.HV);
  switch (c.state_type) {
    case kGdnFloat32:
      return run_heads<float, float>(c, first, last, memory);
    case kGdnBfloat16:
      return run_heads<float, Bfloat16>(c, first, last, memory);
    case kGdnFloat16:
      return run_heads<float, Float16>(c, first, last, memory);
    default:
      return run_heads<double, double>(c, first, last, reinterpret_cast<double*>(memory));
  }
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
                                    run_decode_task,     run_multiply_adds, &layers};
