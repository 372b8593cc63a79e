// The names by which Python knows the choices of the core.
#pragma once

#include <string>

#include "core/error.h"
#include "core/precision.h"

namespace gptx {

inline Precision precision_named(const std::string& name) {
  if (name == "float32") return Precision::kFloat32;
  if (name == "bfloat16") return Precision::kBFloat16;
  if (name == "int8") return Precision::kInt8;
  if (name == "int8-fast") return Precision::kInt8Fast;
  throw ParameterError("precision", name, "one of float32, bfloat16, int8, int8-fast");
}

inline KvType kv_type_named(const std::string& name) {
  if (name == "float32") return KvType::kFloat32;
  if (name == "bfloat16") return KvType::kBFloat16;
  if (name == "int8") return KvType::kInt8;
  throw ParameterError("kv_cache_dtype", name, "one of float32, bfloat16, int8");
}

}  // namespace gptx
