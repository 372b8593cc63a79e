// The kernel vocabulary on AVX2 and FMA: sixteen floats in two registers. See vec_scalar.h.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace gptx::cpu::GPTX_ISA {
namespace {

inline constexpr size_t kLanes = 16;
inline constexpr int kTileRows = 6;  // 12 accumulators, 2 weights, 1 activation: 15 of 16 registers
inline constexpr int kTilePanels = 1;
inline constexpr int kTallRows = 6;
inline constexpr int kTallPanels = 1;
inline constexpr int kLowRows = 2;
inline constexpr int kLowPanels = 2;
inline constexpr int kRowPanels = 4;

struct F32x16 {
  __m256 lo, hi;
};

inline F32x16 broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, F32x16 a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}

inline __m256i first_mask(size_t n, int base) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n < 16 ? n : 16) - base), lane);
}
inline F32x16 load_first(const float* p, size_t n) {
  return {_mm256_maskload_ps(p, first_mask(n, 0)), _mm256_maskload_ps(p + 8, first_mask(n, 8))};
}
inline void store_first(float* p, F32x16 a, size_t n) {
  _mm256_maskstore_ps(p, first_mask(n, 0), a.lo);
  _mm256_maskstore_ps(p + 8, first_mask(n, 8), a.hi);
}

inline F32x16 operator+(F32x16 a, F32x16 b) {
  return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
inline F32x16 operator-(F32x16 a, F32x16 b) {
  return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
inline F32x16 operator*(F32x16 a, F32x16 b) {
  return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
inline F32x16 operator/(F32x16 a, F32x16 b) {
  return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
}
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline F32x16 max(F32x16 a, F32x16 b) {
  return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
}
inline F32x16 min(F32x16 a, F32x16 b) {
  return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)};
}
inline F32x16 select_less(F32x16 a, F32x16 b, F32x16 x, F32x16 y) {
  return {_mm256_blendv_ps(y.lo, x.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
          _mm256_blendv_ps(y.hi, x.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
}
inline F32x16 first_lanes(F32x16 a, F32x16 b, size_t n) {
  return {_mm256_blendv_ps(b.lo, a.lo, _mm256_castsi256_ps(first_mask(n, 0))),
          _mm256_blendv_ps(b.hi, a.hi, _mm256_castsi256_ps(first_mask(n, 8)))};
}
inline __m256 add_to_exponent(__m256 a, __m256 t) {
  return _mm256_castsi256_ps(
      _mm256_add_epi32(_mm256_castps_si256(a), _mm256_slli_epi32(_mm256_castps_si256(t), 23)));
}
inline F32x16 add_to_exponent(F32x16 a, F32x16 t) {
  return {add_to_exponent(a.lo, t.lo), add_to_exponent(a.hi, t.hi)};
}

inline float reduce_add(F32x16 a) {
  const __m256 eight = _mm256_add_ps(a.lo, a.hi);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float reduce_max(F32x16 a) {
  const __m256 eight = _mm256_max_ps(a.lo, a.hi);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

inline float first_lane(F32x16 a) { return _mm256_cvtss_f32(a.lo); }

inline float* as_floats(std::byte* p) { return reinterpret_cast<float*>(p); }
inline const float* as_floats(const std::byte* p) { return reinterpret_cast<const float*>(p); }
inline std::byte* as_bytes(float* p) { return reinterpret_cast<std::byte*>(p); }

inline __m256i load_half(const std::byte* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline void store_half(std::byte* p, __m256i a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a);
}

struct I32x16 {
  __m256i lo, hi;
};

inline I32x16 broadcast_int(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline int32_t first_lane(I32x16 a) { return _mm256_cvtsi256_si32(a.lo); }
inline F32x16 to_float(I32x16 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
inline I32x16 round_to_int(F32x16 a) {
  return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)};
}
inline I32x16 clamp(I32x16 a, int32_t low, int32_t high) {
  const __m256i least = _mm256_set1_epi32(low), most = _mm256_set1_epi32(high);
  return {_mm256_min_epi32(_mm256_max_epi32(a.lo, least), most),
          _mm256_min_epi32(_mm256_max_epi32(a.hi, least), most)};
}

inline __m256 round_bf16(__m256 a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_add_epi32(bits, _mm256_add_epi32(last, _mm256_set1_epi32(0x7FFF)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256 chosen = _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet),
                                         _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  return _mm256_and_ps(chosen, _mm256_castsi256_ps(_mm256_set1_epi32(-0x10000)));
}
inline F32x16 round_bf16(F32x16 a) { return {round_bf16(a.lo), round_bf16(a.hi)}; }
inline F32x16 swap_neighbours(F32x16 a) {
  return {_mm256_permute_ps(a.lo, 0xB1), _mm256_permute_ps(a.hi, 0xB1)};
}
inline __m256 even_half(const std::byte* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(load_half(p), 16));
}
inline F32x16 even_bf16(const std::byte* line) { return {even_half(line), even_half(line + 32)}; }
inline __m256 masked_half(const std::byte* p, int32_t mask) {
  return _mm256_castsi256_ps(_mm256_and_si256(load_half(p), _mm256_set1_epi32(mask)));
}
inline F32x16 odd_bf16(const std::byte* line) {
  return {masked_half(line, -0x10000), masked_half(line + 32, -0x10000)};
}
inline F32x16 even_bf16_in_place(const std::byte* line) {
  return {masked_half(line, 0xFFFF), masked_half(line + 32, 0xFFFF)};
}
inline void store_bf16(std::byte* p, F32x16 a) {
  const __m256i packed = _mm256_packus_epi32(_mm256_srli_epi32(_mm256_castps_si256(a.lo), 16),
                                             _mm256_srli_epi32(_mm256_castps_si256(a.hi), 16));
  store_half(p, _mm256_permute4x64_epi64(packed, 0xD8));
}
inline void store_even_bf16(std::byte* line, F32x16 a) {
  store_half(line, _mm256_srli_epi32(_mm256_castps_si256(a.lo), 16));
  store_half(line + 32, _mm256_srli_epi32(_mm256_castps_si256(a.hi), 16));
}
inline void store_odd_bf16(std::byte* line, F32x16 a) {
  const F32x16 even = even_bf16_in_place(line);
  store_half(line, _mm256_castps_si256(_mm256_or_ps(even.lo, a.lo)));
  store_half(line + 32, _mm256_castps_si256(_mm256_or_ps(even.hi, a.hi)));
}

struct I16x32 {
  __m256i lo, hi;
};

inline __m256i even_int8_half(const std::byte* p) {
  return _mm256_srai_epi16(_mm256_slli_epi16(load_half(p), 8), 8);
}
inline I16x32 even_int8(const std::byte* line) {
  return {even_int8_half(line), even_int8_half(line + 32)};
}
inline I16x32 odd_int8(const std::byte* line) {
  return {_mm256_srai_epi16(load_half(line), 8), _mm256_srai_epi16(load_half(line + 32), 8)};
}
inline I16x32 broadcast_pair(const std::byte* p) {
  int32_t pair;
  __builtin_memcpy(&pair, p, sizeof pair);
  return {_mm256_set1_epi32(pair), _mm256_set1_epi32(pair)};
}
inline void store_pairs(std::byte* p, I32x16 a) {
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.lo, a.hi), 0xD8);
  const __m256i order = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
  store_half(p, _mm256_shuffle_epi8(packed, order));
}

}  // namespace
}  // namespace gptx::cpu::GPTX_ISA
