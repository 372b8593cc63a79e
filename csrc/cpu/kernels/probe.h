// What the machine can do: the yardsticks of the benchmarks, measured in the same run.
#pragma once

#include "cpu/kernel_table.h"

namespace gptx::cpu::GPTX_ISA {
namespace {

// Independent chains: enough to hide the latency of a fused multiply-add, few enough for registers.
inline constexpr int kChains = kProbeChains;

// `steps` fused multiply-adds of 16 lanes in each chain; the result keeps them alive.
inline float probe_fma(size_t steps) noexcept {
  F32x16 acc[kChains];
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) acc[i] = broadcast(static_cast<float>(i));  // none alike
  const F32x16 a = broadcast(0.999f), b = broadcast(0.001f);
  for (size_t s = 0; s < steps; ++s) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) acc[i] = fma(acc[i], a, b);
  }
  F32x16 sum = acc[0];
#pragma GCC unroll 16
  for (int i = 1; i < kChains; ++i) sum = sum + acc[i];
  return reduce_add(sum);
}

// Reads n floats, a multiple of 64, once.
inline float probe_read(const float* data, size_t n) noexcept {
  F32x16 sum[4] = {load(data), load(data), load(data), load(data)};
  for (size_t i = 0; i < n; i += 4 * kLanes) {
#pragma GCC unroll 4
    for (size_t j = 0; j < 4; ++j) sum[j] = max(sum[j], load(data + i + j * kLanes));
  }
  return reduce_max(max(max(sum[0], sum[1]), max(sum[2], sum[3])));
}

}  // namespace
}  // namespace gptx::cpu::GPTX_ISA
