// The dot product of int16 pairs on AVX-512 without VNNI: a multiply-add of pairs, then an addition.
#pragma once

namespace gptx::cpu::GPTX_ISA {
namespace {

inline I32x16 dot_pairs(I32x16 sum, I16x32 a, I16x32 b) {
  sum.v = _mm512_add_epi32(sum.v, _mm512_madd_epi16(a.v, b.v));
  pin(sum.v);
  return sum;
}

}  // namespace
}  // namespace gptx::cpu::GPTX_ISA
