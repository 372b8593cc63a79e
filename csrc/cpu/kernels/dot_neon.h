// The dot product of int16 pairs on NEON: two multiply-adds that widen. One side, a, is the same
// pair for all outputs.
#pragma once

namespace gptx::cpu::GPTX_ISA {
namespace {

inline I32x16 dot_pairs(I32x16 sum, I16x32 a, I16x32 b) {
  const int16x4_t pair = vget_low_s16(a.first[0]);
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    int32x4_t& low = sum.v[2 * i];
    int32x4_t& high = sum.v[2 * i + 1];
    low = vmlal_lane_s16(low, vget_low_s16(b.first[i]), pair, 0);
    high = vmlal_high_lane_s16(high, b.first[i], pair, 0);
    low = vmlal_lane_s16(low, vget_low_s16(b.second[i]), pair, 1);
    high = vmlal_high_lane_s16(high, b.second[i], pair, 1);
  }
  return sum;
}

}  // namespace
}  // namespace gptx::cpu::GPTX_ISA
