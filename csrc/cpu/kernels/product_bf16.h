// bfloat16 where the ISA multiplies pairs of it: the operand is bfloat16 too.
#pragma once

#include "cpu/kernel_table.h"

namespace gptx::cpu::GPTX_ISA {
namespace {

struct BF16DotProduct : FloatSums {
  using Factor = BF16x32;
  static constexpr size_t kInputs = 2;
  static constexpr int kParts = 1;
  static constexpr size_t kGroupBytes = 4;
  static constexpr size_t kChain = BF16Product::kChain;

  static Factor weights(const std::byte* line, int) { return load_bf16(line); }
  static Factor activation(const std::byte* p, int) { return broadcast_bf16(p); }
  static Sum multiply_add(Sum sum, Factor a, Factor b) { return dot_bf16(sum, a, b); }
  static F32x16 round(F32x16 x) { return round_bf16(x); }
  static void put(std::byte* out, size_t i, F32x16 rounded) { store_bf16(out + 2 * i, rounded); }

  static RowScale operand(std::byte* out, const float* x, size_t n) noexcept {
    for_each_vector(n, [&](size_t i, size_t lanes) {
      put(out, i, round(load_first(x + i, lanes)));
    });
    return {1.0f, 0};
  }
};

}  // namespace
}  // namespace gptx::cpu::GPTX_ISA
