// The products that every ISA has: how 16 outputs meet the inputs of one line. An ISA with dot products
// of its own replaces some of them (product_*.h). A Product has
//   Sum, Factor     the accumulator, and what is multiplied
//   kInputs         inputs of one line
//   kParts          multiply-adds for one line; each takes 4 bytes of an operand row
//   kChain          inputs of one chain; the chains' results are added in float32, in order
//   value           the sum as float32
//   operand         writes a row of floats as the activations it wants, whole vectors, zeros at the end
// and where its sums are float32
//   round, put      the same for one vector, from input i on
#pragma once

#include "cpu/kernel_table.h"

namespace gptx::cpu::GPTX_ISA {
namespace {

// Calls f(column, lanes) for the vectors of a row of n floats.
template <class F>
inline void for_each_vector(size_t n, F f) {
  for (size_t i = 0; i < n; i += kLanes) f(i, n - i < kLanes ? n - i : kLanes);
}

// What the products with float32 sums share.
struct FloatSums {
  using Sum = F32x16;

  static Sum zero() { return broadcast(0.0f); }
  template <class Task>
  static F32x16 value(Sum sum, const Task&, int, int) {
    return sum;
  }
};

// One fused multiply-add for each weight. Short chains keep the rounding error below that of one
// long chain.
struct F32Product : FloatSums {
  using Factor = F32x16;
  static constexpr size_t kInputs = 1;
  static constexpr int kParts = 1;
  static constexpr size_t kGroupBytes = 4;
  static constexpr size_t kChain = 128;

  static Factor weights(const std::byte* line, int) { return load(as_floats(line)); }
  static Factor activation(const std::byte* p, int) { return broadcast(*as_floats(p)); }
  static Sum multiply_add(Sum sum, Factor a, Factor b) { return fma(a, b, sum); }
  static F32x16 round(F32x16 x) { return x; }
  static void put(std::byte* out, size_t i, F32x16 rounded) { store(as_floats(out) + i, rounded); }

  static RowScale operand(std::byte* out, const float* x, size_t n) noexcept {
    for_each_vector(n, [&](size_t i, size_t lanes) { put(out, i, load_first(x + i, lanes)); });
    return {1.0f, 0};
  }
};

// bfloat16 by bfloat16, each exact in float32; of a pair the odd element is added first, as the
// instruction of the hardware does. The operand holds floats, odd and even changed over.
struct BF16Product : FloatSums {
  using Factor = F32x16;
  static constexpr size_t kInputs = 2;
  static constexpr int kParts = 2;
  static constexpr size_t kGroupBytes = 8;
  static constexpr size_t kChain = 512;

  static Factor weights(const std::byte* line, int part) {
    return part == 0 ? odd_bf16(line) : even_bf16(line);
  }
  static Factor activation(const std::byte* p, int part) {
    return broadcast(as_floats(p)[part]);
  }
  static Sum multiply_add(Sum sum, Factor a, Factor b) { return fma(a, b, sum); }
  static F32x16 round(F32x16 x) { return round_bf16(x); }
  static void put(std::byte* out, size_t i, F32x16 rounded) {
    store(as_floats(out) + i, swap_neighbours(rounded));
  }

  static RowScale operand(std::byte* out, const float* x, size_t n) noexcept {
    for_each_vector(n, [&](size_t i, size_t lanes) {
      put(out, i, round(load_first(x + i, lanes)));
    });
    return {1.0f, 0};
  }
};

// The largest magnitude of a row; NaN if anything in it is not finite.
inline float largest(const float* x, size_t n) {
  F32x16 top = broadcast(0.0f), check = top;
  for_each_vector(n, [&](size_t i, size_t lanes) {
    const F32x16 v = load_first(x + i, lanes);
    top = max(max(v, broadcast(0.0f) - v), top);
    check = fma(v, broadcast(0.0f), check);
  });
  return reduce_max(top) + reduce_add(check);
}

// A row whose largest value is below this is a row of zeros.
inline constexpr float kSmallest = 0x1p-100f;

// int8 weights by 16-bit activations, widened to pairs of int16: exact integers. A chain of 512 inputs
// fits an int32: 32767 * 127 * 512 < 2^31. Of four inputs the even two are multiplied first,
// then the odd two, since this is how a line of int8 widens cheaply.
template <size_t Chain>
struct Int16Product {
  using Sum = I32x16;
  using Factor = I16x32;
  static constexpr size_t kInputs = 4;
  static constexpr int kParts = 2;
  static constexpr size_t kGroupBytes = 8;
  static constexpr size_t kChain = Chain;

  static Sum zero() { return broadcast_int(0); }
  static Factor weights(const std::byte* line, int part) {
    return part == 0 ? even_int8(line) : odd_int8(line);
  }
  static Factor activation(const std::byte* p, int part) { return broadcast_pair(p + 4 * part); }
  static Sum multiply_add(Sum sum, Factor a, Factor b) { return dot_pairs(sum, a, b); }
  template <class Task>
  static F32x16 value(Sum sum, const Task&, int, int) {
    return to_float(sum);
  }
};

// Symmetric: x ~ q * scale with scale = max|x| / 32767.
struct Int8Product : Int16Product<512> {
  static RowScale operand(std::byte* out, const float* x, size_t n) noexcept {
    const float top = largest(x, n);
    const F32x16 inverse = broadcast(top < kSmallest ? 0.0f : 32767.0f / top);
    for_each_vector(n, [&](size_t i, size_t lanes) {
      store_pairs(out + 2 * i, round_to_int(load_first(x + i, lanes) * inverse));
    });
    return {top < kSmallest ? 0.0f : top / 32767.0f, 0};
  }
};

// How the fast mode rounds a row: x ~ (q - zero) * scale with q from 0 to 255, and 0 exact.
struct ByteScale {
  explicit ByteScale(const float* x, size_t n) {
    F32x16 least = broadcast(0.0f), most = least, check = least;
    for_each_vector(n, [&](size_t i, size_t lanes) {
      const F32x16 v = load_first(x + i, lanes);
      least = min(v, least);
      most = max(v, most);
      check = fma(v, broadcast(0.0f), check);
    });
    const float low = -reduce_max(broadcast(0.0f) - least);
    const float range = reduce_max(most) - low + reduce_add(check);
    row.scale = range < kSmallest ? 0.0f : range / 255.0f;
    if (!(range >= kSmallest)) return;  // zeros, or NaN, which the scale carries on
    inverse = 255.0f / range;
    row.zero = first_lane(round_to_int(broadcast(-low * inverse)));
  }
  // q - zero, from -zero to 255 - zero.
  I32x16 centred(F32x16 x) const {
    const I32x16 q = round_to_int(x * broadcast(inverse));
    return clamp(q, -row.zero, 255 - row.zero);
  }

  float inverse = 0.0f;
  RowScale row = {0.0f, 0};
};

// The fast mode without a dot product of bytes: q - zero is an int16, and the sums are the same.
struct Int8FastProduct : Int16Product<kMaxInt8Depth> {
  static RowScale operand(std::byte* out, const float* x, size_t n) noexcept {
    const ByteScale bytes(x, n);
    for_each_vector(n, [&](size_t i, size_t lanes) {
      store_pairs(out + 2 * i, bytes.centred(load_first(x + i, lanes)));
    });
    return bytes.row;
  }
};

}  // namespace
}  // namespace gptx::cpu::GPTX_ISA
