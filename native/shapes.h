// What a user's mistake is, and whether the shapes of tensors agree.
#pragma once

#include <onnxruntime_c_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <iterator>
#include <new>
#include <string>
#include <vector>

namespace {

// A user's mistake, in words; becomes a status before it reaches onnxruntime.
using Mistake = std::string;

// Throws what onnxruntime says. Only for calls that cannot be a user's mistake.
void check(const OrtApi& api, OrtStatus* status) {
  if (status == nullptr) return;
  const std::string message = api.GetErrorMessage(status);
  api.ReleaseStatus(status);
  throw Mistake(message);
}

// Whether a call went well, where not is an answer.
bool is_well(const OrtApi& api, OrtStatus* status) {
  if (status == nullptr) return true;
  api.ReleaseStatus(status);
  return false;
}

// Runs `body` of an operator; what it throws is returned as a status.
template <class Body>
OrtStatus* guarded(const OrtApi& api, const char* name, Body body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const Mistake& mistake) {
    const std::string text = std::string("gdn_ops::") + name + ": " + mistake;
    return api.CreateStatus(ORT_INVALID_ARGUMENT, text.c_str());
  } catch (...) {
    return api.CreateStatus(ORT_FAIL, "gdn_ops: out of memory");
  }
}

// A size that several tensors share, and who fixed it.
struct Axis {
  const char* name;
  int64_t size = -1;
  const char* holder = nullptr;
};

struct Axes {
  Axis* of[4];
  size_t rank;
};

std::string printed(const std::vector<std::string>& parts) {
  std::string all = "(";
  for (size_t i = 0; i < parts.size(); ++i) all += (i ? ", " : "") + parts[i];
  return all + (parts.size() == 1 ? ",)" : ")");
}

std::string printed(const int64_t* sizes, size_t rank) {
  std::vector<std::string> parts;
  std::transform(sizes, sizes + rank, std::back_inserter(parts),
                 [](int64_t size) { return std::to_string(size); });
  return printed(parts);
}

// Checks one shape, and fixes the axes that no tensor before it had.
void check_shape(const char* name, const int64_t* shape, size_t rank,
                 const Axes& axes) {
  bool is_right = rank == axes.rank;
  for (size_t i = 0; is_right && i < rank; ++i) {
    Axis& axis = *axes.of[i];
    if (axis.size < 0) {
      axis.size = shape[i];
      axis.holder = name;
    }
    is_right = axis.size == shape[i];
  }
  if (is_right) return;

  std::vector<std::string> names, sizes;
  std::string reasons;
  for (size_t i = 0; i < axes.rank; ++i) {
    const Axis& axis = *axes.of[i];
    names.emplace_back(axis.name);
    if (rank != axes.rank) continue;
    // An axis that the loop above did not come to is not wrong.
    const int64_t size = axis.size < 0 ? shape[i] : axis.size;
    sizes.push_back(std::to_string(size));
    if (size == shape[i]) continue;
    reasons += std::string(reasons.empty() ? "; " : ", ") + axis.name + " is fixed by " +
               axis.holder;
  }
  const std::string is =
      std::string(name) + " has shape " + printed(shape, rank) + ", should be " + printed(names);
  if (rank != axes.rank) {
    throw Mistake(is + ": " + std::to_string(axes.rank) + " dimensions, not " +
                  std::to_string(rank));
  }
  throw Mistake(is + " = " + printed(sizes) + reasons);
}

}  // namespace
