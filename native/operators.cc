// gdn_ops::GatedDeltaStep and gdn_ops::GatedDelta for onnxruntime's CPU provider, as a custom-op
// library.
//
//     S'  = diag(alpha_t) S_{t-1}           forget first            alpha = exp(log_alpha)
//     u_t = beta_t (v_t - S'^T k_t)         then the error          (without erase: beta_t v_t)
//     S_t = S' + k_t u_t^T                  then write
//     o_t = scale S_t^T q_t                 read after the write
//
// Inputs q, k (B,H,K), v (B,HV,V), log_alpha, beta (B,HV), state (B,HV,K,V); outputs o (B,HV,V)
// and new_state. Value head h reads key head h // (HV / H). log_alpha is there exactly where the
// rule has a decay, and is (B,HV,K), of each key channel, where the attribute decay is "channel";
// beta that is not there is 1. Arithmetic is float32, float64 with a float64 state, whatever the
// other tensors are.
//
// GatedDelta does so for T tokens of a row, the second axis of all tensors but the states.
//
// The arithmetic is that of the backend `cpp`: decode.h of backends/cpp/src for a token, forward.h
// for a prompt, compiled for every level of the machine. new_state may be state itself (bound in
// place), and o of a step may be v: every element is read before it is written, and no column reads
// another column.

#include <onnxruntime_c_api.h>

#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "kernel.h"

#if defined(_WIN32)
#define GDN_EXPORT extern "C" __declspec(dllexport)
#elif defined(__GNUC__)
#define GDN_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace {

// The oldest C API with all that is called here. It is asked for by its number, not by
// ORT_API_VERSION, so that a library built with new headers loads in an older onnxruntime.
constexpr uint32_t kApiVersion = 18;
constexpr const char* kOldestRuntime = "1.18";
static_assert(ORT_API_VERSION >= kApiVersion, "the headers are older than onnxruntime 1.18");

// An operator for one type of q, k, v and one of the state. The types of the other inputs are
// open, and the kernel checks them: onnxruntime would only say that no kernel matches.
struct Operator : OrtCustomOp {
  Operator(const GdnLevel* level, Kind kind, Type activation, const KnownType& state)
      : OrtCustomOp{}, level(level), kind(kind), activation(activation), state(state) {
    version = kApiVersion;
    OrtCustomOp::GetName = [](const OrtCustomOp* self) {
      return static_cast<const Operator*>(self)->kind.name;
    };
    OrtCustomOp::GetExecutionProviderType = [](const OrtCustomOp*) -> const char* {
      return "CPUExecutionProvider";
    };
    OrtCustomOp::GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return kInputCount; };
    OrtCustomOp::GetInputType = [](const OrtCustomOp* self, size_t index) {
      const auto& op = *static_cast<const Operator*>(self);
      return index == kQ       ? op.activation
             : index == kState ? op.state.type
                               : ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    };
    OrtCustomOp::GetInputCharacteristic = [](const OrtCustomOp*, size_t index) {
      return index == kLogAlpha || index == kBeta ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
    };
    OrtCustomOp::GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
    OrtCustomOp::GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 2; };
    OrtCustomOp::GetOutputType = [](const OrtCustomOp* self, size_t index) {
      const auto& op = *static_cast<const Operator*>(self);
      return index == 0 ? op.activation : op.state.type;
    };
    OrtCustomOp::GetOutputCharacteristic = [](const OrtCustomOp*, size_t) {
      return INPUT_OUTPUT_REQUIRED;
    };
    OrtCustomOp::GetStartVersion = [](const OrtCustomOp*) { return 1; };
    OrtCustomOp::GetEndVersion = [](const OrtCustomOp*) { return 1; };
    OrtCustomOp::CreateKernelV2 = [](const OrtCustomOp* self, const OrtApi* api,
                                     const OrtKernelInfo* info, void** kernel) {
      const auto& op = *static_cast<const Operator*>(self);
      return guarded(*api, op.kind.name, [&] {
        *kernel = new Kernel(*api, info, op.level, op.kind, op.activation, op.state.kernel_type);
      });
    };
    OrtCustomOp::KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
      return static_cast<Kernel*>(kernel)->run(context);
    };
    OrtCustomOp::KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    OrtCustomOp::GetMayInplace = [](int** inputs, int** outputs) -> size_t {
      static int state_input = kState, state_output = 1;
      *inputs = &state_input;
      *outputs = &state_output;
      return 1;
    };
    OrtCustomOp::ReleaseMayInplace = [](int*, int*) {};
  }

  const GdnLevel* level;
  Kind kind;
  Type activation;
  KnownType state;
};

// What a session needs for as long as it lives: it goes when the library is unloaded.
class Domain {
 public:
  Domain(const OrtApi& api, const GdnLevel* level) : api_(api) {
    operators_.reserve(2 * std::size(kTypes) * std::size(kTypes));
    check(api, api.CreateCustomOpDomain("gdn_ops", &domain_));
    for (const Kind& kind : {kStep, kSequence}) {
      for (const KnownType& activation : kTypes) {
        for (const KnownType& state : kTypes) {
          operators_.emplace_back(level, kind, activation.type, state);
          check(api, api.CustomOpDomain_Add(domain_, &operators_.back()));
        }
      }
    }
  }
  Domain(const Domain&) = delete;
  Domain& operator=(const Domain&) = delete;
  ~Domain() {
    if (domain_ != nullptr) api_.ReleaseCustomOpDomain(domain_);
  }

  bool is_for(const OrtApi& api, const GdnLevel* level) const {
    return &api_ == &api && operators_[0].level == level;
  }
  OrtCustomOpDomain* get() const { return domain_; }

 private:
  const OrtApi& api_;
  OrtCustomOpDomain* domain_ = nullptr;
  std::vector<Operator> operators_;
};

// One domain for all sessions of an onnxruntime.
OrtCustomOpDomain* domain_of(const OrtApi& api, const GdnLevel* level) {
  static std::mutex mutex;
  static std::vector<std::unique_ptr<Domain>> domains;
  const std::lock_guard<std::mutex> lock(mutex);
  for (const auto& domain : domains) {
    if (domain->is_for(api, level)) return domain->get();
  }
  domains.push_back(std::make_unique<Domain>(api, level));
  return domains.back()->get();
}

std::string level_names() {
  std::string names;
  for (const GdnLevel* level : kLevels) {
    if (level->is_there()) names += (names.empty() ? "" : ", ") + std::string(level->name);
  }
  return names;
}

}  // namespace

GDN_EXPORT OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options,
                                                     const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(kApiVersion);
  if (api == nullptr) {
    // The first API can make a status, in every onnxruntime.
    const std::string message = std::string("gdn_ops: onnxruntime is ") +
                                base->GetVersionString() + ", should be " + kOldestRuntime +
                                " or newer for the custom-op library; without it the "
                                "function in the file runs";
    return base->GetApi(1)->CreateStatus(ORT_FAIL, message.c_str());
  }
  return guarded(*api, kStep.name, [&] {
    const char* wanted = std::getenv("GDN_OPS_NATIVE_LEVEL");
    const GdnLevel* level = find_level(wanted);
    if (level == nullptr) {
      throw Mistake("GDN_OPS_NATIVE_LEVEL is '" + std::string(wanted) + "', should be one of " +
                    level_names() + " on this machine");
    }
    check(*api, api->AddCustomOpDomain(options, domain_of(*api, level)));
  });
}
