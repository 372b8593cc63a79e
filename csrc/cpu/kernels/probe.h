// What the machine can do: the yardsticks of the benchmarks, measured in the same run.
#pragma once

#include "cpu/kernel_table.h"

namespace gptx::cpu::GPTX_ISA {
namespace {

// `steps` times the multiply-adds of kProbeLines lines: those of a whole tile, over and over on the same
// operands. The result keeps the sums alive.
template <class P>
[[gnu::flatten]] inline float probe(size_t steps) noexcept {
  constexpr int kRows = kTileRows, kPanels = kTilePanels;
  static_assert(kProbeLines % (kRows * kPanels) == 0);
  alignas(64) std::byte lines[kPanels * kLineBytes] = {}, act[kRows * P::kGroupBytes] = {};
  typename P::Sum acc[kRows][kPanels];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kPanels; ++j) acc[i][j] = P::zero();
  }
  // To the compiler the bytes might be anything, and change: nothing is known of a product beforehand.
  asm volatile("" : : "r"(lines), "r"(act) : "memory");
  typename P::Factor b[kPanels];
#pragma GCC unroll 8
  for (int j = 0; j < kPanels; ++j) b[j] = P::weights(lines + j * kLineBytes, 0);
  for (size_t s = 0; s < steps * (kProbeLines / (kRows * kPanels)); ++s) {
#pragma GCC unroll 2
    for (int part = 0; part < P::kParts; ++part) {
      asm volatile("" : : "r"(act) : "memory");
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const typename P::Factor a = P::activation(act + i * P::kGroupBytes, part);
#pragma GCC unroll 8
        for (int j = 0; j < kPanels; ++j) acc[i][j] = P::multiply_add(acc[i][j], a, b[j]);
      }
    }
  }
  const RowScale no_scale[kRows] = {};
  alignas(64) const int32_t no_colsum[kPanels * kPanel] = {};
  const struct {
    const RowScale* act_scale;
    const int32_t* colsum;
  } task{no_scale, no_colsum};
  F32x16 sum = broadcast(0.0f);
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kPanels; ++j) sum = sum + P::value(acc[i][j], task, i, j);
  }
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
