// How the calls of what stands around the rule are cut into tasks, at one level.
#pragma once

#include "convolution_backward.h"
#include "level.h"
#include "norm.h"
#include "token.h"

namespace {

constexpr int64_t SPAN = 64;          // tokens of a task of a convolution
constexpr int64_t WIDTH = 1008;       // most channels of a task: rows of 4 KiB share cache sets
constexpr int64_t NUMBERS = 1 << 14;  // of a task that is worth a thread

GDN_INLINE GdnPlan cut(int64_t tasks, int64_t splits, int64_t floats) {
  GdnPlan plan = {};
  plan.tasks = tasks;
  plan.splits = splits;
  plan.floats = floats;
  return plan;
}

// Over rows, spans of tokens and blocks of channels.
GdnPlan plan_convolution(const GdnConvolution& c) {
  const int64_t spans = (c.T + SPAN - 1) / SPAN;
  int64_t width = least(round_up(c.D, W), WIDTH);
  if (c.B * c.T * c.D <= NUMBERS) width = round_up(c.D, W);
  const int64_t blocks = (c.D + width - 1) / width;
  return cut(c.B * spans * blocks, width, convolution_floats(c, width));
}

void run_convolution_task(const GdnConvolution& c, const GdnPlan& plan, int64_t index,
                          float* memory) {
  const int64_t blocks = (c.D + plan.splits - 1) / plan.splits, spans = (c.T + SPAN - 1) / SPAN;
  const int64_t row = index / blocks / spans, from = index / blocks % spans * SPAN;
  Channels x;
  load_channels(c, index % blocks * plan.splits, plan.splits, memory, x);
  run_convolution(c, row, from, least(from + SPAN, c.T), x);
}

// Over blocks of channels: sums over tokens belong to one task.
GdnPlan plan_convolution_backward(const GdnConvolution& c) {
  int64_t width = round_up((c.D + 4 * c.threads - 1) / (4 * c.threads), W);
  width = least(width < 64 ? 64 : width, WIDTH);
  return cut((c.D + width - 1) / width, width, convolution_backward_floats(c, width));
}

void run_convolution_backward_task(const GdnConvolution& c, const GdnConvolutionGradients& to,
                                   const GdnPlan& plan, int64_t index, float* memory) {
  run_convolution_backward(c, to, index * plan.splits, plan.splits, memory);
}

// Over rows.
GdnPlan plan_norm(const GdnNorm& c) {
  const int64_t rows = c.B * c.T * c.H, each = 1 + NUMBERS / (c.width + 1);
  return cut((rows + each - 1) / each, each, norm_floats(c));
}

void run_norm_task(const GdnNorm& c, const GdnPlan& plan, int64_t index, float* memory) {
  const int64_t first = index * plan.splits;
  run_norm(c, first, least(first + plan.splits, c.B * c.T * c.H), memory);
}

// Over the parts of the sum over rows.
GdnPlan plan_norm_backward(const GdnNorm& c) {
  const int64_t rows = c.B * c.T * c.H, each = norm_part(c);
  return cut((rows + each - 1) / each, each, norm_floats(c));
}

void run_norm_backward_task(const GdnNorm& c, const GdnNormGradients& to, const GdnPlan&,
                            int64_t index, float* memory) {
  run_norm_backward(c, to, index, memory);
}

// Over rows and key heads; a task is worth a microsecond or more.
GdnPlan plan_token(const GdnToken& c) {
  const int64_t heads = c.B * c.H, each = 1 + 8192 / (c.R * c.K * c.V);
  return cut((heads + each - 1) / each, each, token_floats(c));
}

void run_token_task(const GdnToken& c, const GdnPlan& plan, int64_t index, float* memory) {
  const int64_t last = least((index + 1) * plan.splits, c.B * c.H);
  for (int64_t i = index * plan.splits; i < last; ++i) run_token(c, i / c.H, i % c.H, memory);
}

constexpr GdnLayers layers = {
    plan_convolution, run_convolution_task, plan_convolution_backward,
    run_convolution_backward_task, plan_norm, run_norm_task, plan_norm_backward,
    run_norm_backward_task, finish_norm_backward, plan_token, run_token_task};

}  // namespace
