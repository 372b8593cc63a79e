// A weight matrix in device memory, in tiles.
#pragma once

#include <string>

#include "core/precision.h"
#include "core/weights.h"
#include "cuda/device.h"
#include "cuda/kernels/products.h"

namespace gptx::cuda {

struct Matrix {
  const std::byte* tiles = nullptr;  // [panels, tiles, 512 bytes]
  const float* scale = nullptr;      // [N], int8 only
  const int32_t* colsum = nullptr;   // [N], int8 only
  int outputs = 0, panels = 0, depth_tiles = 0, depth = 0, inputs = 1;

  // The matrix "<base>.weight" of the source, with n outputs and depth inputs, for a precision. bfloat16 and int8 weights
  // are expanded where float32 is asked for.
  static Matrix from(Device& device, const WeightSource& source, const std::string& base, size_t n, size_t depth,
                     Precision precision);

  WeightsView view() const { return {tiles, scale, depth_tiles, inputs}; }
};

// A tensor as it is, in device memory.
template <class T>
const T* copy_to(Device& device, const T* host, size_t n, const char* what) {
  T* const p = static_cast<T*>(device.allocate(n * sizeof(T), what));
  device.upload(p, host, n * sizeof(T));
  return p;
}

}  // namespace gptx::cuda
