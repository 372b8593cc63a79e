// Kernels on single rows: layer norm, activations, exp and its sum. Written once on the vocabulary.
#pragma once

#include "cpu/kernel_table.h"

namespace gptx::cpu::GPTX_ISA {
namespace {

// Two passes, as the definition (Ba et al., 2016): the mean first, then the centred squares.
inline void layer_norm(float* out, const float* x, const float* gain, const float* bias, size_t n,
                       float epsilon) noexcept {
  const float count = static_cast<float>(n);
  const F32x16 zero = broadcast(0.0f);
  F32x16 sum = zero;
  for_each_vector(n, [&](size_t i, size_t lanes) { sum = sum + load_first(x + i, lanes); });
  const F32x16 mean = broadcast(reduce_add(sum) / count);
  F32x16 squares = zero;
  for_each_vector(n, [&](size_t i, size_t lanes) {
    const F32x16 centred = first_lanes(load_first(x + i, lanes) - mean, zero, lanes);
    squares = fma(centred, centred, squares);
  });
  const F32x16 inverse = broadcast(1.0f / __builtin_sqrtf(reduce_add(squares) / count + epsilon));
  for_each_vector(n, [&](size_t i, size_t lanes) {
    const F32x16 normal = (load_first(x + i, lanes) - mean) * inverse;
    store_first(out + i, fma(normal, load(gain + i), load(bias + i)), lanes);
  });
}

template <class F>
inline void map_f32(float* y, const float* x, size_t n, F f) {
  for_each_vector(n, [&](size_t i, size_t lanes) {
    store_first(y + i, f(load_first(x + i, lanes)), lanes);
  });
}

inline void activate_f32(float* y, const float* x, size_t n, Activation activation) noexcept {
  switch (activation) {
    case Activation::kNone: return map_f32(y, x, n, [](F32x16 v) { return v; });
    case Activation::kGeluNew: return map_f32(y, x, n, [](F32x16 v) { return gelu_new(v); });
    case Activation::kGelu: return map_f32(y, x, n, [](F32x16 v) { return gelu(v); });
    case Activation::kRelu: return map_f32(y, x, n, [](F32x16 v) { return relu(v); });
  }
}

inline void exp_f32(float* y, const float* x, size_t n) noexcept {
  map_f32(y, x, n, [](F32x16 v) { return exp(v); });
}

// Chains of 8 vectors in float32, the lanes of their results in float64: the error does not grow with n.
inline double sum_exp(const float* x, size_t n, float shift) noexcept {
  constexpr size_t kChain = 8 * kLanes;
  const F32x16 zero = broadcast(0.0f), origin = broadcast(shift);
  double sums[kLanes] = {};
  for (size_t begin = 0; begin < n; begin += kChain) {
    F32x16 chain = zero;
    for_each_vector(n - begin < kChain ? n - begin : kChain, [&](size_t i, size_t lanes) {
      chain = chain + first_lanes(exp(load_first(x + begin + i, lanes) - origin), zero, lanes);
    });
    float lane[kLanes];
    store(lane, chain);
    for (size_t j = 0; j < kLanes; ++j) sums[j] += static_cast<double>(lane[j]);
  }
  for (size_t half = kLanes / 2; half > 0; half /= 2) {
    for (size_t j = 0; j < half; ++j) sums[j] += sums[j + half];
  }
  return sums[0];
}

}  // namespace
}  // namespace gptx::cpu::GPTX_ISA
