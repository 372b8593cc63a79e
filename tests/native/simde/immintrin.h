// Stands before the compiler's <immintrin.h> and makes AVX-512 out of AVX2, with SIMDe: the kernels
// are compiled as they are and run on any x86 with AVX2 and FMA. What SIMDe lacks is below, lane by
// lane, from Intel's definitions.
#pragma once

#include_next <immintrin.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace simde_gaps {

template <class T, class V>
inline T lane(const V& v, int i) {
  T x;
  std::memcpy(&x, reinterpret_cast<const char*>(&v) + i * static_cast<int>(sizeof(T)), sizeof(T));
  return x;
}

// A register of n lanes f(i).
template <class V, int n, class F>
inline V lanes(F f) {
  static_assert(sizeof(V) == n * sizeof(f(0)));
  decltype(f(0)) x[n];
  for (int i = 0; i < n; ++i) x[i] = f(i);
  V v;
  std::memcpy(static_cast<void*>(&v), x, sizeof v);
  return v;
}

inline __m512 maskz_loadu(__mmask16 mask, const float* p) {
  return lanes<__m512, 16>([&](int i) { return (mask >> i & 1) != 0 ? p[i] : 0.0f; });
}
inline void mask_storeu(float* p, __mmask16 mask, __m512 a) {
  for (int i = 0; i < 16; ++i) {
    if ((mask >> i & 1) != 0) p[i] = lane<float>(a, i);
  }
}
inline float cvtss(__m512 a) { return lane<float>(a, 0); }
inline __m256 extract8(__m512 a, int half) {
  return lanes<__m256, 8>([&](int i) { return lane<float>(a, 8 * half + i); });
}
inline __m512 permute(__m512 a, int order) {
  return lanes<__m512, 16>([&](int i) {
    return lane<float>(a, i / 4 * 4 + (order >> 2 * (i % 4) & 3));
  });
}
inline __m512 to_float(__m512i a) {
  return lanes<__m512, 16>([&](int i) { return static_cast<float>(lane<int32_t>(a, i)); });
}
inline __m512i to_int(__m512 a) {
  return lanes<__m512i, 16>([&](int i) {
    return static_cast<int32_t>(_mm_cvtss_si32(_mm_set_ss(lane<float>(a, i))));
  });
}
inline __m256i low_int16(__m512i a) {
  return lanes<__m256i, 16>([&](int i) { return static_cast<int16_t>(lane<int32_t>(a, i)); });
}
inline __m128i low_int8(__m512i a) {
  return lanes<__m128i, 16>([&](int i) { return static_cast<int8_t>(lane<int32_t>(a, i)); });
}

// One step of the dot product of bfloat16: rounded once, subnormal numbers count as zero.
inline float flushed(float x) {
  return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x;
}
inline float bf16_step(float sum, uint32_t a, uint32_t b) {
  float x, y;
  std::memcpy(&x, &a, sizeof x);
  std::memcpy(&y, &b, sizeof y);
  return flushed(std::fma(flushed(x), flushed(y), flushed(sum)));
}
// The odd element of each pair first.
inline __m512 dpbf16(__m512 sum, __m512bh a, __m512bh b) {
  return lanes<__m512, 16>([&](int i) {
    const auto x = lane<uint32_t>(a, i), y = lane<uint32_t>(b, i);
    const float odd = bf16_step(lane<float>(sum, i), x & 0xFFFF0000, y & 0xFFFF0000);
    return bf16_step(odd, x << 16, y << 16);
  });
}

}  // namespace simde_gaps

#undef _mm512_madd_epi16
#undef _mm512_maskz_loadu_ps
#undef _mm512_mask_storeu_ps
#undef _mm512_cvtss_f32
#undef _mm512_extractf32x8_ps
#undef _mm512_permute_ps
#undef _mm512_cvtepi32_ps
#undef _mm512_cvtps_epi32
#undef _mm512_cvtepi32_epi16
#undef _mm512_cvtepi32_epi8
#undef _mm512_dpbf16_ps
#define _mm512_madd_epi16(a, b) simde_mm512_madd_epi16(a, b)
#define _mm512_maskz_loadu_ps(mask, p) simde_gaps::maskz_loadu(mask, p)
#define _mm512_mask_storeu_ps(p, mask, a) simde_gaps::mask_storeu(p, mask, a)
#define _mm512_cvtss_f32(a) simde_gaps::cvtss(a)
#define _mm512_extractf32x8_ps(a, half) simde_gaps::extract8(a, half)
#define _mm512_permute_ps(a, order) simde_gaps::permute(a, order)
#define _mm512_cvtepi32_ps(a) simde_gaps::to_float(a)
#define _mm512_cvtps_epi32(a) simde_gaps::to_int(a)
#define _mm512_cvtepi32_epi16(a) simde_gaps::low_int16(a)
#define _mm512_cvtepi32_epi8(a) simde_gaps::low_int8(a)
#define _mm512_dpbf16_ps(sum, a, b) simde_gaps::dpbf16(sum, a, b)
