// Stands before the compiler's <immintrin.h> and makes AVX-512 out of AVX2, with SIMDe: the kernels
// are compiled as they are and run on any x86 with AVX2 and FMA. What SIMDe lacks is below, lane by
// lane, from Intel's definitions.
#pragma once

#include_next <immintrin.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
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

// --- AMX, as far as the kernels use it ---

struct Tiles {
  struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } config;
  uint8_t data[8][16][64];
};
inline thread_local Tiles tiles{};

// An operation on tiles that do not fit each other is an exception of the CPU.
inline void need(bool fits) {
  if (!fits) std::abort();
}
inline void load_config(const void* config) {
  tiles = {};
  std::memcpy(&tiles.config, config, sizeof tiles.config);
  need(tiles.config.palette == 1);
  for (int t = 0; t < 8; ++t) {
    need(tiles.config.rows[t] <= 16 && tiles.config.row_bytes[t] <= 64);
    need((tiles.config.rows[t] == 0) == (tiles.config.row_bytes[t] == 0));
  }
}
inline void need_configured(int t) { need(tiles.config.rows[t] > 0); }
inline void tile_load(int t, const void* from, size_t stride) {
  need_configured(t);
  std::memset(tiles.data[t], 0, sizeof tiles.data[t]);
  for (int row = 0; row < tiles.config.rows[t]; ++row) {
    std::memcpy(tiles.data[t][row], static_cast<const char*>(from) + stride * size_t(row),
                tiles.config.row_bytes[t]);
  }
}
inline void tile_store(int t, void* to, size_t stride) {
  need_configured(t);
  for (int row = 0; row < tiles.config.rows[t]; ++row) {
    std::memcpy(static_cast<char*>(to) + stride * size_t(row), tiles.data[t][row],
                tiles.config.row_bytes[t]);
  }
}
inline void tile_zero(int t) {
  need_configured(t);
  std::memset(tiles.data[t], 0, sizeof tiles.data[t]);
}
// A is the type of a byte of the left side; the right one is signed.
template <class A>
inline void tile_dot(int sums, int a, int b) {
  need_configured(sums);
  const auto& c = tiles.config;
  need(c.rows[sums] == c.rows[a] && c.row_bytes[sums] == c.row_bytes[b]);
  need(c.row_bytes[a] == 4 * c.rows[b]);
  for (int m = 0; m < c.rows[sums]; ++m) {
    for (int n = 0; n < c.row_bytes[sums] / 4; ++n) {
      int32_t sum;
      std::memcpy(&sum, &tiles.data[sums][m][4 * n], sizeof sum);
      for (int k = 0; k < c.row_bytes[a]; ++k) {
        sum += static_cast<A>(tiles.data[a][m][k]) * static_cast<int8_t>(tiles.data[b][k / 4][4 * n + k % 4]);
      }
      std::memcpy(&tiles.data[sums][m][4 * n], &sum, sizeof sum);
    }
  }
}

}  // namespace simde_gaps

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbusd
#undef _tile_dpbssd
#define _tile_loadconfig(config) simde_gaps::load_config(config)
#define _tile_release() (simde_gaps::tiles = {})
#define _tile_loadd(t, from, stride) simde_gaps::tile_load(t, from, stride)
#define _tile_stored(t, to, stride) simde_gaps::tile_store(t, to, stride)
#define _tile_zero(t) simde_gaps::tile_zero(t)
#define _tile_dpbusd(sums, a, b) simde_gaps::tile_dot<uint8_t>(sums, a, b)
#define _tile_dpbssd(sums, a, b) simde_gaps::tile_dot<int8_t>(sums, a, b)

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
