// exp, GELU and erfc on the vocabulary: explicit fused multiply-adds, the same bits on every ISA.
// The coefficients are least-maximum fits made for these intervals.
#pragma once

namespace gptx::cpu::GPTX_ISA {
namespace {

// c[0] + c[1] x + ... by Horner's rule.
template <size_t N>
inline F32x16 polynomial(F32x16 x, const float (&c)[N]) {
  F32x16 y = broadcast(c[N - 1]);
  for (size_t i = N - 1; i-- > 0;) y = fma(y, x, broadcast(c[i]));
  return y;
}

// e^x for x in [-87, 88], clamped outside; relative error below 1e-7.
// x = n ln 2 + r, |r| <= ln 2 / 2; e^x = 2^n (1 + r + r^2 p(r)).
inline F32x16 exp(F32x16 x) {
  static constexpr float kPoly[] = {0.49999993f, 0.16666520f, 0.041668395f, 0.0083687804f,
                                    0.0013814466f};
  x = min(max(x, broadcast(-87.0f)), broadcast(88.0f));
  const F32x16 magic = broadcast(12582912.0f);  // 1.5 * 2^23: the sum's low bits hold round(x)
  const F32x16 t = fma(x, broadcast(1.44269504f), magic);
  const F32x16 n = t - magic;
  F32x16 r = fma(n, broadcast(-0.693145752f), x);
  r = fma(n, broadcast(-1.42860677e-6f), r);
  const F32x16 p = fma(polynomial(r, kPoly), r * r, r) + broadcast(1.0f);
  return add_to_exponent(p, t);
}

// GPT-2's GELU, x / (1 + e^(-2u)) with u = sqrt(2/pi) (x + 0.044715 x^3): the tanh form rewritten,
// without its cancellation for negative x (Hendrycks & Gimpel, 2016).
inline F32x16 gelu_new(F32x16 x) {
  const F32x16 inner = fma(x * x, broadcast(-2.0f * 0.7978845608f * 0.044715f),
                           broadcast(-2.0f * 0.7978845608f));
  return x / (broadcast(1.0f) + exp(x * inner));
}

// erfc(z) for z >= 0: 1 - z p(z^2) below 1, e^q(z) to 8, then 0; absolute error below 1e-7.
inline F32x16 erfc_positive(F32x16 z) {
  static constexpr float kSmall[] = {1.12837917f,     -0.376126271f,   0.112836002f,
                                     -0.0268544446f,  0.00518953545f,  -0.000802084265f,
                                     7.88912279e-05f};
  static constexpr float kLog[] = {-0.000332692029f, -1.12712249f,    -0.638093583f,
                                   -0.103147953f,    0.0218563042f,   -0.00295187479f,
                                   0.000186776782f};
  const F32x16 one = broadcast(1.0f);
  const F32x16 low = min(z, one);
  const F32x16 small = fma(polynomial(low * low, kSmall), broadcast(0.0f) - low, one);
  const F32x16 end = broadcast(8.0f);
  const F32x16 high = select_less(z, end, exp(polynomial(min(z, end), kLog)), broadcast(0.0f));
  return select_less(z, one, small, high);
}

// The exact GELU, x/2 erfc(-x / sqrt 2).
inline F32x16 gelu(F32x16 x) {
  const F32x16 zero = broadcast(0.0f);
  const F32x16 z = x * broadcast(0.707106781f);
  const F32x16 tail = erfc_positive(max(z, zero - z));
  return broadcast(0.5f) * x * select_less(z, zero, tail, broadcast(2.0f) - tail);
}

inline F32x16 relu(F32x16 x) { return max(x, broadcast(0.0f)); }

}  // namespace
}  // namespace gptx::cpu::GPTX_ISA
