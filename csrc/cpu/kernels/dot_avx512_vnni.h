// The dot products of AVX-512 VNNI: pairs of int16, and four bytes of which the weights are signed.
#pragma once

namespace gptx::cpu::GPTX_ISA {
namespace {

inline I32x16 dot_pairs(I32x16 sum, I16x32 a, I16x32 b) {
  sum.v = _mm512_dpwssd_epi32(sum.v, a.v, b.v);
  pin(sum.v);
  return sum;
}

struct I8x64 {
  __m512i v;
};

inline constexpr int32_t kByteOffset = 0;  // activations are unsigned, as they are

// sum + the four products of unsigned a and signed b of each output.
inline I32x16 dot_fours(I32x16 sum, I8x64 a, I8x64 b) {
  sum.v = _mm512_dpbusd_epi32(sum.v, a.v, b.v);
  pin(sum.v);
  return sum;
}
inline I8x64 load_fours(const std::byte* line) { return {load_line(line)}; }
inline I8x64 broadcast_fours(const std::byte* p) {
  int32_t four;
  __builtin_memcpy(&four, p, sizeof four);
  return {_mm512_set1_epi32(four)};
}
// Sixteen bytes, from values of 0 to 255, less kByteOffset.
inline void store_bytes(std::byte* p, I32x16 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}
inline I32x16 add(I32x16 a, I32x16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline I32x16 multiply(I32x16 a, I32x16 b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
inline I32x16 subtract(I32x16 a, I32x16 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline I32x16 load_int(const int32_t* p) { return {_mm512_loadu_si512(p)}; }

}  // namespace
}  // namespace gptx::cpu::GPTX_ISA
