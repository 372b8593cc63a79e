// The dot product of int16 pairs on AVX2: a multiply-add of pairs, then an addition.
#pragma once

namespace gptx::cpu::GPTX_ISA {
namespace {

// Holds a sum in its register: the compiler regroups sums of integers into trees, which spill.
inline void pin([[maybe_unused]] __m256i& sum) {
#ifdef __AVX2__
  asm("" : "+x"(sum));
#endif
}

inline I32x16 dot_pairs(I32x16 sum, I16x32 a, I16x32 b) {
  sum.lo = _mm256_add_epi32(sum.lo, _mm256_madd_epi16(a.lo, b.lo));
  sum.hi = _mm256_add_epi32(sum.hi, _mm256_madd_epi16(a.hi, b.hi));
  pin(sum.lo);
  pin(sum.hi);
  return sum;
}

}  // namespace
}  // namespace gptx::cpu::GPTX_ISA
