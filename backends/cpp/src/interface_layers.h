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

// One token of a layer: all that stands between its projections. Value heads come in groups of R
// behind key heads. In arrays of heads `token` is the stride of key heads, `head` that of the value
// heads of one; their last axis is contiguous.
//
//     q, k, v = conv(...), q and k activated if asked to, v always; q, k normalised
//     alpha = exp(-exp(A_log) softplus(a + dt_bias))      beta = beta_factor sigmoid(b)
//     o = norm(rule(q, k, v, alpha, beta)) gate(z)
//
// With a lower bound, alpha = exp(lower_bound sigmoid(exp(A_log) (a + dt_bias))). A decay may be one
// for each key channel: then the last axis of `a` and of `dt_bias` is K.
struct GdnToken {
  GdnArray q, k;             // (B, H, K)
  GdnArray v, z;             // (B, H, R, V); z no array without a gate
  GdnArray a, b;             // (B, H, R[, K]), (B, H, R); a no array without a decay
  GdnArray A_log, dt_bias;   // (H R,), (H R[ K],): `head` is the stride; dt_bias may be no array
  GdnArray weight, bias;     // of a convolution of H K, H K, H R V channels; or no arrays
  GdnArray past, kept;       // (B, channels, inputs) before and behind the token; may be the same
  GdnArray norm;             // (V,): the weight of the norm
  GdnArray o;                // (B, H, R, V)
  void *state, *new_state;   // (B, H R, K, V), rows of a head behind one another; may be the same
  int64_t state_row, state_head, new_state_row, new_state_head, state_type;
  int64_t B, H, R, K, V, taps, inputs;
  int64_t has_silu, has_erase, qk_l2norm, gate, decay_of_channels;
  float scale, beta_factor, eps;
  float lower_bound;         // below 0, or 0 without one
  int64_t threads;
};

}  // extern "C"

// Sums over rows are formed in at most so many parts, whatever the threads.
#define GDN_PARTIALS 256
