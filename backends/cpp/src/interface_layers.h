// What Python hands to the kernels of what stands around the rule in a layer: `layers.py` packs the
// same structs. Strides count elements.
#pragma once

#include "interface.h"

extern "C" {

// A causal depthwise convolution: p_t = sum_j w_j x_{t - taps + 1 + j} + bias, y = p or silu(p).
// In arrays of channels `head` is the stride of the channels.
struct GdnConvolution {
  GdnArray x, y;          // (B, T, D)
  GdnArray weight;        // (D, taps): `token` is the stride of the taps
  GdnArray bias;          // (D,), or no array
  GdnArray state;         // (N, D, kept): the inputs before each sequence, or no array for zeros
  GdnArray final;         // (N, D, kept): its last inputs, or no array; `state` itself for one token
  const int64_t* starts;  // (N + 1) first tokens of sequences packed into one row, or null
  const int64_t* lengths; // (N,) tokens of each row before its padding, or null
  int64_t B, N, T, D, taps, kept;  // kept is taps - 1 or more; taps - 1 in a backward
  int64_t has_silu, threads;
};

// The gradients of such a call.
struct GdnConvolutionGradients {
  GdnArray d_y;      // (B, T, D)
  GdnArray d_final;  // (N, D, taps - 1), or no array for zeros
  GdnArray d_x;      // like x, or no array
  GdnArray d_state;  // (N, D, taps - 1), or no array
  float* d_weight;   // (D, taps) contiguous
  float* d_bias;     // (D,) contiguous
};

// What gates a normalised output.
enum GdnGate { kGdnNoGate = 0, kGdnSilu = 1, kGdnSigmoid = 2 };

// A gated norm: y = w x / sqrt(mean(x^2) + eps) gate(z), of rows of `width`, contiguous ones.
struct GdnNorm {
  GdnArray x, z, y;  // (B, T, H, width); z no array without a gate
  GdnArray weight;   // (width,): `head` is the stride
  int64_t B, T, H, width, gate;
  float eps;
  int32_t threads;
};

// The gradients of such a call.
struct GdnNormGradients {
  GdnArray d_y, d_x, d_z;  // (B, T, H, width); d_z no array without a gate
  float* partials;         // (GDN_PARTIALS, width), to work in
  float* d_weight;         // (width,)
};

}  // extern "C"

// Sums over rows are formed in at most so many parts, whatever the threads.
#define GDN_PARTIALS 256
