// Run one call of the kernels that Python describes on stdin, and write its memory to stdout.
//
// In:  int64 kind (0 forward, 1 backward, 2 decode), count, then the bytes of `count` buffers, the
//      structs of `interface.h`, the buffers. A pointer in a struct is the number of a buffer, 0 for
//      null: buffers are counted from 1.
// Out: int64 status, the buffers.
//
// The first argument is the level to run. Every buffer is an allocation of its own, so that a
// sanitizer sees what is read or written beside it.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "interface.h"

extern "C" {
int gdn_choose_level(const char* name);
int gdn_forward(const GdnSequences* call);
int gdn_backward(const GdnSequences* call, const GdnGradients* gradients);
int gdn_decode(const GdnSteps* call);
}

namespace {

std::vector<void*> buffers;

void fail(const char* why) {
  std::fprintf(stderr, "driver: %s\n", why);
  std::exit(2);
}

template <class Value>
Value read() {
  Value value;
  if (std::fread(&value, sizeof value, 1, stdin) != 1) fail("the call is cut off");
  return value;
}

template <class Pointer>
void relocate(Pointer& pointer) {
  const auto number = reinterpret_cast<uintptr_t>(pointer);
  if (number >= buffers.size()) fail("there is no such buffer");
  pointer = static_cast<Pointer>(buffers[number]);
}

template <class... Arrays>
void relocate_arrays(Arrays&... arrays) {
  (relocate(arrays.data), ...);
}

void relocate_call(GdnSequences& c) {
  relocate_arrays(c.q, c.k, c.v, c.decay, c.beta, c.o);
  relocate(c.initial);
  relocate(c.final);
  relocate(c.states);
  relocate(c.starts);
}

void relocate_call(GdnGradients& g) {
  relocate_arrays(g.d_o, g.d_q, g.d_k, g.d_v, g.d_decay, g.d_beta);
  relocate(g.d_final);
  relocate(g.d_initial);
}

void relocate_call(GdnSteps& c) {
  relocate_arrays(c.q, c.k, c.v, c.decay, c.beta, c.o);
  relocate(c.state);
  relocate(c.new_state);
  relocate(c.states);
  relocate(c.slots);
}

// Read all buffers behind the structs, then let the structs point at them.
template <class... Calls>
void fill(const std::vector<int64_t>& sizes, Calls&... calls) {
  buffers.push_back(nullptr);
  for (int64_t size : sizes) {
    buffers.push_back(std::malloc(size_t(size)));
    if (std::fread(buffers.back(), 1, size_t(size), stdin) != size_t(size)) fail("data is cut off");
  }
  (relocate_call(calls), ...);
}

}  // namespace

int main(int count, char** arguments) {
  if (!gdn_choose_level(count > 1 ? arguments[1] : nullptr)) fail("there is no such level");
  const auto kind = read<int64_t>();
  std::vector<int64_t> sizes(size_t(read<int64_t>()));
  for (int64_t& size : sizes) size = read<int64_t>();
  int64_t status = 0;
  if (kind == 2) {
    auto call = read<GdnSteps>();
    fill(sizes, call);
    status = gdn_decode(&call);
  } else {
    auto call = read<GdnSequences>();
    if (kind == 1) {
      auto gradients = read<GdnGradients>();
      fill(sizes, call, gradients);
      status = gdn_backward(&call, &gradients);
    } else {
      fill(sizes, call);
      status = gdn_forward(&call);
    }
  }
  std::fwrite(&status, sizeof status, 1, stdout);
  for (size_t i = 0; i < sizes.size(); ++i) std::fwrite(buffers[i + 1], 1, size_t(sizes[i]), stdout);
  for (void* buffer : buffers) std::free(buffer);
  return 0;
}
