// The kernel vocabulary without SIMD: sixteen floats in an array. It defines what the other
// vec_*.h must compute; every ISA gives the same bits.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

namespace gptx::cpu::GPTX_ISA {
namespace {

inline constexpr size_t kLanes = 16;
inline constexpr int kTileRows = 2;    // register tile of the matmul: rows ...
inline constexpr int kTilePanels = 1;  // ... by panels of 16 columns
inline constexpr int kRowPanels = 1;   // panels of a tile of one row

struct F32x16 {
  float lane[kLanes];
};

template <class F>
inline F32x16 each(F f) {
  F32x16 r;
  for (size_t i = 0; i < kLanes; ++i) r.lane[i] = f(i);
  return r;
}

inline F32x16 broadcast(float x) { return each([&](size_t) { return x; }); }
inline F32x16 load(const float* p) { return each([&](size_t i) { return p[i]; }); }
// Lanes from n on are zero; memory beyond p[n - 1] is not touched.
inline F32x16 load_first(const float* p, size_t n) {
  return each([&](size_t i) { return i < n ? p[i] : 0.0f; });
}
inline void store(float* p, F32x16 a) {
  for (size_t i = 0; i < kLanes; ++i) p[i] = a.lane[i];
}
inline void store_first(float* p, F32x16 a, size_t n) {
  for (size_t i = 0; i < kLanes && i < n; ++i) p[i] = a.lane[i];
}

inline F32x16 operator+(F32x16 a, F32x16 b) {
  return each([&](size_t i) { return a.lane[i] + b.lane[i]; });
}
inline F32x16 operator-(F32x16 a, F32x16 b) {
  return each([&](size_t i) { return a.lane[i] - b.lane[i]; });
}
inline F32x16 operator*(F32x16 a, F32x16 b) {
  return each([&](size_t i) { return a.lane[i] * b.lane[i]; });
}
inline F32x16 operator/(F32x16 a, F32x16 b) {
  return each([&](size_t i) { return a.lane[i] / b.lane[i]; });
}
// a * b + c, rounded once.
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
  return each([&](size_t i) { return __builtin_fmaf(a.lane[i], b.lane[i], c.lane[i]); });
}
// The second operand where either is NaN, as x86 defines it.
inline F32x16 max(F32x16 a, F32x16 b) {
  return each([&](size_t i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline F32x16 min(F32x16 a, F32x16 b) {
  return each([&](size_t i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
// a < b ? x : y
inline F32x16 select_less(F32x16 a, F32x16 b, F32x16 x, F32x16 y) {
  return each([&](size_t i) { return a.lane[i] < b.lane[i] ? x.lane[i] : y.lane[i]; });
}
// The first n lanes of a, then lanes of b.
inline F32x16 first_lanes(F32x16 a, F32x16 b, size_t n) {
  return each([&](size_t i) { return i < n ? a.lane[i] : b.lane[i]; });
}
// Adds the low bits of t, an integer, to the exponents of a.
inline F32x16 add_to_exponent(F32x16 a, F32x16 t) {
  return each([&](size_t i) {
    return std::bit_cast<float>(std::bit_cast<uint32_t>(a.lane[i]) +
                                (std::bit_cast<uint32_t>(t.lane[i]) << 23));
  });
}

// Sum and maximum over the lanes, halving 16 -> 8 -> 4 -> 2 -> 1.
inline float reduce_add(F32x16 a) {
  for (size_t n = kLanes / 2; n > 0; n /= 2) {
    for (size_t i = 0; i < n; ++i) a.lane[i] = a.lane[i] + a.lane[i + n];
  }
  return a.lane[0];
}
inline float reduce_max(F32x16 a) {
  for (size_t n = kLanes / 2; n > 0; n /= 2) {
    for (size_t i = 0; i < n; ++i) {
      a.lane[i] = a.lane[i] > a.lane[i + n] ? a.lane[i] : a.lane[i + n];
    }
  }
  return a.lane[0];
}

}  // namespace
}  // namespace gptx::cpu::GPTX_ISA
