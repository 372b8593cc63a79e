// The tensors of a model file as the core receives them: bytes that stay where they are.
#pragma once

#include <cstddef>
#include <map>
#include <span>
#include <string>

#include "core/error.h"

namespace gptx {

enum class DType { kFloat32, kBFloat16, kInt8 };

struct WeightSource {
  DType dtype = DType::kFloat32;  // of the matrices; everything else is float32
  std::map<std::string, std::span<const std::byte>> tensors;

  // The tensor called `name`, which must be `bytes` long.
  const std::byte* get(const std::string& name, size_t bytes) const {
    const auto found = tensors.find(name);
    if (found == tensors.end()) throw ParameterError("tensors", "none", "a tensor " + name);
    if (found->second.size() != bytes) {
      throw ParameterError("tensors[" + name + "]", std::to_string(found->second.size()) + " bytes",
                           std::to_string(bytes) + " bytes");
    }
    return found->second.data();
  }
};

}  // namespace gptx
