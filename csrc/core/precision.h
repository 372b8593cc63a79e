// How a model computes: the types of its products and of its KV cache. Plain enums, so that kernels can
// include it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gptx {

// How a matrix is multiplied: what its weights are stored as and what the activations become.
enum class Precision : uint8_t {
  kFloat32,   // float32 by float32
  kBFloat16,  // bfloat16 by bfloat16, summed in float32
  kInt8,      // int8 by int16, summed in int32: the accuracy of the weights alone
  kInt8Fast,  // int8 by uint8, summed in int32
};
inline constexpr size_t kPrecisions = 4;

// What the KV cache holds.
enum class KvType : uint8_t {
  kFloat32,
  kBFloat16,
  kInt8,  // with a scale for each head and position
};
inline constexpr size_t kKvTypes = 3;

}  // namespace gptx
