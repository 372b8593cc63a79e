// The dot product of bfloat16 pairs of AVX-512 BF16. Subnormal numbers count as zero.
#pragma once

namespace gptx::cpu::GPTX_ISA {
namespace {

struct BF16x32 {
  __m512bh v;
};

// sum + a[1] * b[1] + a[0] * b[0] of each pair.
inline F32x16 dot_bf16(F32x16 sum, BF16x32 a, BF16x32 b) {
  return {_mm512_dpbf16_ps(sum.v, a.v, b.v)};
}
inline BF16x32 as_bf16(__m512i v) {
  BF16x32 r;
  __builtin_memcpy(&r.v, &v, sizeof v);
  return r;
}
inline BF16x32 load_bf16(const std::byte* line) { return as_bf16(load_line(line)); }
inline BF16x32 broadcast_bf16(const std::byte* p) {
  int32_t pair;
  __builtin_memcpy(&pair, p, sizeof pair);
  return as_bf16(_mm512_set1_epi32(pair));
}

}  // namespace
}  // namespace gptx::cpu::GPTX_ISA
