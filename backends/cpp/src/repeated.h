// Decode once more: a call like an earlier one, on other values in other memory.
//
// Python checks shapes, strides and types of the first call only (`prepared.py`). What may differ
// after that is checked here, before anything is written.
#pragma once

#include "interface.h"

extern "C" {

// An earlier call, and what others like it are checked for.
struct GdnRepeated {
  GdnSteps steps;       // its pointers and its threads are not read
  int64_t reaches[6];   // bytes from the first to the last of q, k, v, decay, beta, slots
  int64_t state_reach;  // those of a state that is updated in place, else 0
  float decay_low, decay_high, beta_low, beta_high;  // domains of the gates, which are float32
};

}  // extern "C"

namespace {

// Return whether every gate lies in [low, high]; NaN does. A head has `width` of them.
bool are_within(const GdnSteps& c, const GdnArray& gates, int64_t width, float low, float high) {
  if (!gates.data) return true;
  const float* data = static_cast<const float*>(gates.data);
  bool is_outside = false;
  for (int64_t b = 0; b < c.B; ++b) {
    for (int64_t t = 0; t < c.T; ++t) {
      const float* row = data + b * gates.row + t * gates.token;
      for (int64_t h = 0; h < c.HV; ++h) {
        for (int64_t i = 0; i < width; ++i) {
          const float gate = row[h * gates.head + i];
          is_outside |= gate < low || gate > high;
        }
      }
    }
  }
  return !is_outside;
}

// Return whether no input has a byte between the first and the last of a state that is updated.
bool are_apart(const GdnRepeated& earlier, void* const* inputs, void* state) {
  if (!earlier.state_reach) return true;
  const char* first = static_cast<char*>(state);
  const char* end = first + earlier.state_reach;
  for (int i = 0; i < 6; ++i) {
    const char* input = static_cast<char*>(inputs[i]);
    if (input < end && input + earlier.reaches[i] > first) return false;
  }
  return true;
}

}  // namespace

// Run gdn_decode on other tensors; return 2 and write nothing where a gate is out of its domain, which
// a raw one never is, or an input lies in the state that is updated in place. Pointers are null where
// there is no tensor.
GDN_EXPORT int gdn_decode_repeated(const GdnRepeated* earlier, int threads, void* q, void* k,
                                   void* v, void* decay, void* beta, void* slots, void* o,
                                   void* state, void* new_state, void* states, void* A_log,
                                   void* dt_bias) {
  GdnSteps call = earlier->steps;
  call.q.data = q;
  call.k.data = k;
  call.v.data = v;
  call.decay.data = decay;
  call.beta.data = beta;
  call.slots = static_cast<const int64_t*>(slots);
  call.o.data = o;
  call.state = state;
  call.new_state = new_state;
  call.states = states;
  call.A_log = static_cast<const float*>(A_log);
  call.dt_bias = static_cast<const float*>(dt_bias);
  call.threads = threads;
  void* const inputs[] = {q, k, v, decay, beta, slots};
  const int64_t width = call.decay_of_channels ? call.K : 1;
  const bool decays_are_given = !call.raw_decay, betas_are_given = !call.beta_is_raw;
  if ((decays_are_given &&
       !are_within(call, call.decay, width, earlier->decay_low, earlier->decay_high)) ||
      (betas_are_given &&
       !are_within(call, call.beta, 1, earlier->beta_low, earlier->beta_high)) ||
      !are_apart(*earlier, inputs, state)) {
    return 2;
  }
  return gdn_decode(&call);
}
