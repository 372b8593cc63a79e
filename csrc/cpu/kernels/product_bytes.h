// The fast int8 mode where the ISA multiplies four bytes at once: q from 0 to 255, less the
// kByteOffset that its instruction wants, and the zero point taken off the sum, zero * colsum. The
// same integers as Int8FastProduct of products.h.
#pragma once

#include "cpu/kernel_table.h"

namespace gptx::cpu::GPTX_ISA {
namespace {

struct ByteProduct {
  using Sum = I32x16;
  using Factor = I8x64;
  static constexpr size_t kInputs = 4;
  static constexpr int kParts = 1;
  static constexpr size_t kGroupBytes = 4;
  static constexpr size_t kChain = kMaxInt8Depth;

  static Sum zero() { return broadcast_int(0); }
  static Factor weights(const std::byte* line, int) { return load_fours(line); }
  static Factor activation(const std::byte* p, int) { return broadcast_fours(p); }
  static Sum multiply_add(Sum sum, Factor a, Factor b) { return dot_fours(sum, a, b); }
  template <class Task>
  static F32x16 value(Sum sum, const Task& t, int row, int panel) {
    const I32x16 zero = broadcast_int(t.act_scale[row].zero - kByteOffset);
    const I32x16 colsum = load_int(t.colsum + kPanel * static_cast<size_t>(panel));
    return to_float(subtract(sum, multiply(zero, colsum)));
  }

  static RowScale operand(std::byte* out, const float* x, size_t n) noexcept {
    const ByteScale bytes(x, n);
    const I32x16 zero = broadcast_int(bytes.row.zero - kByteOffset);
    for_each_vector(n, [&](size_t i, size_t lanes) {
      store_bytes(out + i, add(bytes.centred(load_first(x + i, lanes)), zero));
    });
    return bytes.row;
  }
};

}  // namespace
}  // namespace gptx::cpu::GPTX_ISA
