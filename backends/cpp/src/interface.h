// What Python hands to a kernel: plain structs of pointers, sizes and strides, and nothing of torch.
//
// Strides count elements; the last axis of q, k, v is contiguous. `calls.py` packs the same structs.
#pragma once

#include <stdint.h>

extern "C" {

// The type of the elements of an array.
// float64 is for decoding: a state of it is computed with in float64, another one in float32.
enum GdnType { kGdnFloat32 = 0, kGdnBfloat16 = 1, kGdnFloat16 = 2, kGdnFloat64 = 3 };

// Tokens of a chunk.
enum { kGdnChunk = 32 };

// An array of tokens: (rows, tokens, heads, ...). A gate is (..., HV), or where it is of channels has
// one more axis, which is contiguous: K for a decay and erase, V for write.
struct GdnArray {
  void* data;  // null where the call has no such array
  int64_t row, token, head;
  int64_t type;
};

// One call of gated_delta. Value head h reads key head h / (HV / H). Where `is_apart`, erase and write
// are in place of beta, each of them 1 where it is not there.
struct GdnSequences {
  GdnArray q, k, v, decay, beta, erase, write;
  GdnArray o;             // (B, T, HV, V), or null where only the states are asked for
  float* initial;         // (N, HV, K, V) contiguous, or null for zeros
  float* final;           // (N, HV, K, V) contiguous
  float* states;          // (B, slots, HV, K, V): what the backward starts from; or null
  const int64_t* starts;  // (N + 1) first tokens of packed sequences, or null: a sequence per row
  int64_t N, T, H, HV, K, V;
  int64_t decay_is_log, decay_of_channels, has_erase, qk_l2norm;
  int64_t is_apart, erase_of_channels, write_of_channels;
  int64_t chunks_per_state;
  int64_t least_tasks;  // a backward with fewer key heads, or than threads, is cut further
  float scale;
  int32_t threads;
};

// The gradients of such a call.
struct GdnGradients {
  GdnArray d_o;                 // (B, T, HV, V)
  const float* d_final;         // (N, HV, K, V)
  GdnArray d_q, d_k, d_v;       // in the types of q, k, v; null where only d_initial is asked for
  GdnArray d_decay, d_beta;     // float32; of log alpha where the decay is a logarithm
  GdnArray d_erase, d_write;    // float32
  float* d_initial;             // (N, HV, K, V), or null
};

// One call of gated_delta_step or gated_delta_steps.
//
// Gates may be raw, as a layer projects them: with x = decay + dt_bias, log alpha is -exp(A_log)
// softplus(x), or lower_bound sigmoid(exp(A_log) x); with beta_is_raw, beta = beta_factor
// sigmoid(beta).
enum GdnRawDecay { kGdnGiven = 0, kGdnSoftplus = 1, kGdnBounded = 2 };

struct GdnSteps {
  GdnArray q, k, v, decay, beta, erase, write;
  GdnArray o;               // (B, T, HV, V)
  const void* state;        // rows of (HV, K, V), read
  void* new_state;          // the same, written; may be `state`
  void* states;             // (B, T, HV, K, V), the state behind every token; or null
  const int64_t* slots;     // (B,) row of the state, -1 where skipped; or null: row b
  const float* A_log;       // (HV,), or null for 0
  const float* dt_bias;     // (HV,), or (HV, K) where the decay is of channels, or null for 0
  int64_t state_row, state_head, new_state_row, new_state_head;
  int64_t state_type;
  int64_t B, T, H, HV, K, V;
  int64_t decay_is_log, decay_of_channels, has_erase, qk_l2norm, beta_is_raw;
  int64_t is_apart, erase_of_channels, write_of_channels;  // as in GdnSequences
  int64_t raw_decay;        // a GdnRawDecay: kGdnGiven where decay is alpha or its logarithm
  float scale, beta_factor, lower_bound, unused;
  int64_t threads;          // at least 1
};

}  // extern "C"
