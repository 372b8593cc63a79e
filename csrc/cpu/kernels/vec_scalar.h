// The kernel vocabulary without SIMD: sixteen lanes in an array. It defines what the other vec_*.h
// must compute; every ISA gives the same bits.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

namespace gptx::cpu::GPTX_ISA {
namespace {

inline constexpr size_t kLanes = 16;
// Register tiles of the matmul, rows by panels of 16 columns: the tile for many rows, and those that take all rows at
// once, if they are at most kTallRows, at most kLowRows, or a single one.
inline constexpr int kTileRows = 2;
inline constexpr int kTilePanels = 1;
inline constexpr int kTallRows = 2;
inline constexpr int kTallPanels = 1;
inline constexpr int kLowRows = 1;
inline constexpr int kLowPanels = 1;
inline constexpr int kRowPanels = 1;

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

inline float first_lane(F32x16 a) { return a.lane[0]; }

inline float* as_floats(std::byte* p) { return reinterpret_cast<float*>(p); }
inline const float* as_floats(const std::byte* p) { return reinterpret_cast<const float*>(p); }
inline std::byte* as_bytes(float* p) { return reinterpret_cast<std::byte*>(p); }

// --- int32 ---

struct I32x16 {
  int32_t lane[kLanes];
};

template <class F>
inline I32x16 each_int(F f) {
  I32x16 r;
  for (size_t i = 0; i < kLanes; ++i) r.lane[i] = f(i);
  return r;
}

inline I32x16 broadcast_int(int32_t x) { return each_int([&](size_t) { return x; }); }
inline int32_t first_lane(I32x16 a) { return a.lane[0]; }
inline F32x16 to_float(I32x16 a) {
  return each([&](size_t i) { return static_cast<float>(a.lane[i]); });
}
// Ties to even, for |a| < 2^22; anything where a is NaN.
inline I32x16 round_to_int(F32x16 a) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: the sum's low bits hold the rounded number
  return each_int([&](size_t i) {
    return static_cast<int32_t>(std::bit_cast<uint32_t>(a.lane[i] + kMagic) -
                                std::bit_cast<uint32_t>(kMagic));
  });
}
inline I32x16 clamp(I32x16 a, int32_t low, int32_t high) {
  return each_int([&](size_t i) {
    return a.lane[i] < low ? low : a.lane[i] > high ? high : a.lane[i];
  });
}

// --- bfloat16: a line holds 16 outputs by 2 inputs ---

// The nearest bfloat16, ties to even, as a float. NaN stays NaN.
inline F32x16 round_bf16(F32x16 a) {
  return each([&](size_t i) {
    const auto bits = std::bit_cast<uint32_t>(a.lane[i]);
    const bool nan = a.lane[i] != a.lane[i];
    const uint32_t rounded = nan ? bits | 0x400000 : bits + (bits >> 16 & 1) + 0x7FFF;
    return std::bit_cast<float>(rounded & 0xFFFF0000);
  });
}
// Lanes 0 and 1 changed over, 2 and 3, and so on.
inline F32x16 swap_neighbours(F32x16 a) {
  return each([&](size_t i) { return a.lane[i ^ 1]; });
}
inline uint32_t word_of(const std::byte* line, size_t i) {
  uint32_t word;
  __builtin_memcpy(&word, line + 4 * i, sizeof word);
  return word;
}
// The first and the second element of each pair of a line.
inline F32x16 even_bf16(const std::byte* line) {
  return each([&](size_t i) { return std::bit_cast<float>(word_of(line, i) << 16); });
}
inline F32x16 odd_bf16(const std::byte* line) {
  return each([&](size_t i) { return std::bit_cast<float>(word_of(line, i) & 0xFFFF0000); });
}
// The bits of a line with the second elements cleared.
inline F32x16 even_bf16_in_place(const std::byte* line) {
  return each([&](size_t i) { return std::bit_cast<float>(word_of(line, i) & 0xFFFF); });
}
// Rounded values as 16 bfloat16, 32 bytes.
inline void store_bf16(std::byte* p, F32x16 a) {
  for (size_t i = 0; i < kLanes; ++i) {
    const auto bits = static_cast<uint16_t>(std::bit_cast<uint32_t>(a.lane[i]) >> 16);
    __builtin_memcpy(p + 2 * i, &bits, sizeof bits);
  }
}
// Rounded values as the first elements of a line; the second ones become 0.
inline void store_even_bf16(std::byte* line, F32x16 a) {
  for (size_t i = 0; i < kLanes; ++i) {
    const uint32_t word = std::bit_cast<uint32_t>(a.lane[i]) >> 16;
    __builtin_memcpy(line + 4 * i, &word, sizeof word);
  }
}
// Rounded values as the second elements of a line; the first ones stay.
inline void store_odd_bf16(std::byte* line, F32x16 a) {
  for (size_t i = 0; i < kLanes; ++i) {
    const uint32_t word = (word_of(line, i) & 0xFFFF) | std::bit_cast<uint32_t>(a.lane[i]);
    __builtin_memcpy(line + 4 * i, &word, sizeof word);
  }
}

// --- int8: a line holds 16 outputs by 4 inputs ---

// A pair of int16 for each of sixteen outputs.
struct I16x32 {
  int16_t lane[2 * kLanes];
};

template <class F>
inline I16x32 each_pair(F f) {
  I16x32 r;
  for (size_t i = 0; i < 2 * kLanes; ++i) r.lane[i] = static_cast<int16_t>(f(i / 2, i % 2));
  return r;
}

// Inputs 0 and 2 of a line, and 1 and 3, widened.
inline I16x32 even_int8(const std::byte* line) {
  return each_pair([&](size_t i, size_t e) { return static_cast<int8_t>(line[4 * i + 2 * e]); });
}
inline I16x32 odd_int8(const std::byte* line) {
  return each_pair([&](size_t i, size_t e) { return static_cast<int8_t>(line[4 * i + 2 * e + 1]); });
}
// The pair at p for every output.
inline I16x32 broadcast_pair(const std::byte* p) {
  return each_pair([&](size_t, size_t e) {
    int16_t x;
    __builtin_memcpy(&x, p + 2 * e, sizeof x);
    return x;
  });
}
// sum + a[0] * b[0] + a[1] * b[1] of each pair.
inline I32x16 dot_pairs(I32x16 sum, I16x32 a, I16x32 b) {
  return each_int([&](size_t i) {
    return sum.lane[i] + a.lane[2 * i] * b.lane[2 * i] + a.lane[2 * i + 1] * b.lane[2 * i + 1];
  });
}
// Sixteen int16, each four of them in the order 0, 2, 1, 3: the pairs that even_int8 and odd_int8 meet.
inline void store_pairs(std::byte* p, I32x16 a) {
  constexpr size_t kOrder[] = {0, 2, 1, 3};
  for (size_t i = 0; i < kLanes; ++i) {
    const auto x = static_cast<int16_t>(a.lane[i / 4 * 4 + kOrder[i % 4]]);
    __builtin_memcpy(p + 2 * i, &x, sizeof x);
  }
}

}  // namespace
}  // namespace gptx::cpu::GPTX_ISA
