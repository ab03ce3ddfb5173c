// The doors of the library: choose a level, share the tasks of a call among threads.
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "levels.h"

namespace {

const GdnLevel* level = nullptr;

// GOMP_parallel of the OpenMP that the process already uses, so that there is one team of threads.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
Parallel parallel = nullptr;

// Memory that a thread keeps between calls.
struct Memory {
  float* data = nullptr;
  int64_t floats = 0;
  float* of(int64_t wanted) {
    if (wanted > floats) {
      std::free(data);
      const size_t bytes = (size_t(wanted) * 4 + 4095) / 4096 * 4096;
      data = static_cast<float*>(std::aligned_alloc(4096, bytes));
      floats = data ? wanted : 0;
    }
    return data;
  }
  ~Memory() { std::free(data); }
};
thread_local Memory memory;

// Results in memory that the system has not given out yet, most likely. All threads need the same
// pages at the same time and would wait for whoever gets one: so each asks for other pages first.
class Fresh {
 public:
  void add(const GdnArray& x, int64_t elements) {
    const int64_t bytes = elements * (x.type == kGdnFloat32 ? 4 : 2);
    const uintptr_t first = reinterpret_cast<uintptr_t>(x.data) + kPage - 1;
    const uintptr_t last = reinterpret_cast<uintptr_t>(x.data) + uintptr_t(bytes);
    if (!x.data || bytes < kLeast) return;
    starts_[arrays_] = first / kPage * kPage;
    pages_ += counts_[arrays_++] = int64_t(last / kPage - first / kPage);
  }

  void populate() {
#if defined(__linux__)
    constexpr int kPopulateWrite = 23;  // Linux 5.14; an older one refuses, which only costs time
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < pages_;) {
      int array = 0;
      for (; i >= counts_[array]; ++array) i -= counts_[array];
      madvise(reinterpret_cast<void*>(starts_[array] + uintptr_t(i) * kPage), kPage,
              kPopulateWrite);
    }
#endif
  }

 private:
  static constexpr uintptr_t kPage = 2 << 20;
  static constexpr int64_t kLeast = 4 << 20;
  uintptr_t starts_[4] = {};
  int64_t counts_[4] = {}, pages_ = 0;
  int arrays_ = 0;
  std::atomic<int64_t> next_{0};
};

// A thread keeps to the share of tasks that it had in the last call: what it wrote there, a state
// above all, is in the cache of its core.
thread_local int64_t favourite = 0;

// Tasks in as many shares as there are threads. Whoever has finished his own helps with the others.
class Shares {
 public:
  Shares(int64_t tasks, int64_t threads)
      : tasks_(tasks), count_(threads < kMost ? threads : int64_t(kMost)) {}

  template <class Run>
  void take(Run run) {
    const int64_t own = claim();
    for (int64_t s = 0; s < count_; ++s) {
      const int64_t share = (own + s) % count_, first = tasks_ * share / count_;
      const int64_t last = tasks_ * (share + 1) / count_;
      std::atomic<int64_t>& taken = next_[share].taken;
      for (int64_t i; (i = first + taken.fetch_add(1, std::memory_order_relaxed)) < last;) run(i);
    }
  }

 private:
  static constexpr int kMost = 64;
  struct alignas(64) Next {
    std::atomic<int64_t> taken{0};
    std::atomic<bool> is_claimed{false};
  };

  int64_t claim() {
    for (int64_t i = 0; i < count_; ++i) {
      const int64_t share = (favourite + i) % count_;
      if (!next_[share].is_claimed.exchange(true)) return favourite = share;
    }
    return favourite % count_;
  }

  int64_t tasks_, count_;
  Next next_[kMost];
};

template <class Call>
struct Work {
  Call call;
  GdnPlan plan;
  void (*run)(const Call&, const GdnPlan&, int64_t, float*);
  Fresh fresh = {};
  std::atomic<int> has_failed{0};
  Shares* shares = nullptr;

  static void share(void* self) {
    auto& work = *static_cast<Work*>(self);
    float* own = memory.of(work.plan.floats);
    if (!own) {
      work.has_failed = 1;
      return;
    }
    work.fresh.populate();
    work.shares->take([&](int64_t i) { work.run(work.call, work.plan, i, own); });
  }

  int start(int64_t threads) {
    if (threads > plan.tasks) threads = plan.tasks;
    Shares all(plan.tasks, threads > 1 ? threads : 1);
    shares = &all;
    if (parallel && threads > 1) {
      parallel(share, this, unsigned(threads), 0);
    } else {
      share(this);
    }
    return has_failed;
  }
};

struct Backward {
  const GdnSequences& call;
  const GdnGradients& gradients;
  std::atomic<int>* left;  // per sequence and key head: the parts that are not finished
};

struct Rounds {
  int64_t rounds, type;
  std::atomic<int64_t>* operations;
};

void run_rounds(const Rounds& call, const GdnPlan&, int64_t, float* own) {
  *call.operations += level->run_multiply_adds(call.rounds, call.type, own);
}

void run_backward(const Backward& both, const GdnPlan& plan, int64_t task, float* own) {
  level->run_backward(both.call, both.gradients, plan, task, own);
  if (!both.left) return;
  const int64_t head = task / plan.splits;
  // The last one sees what the others wrote.
  if (both.left[head].fetch_sub(1, std::memory_order_acq_rel) > 1) return;
  level->finish_backward(both.call, both.gradients, plan, head, own);
}

// A call of what stands around the rule, and its gradients.
template <class Call, class Gradients>
struct Pair {
  const Call& call;
  const Gradients& gradients;
};
using ConvolutionPair = Pair<GdnConvolution, GdnConvolutionGradients>;
using NormPair = Pair<GdnNorm, GdnNormGradients>;

void run_convolution_pair(const ConvolutionPair& x, const GdnPlan& plan, int64_t task, float* own) {
  level->layers->run_convolution_backward(x.call, x.gradients, plan, task, own);
}

void run_norm_pair(const NormPair& x, const GdnPlan& plan, int64_t task, float* own) {
  level->layers->run_norm_backward(x.call, x.gradients, plan, task, own);
}

}  // namespace

#define GDN_EXPORT extern "C" __attribute__((visibility("default")))

// Return the name of the level in use.
GDN_EXPORT const char* gdn_level() { return level->name; }

// Take a level by name, the fastest one for null or ""; return whether it is there.
GDN_EXPORT int gdn_choose_level(const char* name) {
  const GdnLevel* found = find_level(name);
  if (found) level = found;
  return found != nullptr;
}

GDN_EXPORT void gdn_set_parallel(void* function) {
  parallel = reinterpret_cast<Parallel>(function);
}

// Run gated_delta; return 1 where there is no memory.
GDN_EXPORT int gdn_forward(const GdnSequences* call) {
  Work<GdnSequences> work{*call, level->plan_forward(*call), level->run_forward};
  const int64_t rows = call->starts ? 1 : call->N, span = kGdnChunk * call->chunks_per_state;
  work.fresh.add(call->o, rows * call->T * call->HV * call->V);
  const GdnArray states = {call->states, 0, 0, 0, kGdnFloat32};
  work.fresh.add(states, rows * (call->T / span) * call->HV * call->K * call->V);
  return work.start(call->threads);
}

// Run its backward; return 1 where there is no memory.
GDN_EXPORT int gdn_backward(const GdnSequences* call, const GdnGradients* gradients) {
  Work<Backward> work{{*call, *gradients, nullptr}, level->plan_backward(*call), run_backward};
  const int64_t tokens = (call->starts ? 1 : call->N) * call->T;
  work.fresh.add(gradients->d_q, tokens * call->H * call->K);
  work.fresh.add(gradients->d_k, tokens * call->H * call->K);
  work.fresh.add(gradients->d_v, tokens * call->HV * call->V);
  GdnPlan& plan = work.plan;
  // The parts of a key head share nothing of the gradient of the initial state.
  if (plan.splits == 1 || !gradients->d_q.data) return work.start(call->threads);
  const std::unique_ptr<float[]> sums(new (std::nothrow) float[size_t(plan.sum_floats)]);
  const int64_t heads = plan.tasks / plan.splits;
  const std::unique_ptr<std::atomic<int>[]> left(new (std::nothrow) std::atomic<int>[size_t(heads)]);
  if (!sums || !left) return 1;
  for (int64_t i = 0; i < heads; ++i) left[i] = int(plan.splits);
  plan.sums = sums.get();
  work.call.left = left.get();
  return work.start(call->threads);
}

// Run gated_delta_step or gated_delta_steps; return 1 where there is no memory.
GDN_EXPORT int gdn_decode(const GdnSteps* call) {
  Work<GdnSteps> work{*call, level->plan_decode(*call), level->run_decode};
  return work.start(call->threads);
}

// Run rounds of multiply-adds in every thread, of a type of numbers; return the operations of all.
GDN_EXPORT int64_t gdn_multiply_add(int64_t rounds, int64_t type, int32_t threads) {
  std::atomic<int64_t> operations{0};
  const Rounds call{rounds, type, &operations};
  Work<Rounds> work{call, {threads, 1, 16}, run_rounds};
  work.start(threads);
  return operations;
}

// Run a short convolution; return 1 where there is no memory, as all below do.
GDN_EXPORT int gdn_convolution(const GdnConvolution* call) {
  const GdnLayers& layers = *level->layers;
  Work<GdnConvolution> work{*call, layers.plan_convolution(*call), layers.run_convolution};
  return work.start(call->threads);
}

// Run its backward.
GDN_EXPORT int gdn_convolution_backward(const GdnConvolution* call,
                                        const GdnConvolutionGradients* gradients) {
  const ConvolutionPair both{*call, *gradients};
  const GdnPlan plan = level->layers->plan_convolution_backward(*call);
  Work<ConvolutionPair> work{both, plan, run_convolution_pair};
  return work.start(call->threads);
}

// Run a gated norm.
GDN_EXPORT int gdn_norm(const GdnNorm* call) {
  const GdnLayers& layers = *level->layers;
  Work<GdnNorm> work{*call, layers.plan_norm(*call), layers.run_norm};
  return work.start(call->threads);
}

// Run its backward.
GDN_EXPORT int gdn_norm_backward(const GdnNorm* call, const GdnNormGradients* gradients) {
  const NormPair both{*call, *gradients};
  Work<NormPair> work{both, level->layers->plan_norm_backward(*call), run_norm_pair};
  const int status = work.start(call->threads);
  if (!status) level->layers->finish_norm_backward(*call, *gradients);
  return status;
}

// Run one token of a layer.
GDN_EXPORT int gdn_token(const GdnToken* call) {
  const GdnLayers& layers = *level->layers;
  Work<GdnToken> work{*call, layers.plan_token(*call), layers.run_token};
  return work.start(call->threads);
}

#include "repeated.h"
