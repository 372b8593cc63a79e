// What the machine can do: the yardsticks of the benchmarks, measured in the same run.
#pragma once

#include "cpu/kernel_table.h"

namespace gptx::cpu::GPTX_ISA {
namespace {

// `steps` times the multiply-adds of one line in each of kProbeChains accumulators: enough to hide
// their latency, few enough for the registers. The result keeps them alive.
template <class P>
[[gnu::flatten]] inline float probe(size_t steps) noexcept {
  alignas(64) std::byte bytes[kLineBytes] = {};
  typename P::Sum acc[kProbeChains];
#pragma GCC unroll 16
  for (int i = 0; i < kProbeChains; ++i) acc[i] = P::zero();
  // To the compiler the bytes might be anything, and change: nothing is known of a product beforehand.
  asm volatile("" : : "r"(bytes) : "memory");
  const typename P::Factor b = P::weights(bytes, 0);
  for (size_t s = 0; s < steps; ++s) {
#pragma GCC unroll 2
    for (int part = 0; part < P::kParts; ++part) {
      asm volatile("" : : "r"(bytes) : "memory");
#pragma GCC unroll 16
      for (int i = 0; i < kProbeChains; ++i) {
        acc[i] = P::multiply_add(acc[i], P::activation(bytes + 4 * i, part), b);
      }
    }
  }
  const RowScale no_scale{};
  alignas(64) const int32_t no_colsum[kPanel] = {};
  struct {
    const RowScale* act_scale;
    const int32_t* colsum;
  } const task{&no_scale, no_colsum};
  F32x16 sum = P::value(acc[0], task, 0, 0);
#pragma GCC unroll 16
  for (int i = 1; i < kProbeChains; ++i) sum = sum + P::value(acc[i], task, 0, 0);
  return reduce_add(sum);
}

// Reads n floats, a multiple of 64, once, in four streams: one alone does not reach what a core can read.
inline float probe_read(const float* data, size_t n) noexcept {
  const size_t stream = n / 4;
  F32x16 top[4] = {load(data), load(data), load(data), load(data)};
  for (size_t i = 0; i < stream; i += kLanes) {
#pragma GCC unroll 4
    for (size_t j = 0; j < 4; ++j) top[j] = max(top[j], load(data + j * stream + i));
  }
  return reduce_max(max(max(top[0], top[1]), max(top[2], top[3])));
}

}  // namespace
}  // namespace gptx::cpu::GPTX_ISA
