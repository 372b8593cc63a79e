// The kernel vocabulary on NEON: sixteen floats in four registers. See vec_scalar.h.
#pragma once

#include <arm_neon.h>

#include <cstddef>
#include <cstdint>

namespace gptx::cpu::GPTX_ISA {
namespace {

inline constexpr size_t kLanes = 16;
inline constexpr int kTileRows = 5;  // 20 accumulators, 8 for weights, 1 activation: 29 of 32
inline constexpr int kTilePanels = 1;
inline constexpr int kTallRows = 5;
inline constexpr int kTallPanels = 1;
inline constexpr int kLowRows = 1;
inline constexpr int kLowPanels = 2;
inline constexpr int kRowPanels = 2;

struct F32x16 {
  float32x4_t v[4];
};

// A value of four registers, f(i) of each.
template <class V, class F>
inline V each(F f) {
  V r;
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) r.v[i] = f(i);
  return r;
}

inline F32x16 broadcast(float x) {
  return each<F32x16>([&](int) { return vdupq_n_f32(x); });
}
inline F32x16 load(const float* p) {
  return each<F32x16>([&](int i) { return vld1q_f32(p + 4 * i); });
}
inline void store(float* p, F32x16 a) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, a.v[i]);
}
inline F32x16 load_first(const float* p, size_t n) {
  if (n >= kLanes) return load(p);
  float lane[kLanes] = {};
  __builtin_memcpy(lane, p, n * sizeof(float));
  return load(lane);
}
inline void store_first(float* p, F32x16 a, size_t n) {
  if (n >= kLanes) return store(p, a);
  float lane[kLanes];
  store(lane, a);
  __builtin_memcpy(p, lane, n * sizeof(float));
}

inline F32x16 operator+(F32x16 a, F32x16 b) {
  return each<F32x16>([&](int i) { return vaddq_f32(a.v[i], b.v[i]); });
}
inline F32x16 operator-(F32x16 a, F32x16 b) {
  return each<F32x16>([&](int i) { return vsubq_f32(a.v[i], b.v[i]); });
}
inline F32x16 operator*(F32x16 a, F32x16 b) {
  return each<F32x16>([&](int i) { return vmulq_f32(a.v[i], b.v[i]); });
}
inline F32x16 operator/(F32x16 a, F32x16 b) {
  return each<F32x16>([&](int i) { return vdivq_f32(a.v[i], b.v[i]); });
}
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
  return each<F32x16>([&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); });
}
// The instructions for maximum and minimum prefer NaN and +0; here the second operand wins.
inline F32x16 max(F32x16 a, F32x16 b) {
  return each<F32x16>([&](int i) {
    return vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]);
  });
}
inline F32x16 min(F32x16 a, F32x16 b) {
  return each<F32x16>([&](int i) {
    return vbslq_f32(vcltq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]);
  });
}
inline F32x16 select_less(F32x16 a, F32x16 b, F32x16 x, F32x16 y) {
  return each<F32x16>([&](int i) {
    return vbslq_f32(vcltq_f32(a.v[i], b.v[i]), x.v[i], y.v[i]);
  });
}
inline F32x16 first_lanes(F32x16 a, F32x16 b, size_t n) {
  static constexpr uint32_t kLane[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const uint32x4_t end = vdupq_n_u32(static_cast<uint32_t>(n < kLanes ? n : kLanes));
  return each<F32x16>([&](int i) {
    return vbslq_f32(vcltq_u32(vld1q_u32(kLane + 4 * i), end), a.v[i], b.v[i]);
  });
}
inline F32x16 add_to_exponent(F32x16 a, F32x16 t) {
  return each<F32x16>([&](int i) {
    const uint32x4_t shifted = vshlq_n_u32(vreinterpretq_u32_f32(t.v[i]), 23);
    return vreinterpretq_f32_u32(vaddq_u32(vreinterpretq_u32_f32(a.v[i]), shifted));
  });
}

inline float reduce_add(F32x16 a) {
  const float32x4_t four = vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3]));
  const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
  return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
inline float32x4_t larger(float32x4_t a, float32x4_t b) {
  return vbslq_f32(vcgtq_f32(a, b), a, b);
}
inline float reduce_max(F32x16 a) {
  const float32x4_t four = larger(larger(a.v[0], a.v[2]), larger(a.v[1], a.v[3]));
  const float32x4_t two = larger(four, vextq_f32(four, four, 2));
  return vgetq_lane_f32(larger(two, vextq_f32(two, two, 1)), 0);
}

inline float first_lane(F32x16 a) { return vgetq_lane_f32(a.v[0], 0); }

inline float* as_floats(std::byte* p) { return reinterpret_cast<float*>(p); }
inline const float* as_floats(const std::byte* p) { return reinterpret_cast<const float*>(p); }
inline std::byte* as_bytes(float* p) { return reinterpret_cast<std::byte*>(p); }

inline uint8x16_t load_quarter(const std::byte* p) {
  return vld1q_u8(reinterpret_cast<const uint8_t*>(p));
}
inline void store_quarter(std::byte* p, uint8x16_t a) {
  vst1q_u8(reinterpret_cast<uint8_t*>(p), a);
}

struct I32x16 {
  int32x4_t v[4];
};

inline I32x16 broadcast_int(int32_t x) {
  return each<I32x16>([&](int) { return vdupq_n_s32(x); });
}
inline int32_t first_lane(I32x16 a) { return vgetq_lane_s32(a.v[0], 0); }
inline F32x16 to_float(I32x16 a) {
  return each<F32x16>([&](int i) { return vcvtq_f32_s32(a.v[i]); });
}
inline I32x16 round_to_int(F32x16 a) {
  return each<I32x16>([&](int i) { return vcvtnq_s32_f32(a.v[i]); });
}
inline I32x16 clamp(I32x16 a, int32_t low, int32_t high) {
  const int32x4_t least = vdupq_n_s32(low), most = vdupq_n_s32(high);
  return each<I32x16>([&](int i) { return vminq_s32(vmaxq_s32(a.v[i], least), most); });
}

inline F32x16 round_bf16(F32x16 a) {
  return each<F32x16>([&](int i) {
    const uint32x4_t bits = vreinterpretq_u32_f32(a.v[i]);
    const uint32x4_t last = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(last, vdupq_n_u32(0x7FFF)));
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    const uint32x4_t chosen = vbslq_u32(vceqq_f32(a.v[i], a.v[i]), rounded, quiet);
    return vreinterpretq_f32_u32(vandq_u32(chosen, vdupq_n_u32(0xFFFF0000)));
  });
}
inline F32x16 swap_neighbours(F32x16 a) {
  return each<F32x16>([&](int i) { return vrev64q_f32(a.v[i]); });
}
inline uint32x4_t words_of(const std::byte* line, int i) {
  return vreinterpretq_u32_u8(load_quarter(line + 16 * i));
}
inline F32x16 even_bf16(const std::byte* line) {
  return each<F32x16>([&](int i) {
    return vreinterpretq_f32_u32(vshlq_n_u32(words_of(line, i), 16));
  });
}
inline F32x16 masked_line(const std::byte* line, uint32_t mask) {
  return each<F32x16>([&](int i) {
    return vreinterpretq_f32_u32(vandq_u32(words_of(line, i), vdupq_n_u32(mask)));
  });
}
inline F32x16 odd_bf16(const std::byte* line) { return masked_line(line, 0xFFFF0000); }
inline F32x16 even_bf16_in_place(const std::byte* line) { return masked_line(line, 0xFFFF); }
inline void store_bf16(std::byte* p, F32x16 a) {
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const uint16x4_t low = vshrn_n_u32(vreinterpretq_u32_f32(a.v[2 * i]), 16);
    const uint16x4_t high = vshrn_n_u32(vreinterpretq_u32_f32(a.v[2 * i + 1]), 16);
    store_quarter(p + 16 * i, vreinterpretq_u8_u16(vcombine_u16(low, high)));
  }
}
inline void store_even_bf16(std::byte* line, F32x16 a) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const uint32x4_t even = vshrq_n_u32(vreinterpretq_u32_f32(a.v[i]), 16);
    store_quarter(line + 16 * i, vreinterpretq_u8_u32(even));
  }
}
inline void store_odd_bf16(std::byte* line, F32x16 a) {
  const F32x16 even = even_bf16_in_place(line);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    store_quarter(line + 16 * i, vorrq_u8(vreinterpretq_u8_f32(even.v[i]),
                                          vreinterpretq_u8_f32(a.v[i])));
  }
}

// The first and the second of each pair, of sixteen outputs.
struct I16x32 {
  int16x8_t first[2], second[2];
};

inline I16x32 widened_pairs(int8x16_t first, int8x16_t second) {
  return {{vmovl_s8(vget_low_s8(first)), vmovl_high_s8(first)},
          {vmovl_s8(vget_low_s8(second)), vmovl_high_s8(second)}};
}
// Loads a line with its four inputs apart.
inline int8x16x4_t inputs_of(const std::byte* line) {
  return vld4q_s8(reinterpret_cast<const int8_t*>(line));
}
inline I16x32 even_int8(const std::byte* line) {
  const int8x16x4_t inputs = inputs_of(line);
  return widened_pairs(inputs.val[0], inputs.val[2]);
}
inline I16x32 odd_int8(const std::byte* line) {
  const int8x16x4_t inputs = inputs_of(line);
  return widened_pairs(inputs.val[1], inputs.val[3]);
}
// The pair four times over in every register: dot_pairs takes its elements from the lanes.
inline I16x32 broadcast_pair(const std::byte* p) {
  const int16x8_t pairs =
      vreinterpretq_s16_s32(vld1q_dup_s32(reinterpret_cast<const int32_t*>(p)));
  return {{pairs, pairs}, {pairs, pairs}};
}
inline void store_pairs(std::byte* p, I32x16 a) {
  static constexpr uint8_t kOrder[] = {0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15};
  const uint8x16_t order = vld1q_u8(kOrder);
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const int16x8_t narrow = vcombine_s16(vmovn_s32(a.v[2 * i]), vmovn_s32(a.v[2 * i + 1]));
    store_quarter(p + 16 * i, vqtbl1q_u8(vreinterpretq_u8_s16(narrow), order));
  }
}

}  // namespace
}  // namespace gptx::cpu::GPTX_ISA
