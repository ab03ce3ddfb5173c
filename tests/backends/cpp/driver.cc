// Run one call of the kernels that Python describes on stdin, and write its memory to stdout.
//
// In:  int64 door, number of buffers, number of pointers, bytes of the structs;
//      the bytes of every buffer; of every pointer its place in the structs and its buffer;
//      the structs of the door, one behind the other; the buffers.
// Out: int64 status, the buffers.
//
// The first argument is the level to run. Every buffer is an allocation of its own, so that a
// sanitizer sees what is read or written beside it.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "interface_layers.h"

struct GdnRepeated;  // begins with its steps, whose pointers are those of the call

extern "C" {
int gdn_choose_level(const char* name);
int gdn_forward(const GdnSequences* call);
int gdn_backward(const GdnSequences* call, const GdnGradients* gradients);
int gdn_decode(const GdnSteps* call);
int gdn_decode_repeated(const GdnRepeated* earlier, int threads, void* q, void* k, void* v,
                        void* decay, void* beta, void* slots, void* o, void* state,
                        void* new_state, void* states, void* A_log, void* dt_bias);
int gdn_convolution(const GdnConvolution* call);
int gdn_convolution_backward(const GdnConvolution* call, const GdnConvolutionGradients* gradients);
int gdn_norm(const GdnNorm* call);
int gdn_norm_backward(const GdnNorm* call, const GdnNormGradients* gradients);
int gdn_token(const GdnToken* call);
}

namespace {

[[noreturn]] void fail(const char* why) {
  std::fprintf(stderr, "driver: %s\n", why);
  std::exit(2);
}

void read(void* to, size_t bytes) {
  if (std::fread(to, 1, bytes, stdin) != bytes) fail("the call is cut off");
}

std::vector<int64_t> read_numbers(size_t count) {
  std::vector<int64_t> numbers(count);
  read(numbers.data(), 8 * count);
  return numbers;
}

template <class Call>
const Call* as(const std::vector<int64_t>& structs, size_t at = 0) {
  if (8 * structs.size() < at + sizeof(Call)) fail("a struct is cut off");
  return reinterpret_cast<const Call*>(reinterpret_cast<const char*>(structs.data()) + at);
}

template <class Call>
int call(int (*door)(const Call*), const std::vector<int64_t>& structs) {
  return door(as<Call>(structs));
}

template <class Call, class Gradients>
int call(int (*door)(const Call*, const Gradients*), const std::vector<int64_t>& structs) {
  return door(as<Call>(structs), as<Gradients>(structs, sizeof(Call)));
}

int decode_again(const std::vector<int64_t>& structs) {
  const GdnSteps& s = *as<GdnSteps>(structs);
  const auto* earlier = reinterpret_cast<const GdnRepeated*>(structs.data());
  return gdn_decode_repeated(earlier, 1, s.q.data, s.k.data, s.v.data, s.decay.data, s.beta.data,
                             const_cast<int64_t*>(s.slots), s.o.data, const_cast<void*>(s.state),
                             s.new_state, s.states, const_cast<float*>(s.A_log),
                             const_cast<float*>(s.dt_bias));
}

// The doors as `cpp_driver.py` numbers them.
int run(int64_t door, const std::vector<int64_t>& structs) {
  switch (door) {
    case 0:
      return call(gdn_forward, structs);
    case 1:
      return call(gdn_backward, structs);
    case 2:
      return call(gdn_decode, structs);
    case 3:
      return decode_again(structs);
    case 4:
      return call(gdn_convolution, structs);
    case 5:
      return call(gdn_convolution_backward, structs);
    case 6:
      return call(gdn_norm, structs);
    case 7:
      return call(gdn_norm_backward, structs);
    case 8:
      return call(gdn_token, structs);
  }
  fail("there is no such door");
}

}  // namespace

int main(int count, char** arguments) {
  if (!gdn_choose_level(count > 1 ? arguments[1] : nullptr)) fail("there is no such level");
  const auto head = read_numbers(4);
  const auto sizes = read_numbers(size_t(head[1])), places = read_numbers(2 * size_t(head[2]));
  auto structs = read_numbers(size_t(head[3]) / 8);
  std::vector<void*> buffers;
  for (int64_t size : sizes) {
    buffers.push_back(std::malloc(size_t(size)));
    read(buffers.back(), size_t(size));
  }
  for (size_t i = 0; i < places.size(); i += 2) {
    structs.at(size_t(places[i]) / 8) = int64_t(intptr_t(buffers.at(size_t(places[i + 1]))));
  }
  const int64_t status = run(head[0], structs);
  std::fwrite(&status, sizeof status, 1, stdout);
  for (size_t i = 0; i < sizes.size(); ++i) std::fwrite(buffers[i], 1, size_t(sizes[i]), stdout);
  for (void* buffer : buffers) std::free(buffer);
  return 0;
}
