// The kernel vocabulary on AVX-512: sixteen floats in one register. See vec_scalar.h.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace gptx::cpu::GPTX_ISA {
namespace {

inline constexpr size_t kLanes = 16;
inline constexpr int kTileRows = 6;  // 24 accumulators, 4 weights, 1 activation: 29 of 32 registers
inline constexpr int kTilePanels = 4;
inline constexpr int kTallRows = 12;  // 24 accumulators, 2 weights, 1 activation: 27 of 32
inline constexpr int kTallPanels = 2;
inline constexpr int kLowRows = 5;
inline constexpr int kLowPanels = 4;
inline constexpr int kRowPanels = 4;

struct F32x16 {
  __m512 v;
};

inline F32x16 broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline F32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, F32x16 a) { _mm512_storeu_ps(p, a.v); }

inline __mmask16 first_mask(size_t n) {
  return static_cast<__mmask16>(n < 16 ? (1u << n) - 1u : 0xFFFFu);
}
inline F32x16 load_first(const float* p, size_t n) {
  return {_mm512_maskz_loadu_ps(first_mask(n), p)};
}
inline void store_first(float* p, F32x16 a, size_t n) {
  _mm512_mask_storeu_ps(p, first_mask(n), a.v);
}

inline F32x16 operator+(F32x16 a, F32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F32x16 operator-(F32x16 a, F32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F32x16 operator*(F32x16 a, F32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F32x16 operator/(F32x16 a, F32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F32x16 max(F32x16 a, F32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F32x16 min(F32x16 a, F32x16 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F32x16 select_less(F32x16 a, F32x16 b, F32x16 x, F32x16 y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}
inline F32x16 first_lanes(F32x16 a, F32x16 b, size_t n) {
  return {_mm512_mask_blend_ps(first_mask(n), b.v, a.v)};
}
inline F32x16 add_to_exponent(F32x16 a, F32x16 t) {
  return {_mm512_castsi512_ps(_mm512_add_epi32(
      _mm512_castps_si512(a.v), _mm512_slli_epi32(_mm512_castps_si512(t.v), 23)))};
}

inline float reduce_add(F32x16 a) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float reduce_max(F32x16 a) {
  const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

inline float first_lane(F32x16 a) { return _mm512_cvtss_f32(a.v); }

inline float* as_floats(std::byte* p) { return reinterpret_cast<float*>(p); }
inline const float* as_floats(const std::byte* p) { return reinterpret_cast<const float*>(p); }
inline std::byte* as_bytes(float* p) { return reinterpret_cast<std::byte*>(p); }

inline __m512i load_line(const std::byte* p) { return _mm512_loadu_si512(p); }

struct I32x16 {
  __m512i v;
};

inline I32x16 broadcast_int(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline int32_t first_lane(I32x16 a) { return _mm_cvtsi128_si32(_mm512_castsi512_si128(a.v)); }
inline F32x16 to_float(I32x16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline I32x16 round_to_int(F32x16 a) { return {_mm512_cvtps_epi32(a.v)}; }
inline I32x16 clamp(I32x16 a, int32_t low, int32_t high) {
  return {_mm512_min_epi32(_mm512_max_epi32(a.v, _mm512_set1_epi32(low)), _mm512_set1_epi32(high))};
}

inline F32x16 round_bf16(F32x16 a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_add_epi32(bits, _mm512_add_epi32(last, _mm512_set1_epi32(0x7FFF)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __m512i chosen =
      _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), rounded, quiet);
  return {_mm512_castsi512_ps(_mm512_and_si512(chosen, _mm512_set1_epi32(-0x10000)))};
}
inline F32x16 swap_neighbours(F32x16 a) { return {_mm512_permute_ps(a.v, 0xB1)}; }
inline F32x16 even_bf16(const std::byte* line) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(load_line(line), 16))};
}
inline F32x16 masked_line(const std::byte* line, int32_t mask) {
  return {_mm512_castsi512_ps(_mm512_and_si512(load_line(line), _mm512_set1_epi32(mask)))};
}
inline F32x16 odd_bf16(const std::byte* line) { return masked_line(line, -0x10000); }
inline F32x16 even_bf16_in_place(const std::byte* line) { return masked_line(line, 0xFFFF); }
inline void store_bf16(std::byte* p, F32x16 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(a.v), 16)));
}
inline void store_even_bf16(std::byte* line, F32x16 a) {
  _mm512_storeu_si512(line, _mm512_srli_epi32(_mm512_castps_si512(a.v), 16));
}
inline void store_odd_bf16(std::byte* line, F32x16 a) {
  const __m512i even = _mm512_castps_si512(even_bf16_in_place(line).v);
  _mm512_storeu_si512(line, _mm512_or_si512(even, _mm512_castps_si512(a.v)));
}

// Holds a sum in its register: the compiler regroups sums of integers into trees, which spill.
inline void pin([[maybe_unused]] __m512i& sum) {
#ifdef __AVX512F__
  asm("" : "+v"(sum));
#endif
}

struct I16x32 {
  __m512i v;
};

inline I16x32 even_int8(const std::byte* line) {
  return {_mm512_srai_epi16(_mm512_slli_epi16(load_line(line), 8), 8)};
}
inline I16x32 odd_int8(const std::byte* line) {
  return {_mm512_srai_epi16(load_line(line), 8)};
}
inline I16x32 broadcast_pair(const std::byte* p) {
  int32_t pair;
  __builtin_memcpy(&pair, p, sizeof pair);
  return {_mm512_set1_epi32(pair)};
}
inline void store_pairs(std::byte* p, I32x16 a) {
  const __m256i order = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm256_shuffle_epi8(_mm512_cvtepi32_epi16(a.v), order));
}

}  // namespace
}  // namespace gptx::cpu::GPTX_ISA
