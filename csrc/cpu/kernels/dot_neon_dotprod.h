// The dot product of four bytes of Armv8.2 DotProd. Both sides are signed, so activations are held
// with 128 taken off.
#pragma once

namespace gptx::cpu::GPTX_ISA {
namespace {

struct I8x64 {
  int8x16_t v[4];
};

inline constexpr int32_t kByteOffset = 128;

inline I32x16 dot_fours(I32x16 sum, I8x64 a, I8x64 b) {
  return each<I32x16>([&](int i) { return vdotq_s32(sum.v[i], b.v[i], a.v[i]); });
}
inline I8x64 load_fours(const std::byte* line) {
  return each<I8x64>([&](int i) { return vreinterpretq_s8_u8(load_quarter(line + 16 * i)); });
}
inline I8x64 broadcast_fours(const std::byte* p) {
  const int32x4_t fours = vld1q_dup_s32(reinterpret_cast<const int32_t*>(p));
  return each<I8x64>([&](int) { return vreinterpretq_s8_s32(fours); });
}
inline void store_bytes(std::byte* p, I32x16 a) {
  const int16x8_t low = vcombine_s16(vmovn_s32(a.v[0]), vmovn_s32(a.v[1]));
  const int16x8_t high = vcombine_s16(vmovn_s32(a.v[2]), vmovn_s32(a.v[3]));
  store_quarter(p, vreinterpretq_u8_s8(vcombine_s8(vmovn_s16(low), vmovn_s16(high))));
}
inline I32x16 add(I32x16 a, I32x16 b) {
  return each<I32x16>([&](int i) { return vaddq_s32(a.v[i], b.v[i]); });
}
inline I32x16 multiply(I32x16 a, I32x16 b) {
  return each<I32x16>([&](int i) { return vmulq_s32(a.v[i], b.v[i]); });
}
inline I32x16 subtract(I32x16 a, I32x16 b) {
  return each<I32x16>([&](int i) { return vsubq_s32(a.v[i], b.v[i]); });
}
inline I32x16 load_int(const int32_t* p) {
  return each<I32x16>([&](int i) { return vld1q_s32(p + 4 * i); });
}

}  // namespace
}  // namespace gptx::cpu::GPTX_ISA
