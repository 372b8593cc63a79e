// How a tile of weights meets an operand: the one place where precisions differ. A Product has
//   Sum             what the tensor cores add up in
//   kInputs         inputs of a word of weights
//   kLaneWords      words of an operand that a lane has for each tile
//   kChainTiles     tiles of one chain; the chains' sums are added in order, for any number of rows
//   kManyPanels     panels, and
//   kManyGroups     groups of 8 rows that a warp of linear_many has, as its registers allow
//   round           the inputs of one line as words of an operand
//   finish          the output of a whole sum
// and, where warpgroups multiply it (kWarpgroups), for each tile as many products as an operand has pairs of words:
//   expand          the weights of a tile as fragments
//   multiply_unit   one of them
// The residual stream, the norms and the softmax are float32 around all of them.
#pragma once

#include "cuda/kernels/vocabulary.h"
#include "cuda/layout.h"

namespace gptx::cuda {

// How int8-fast rounds a row: x ~ (q - zero) * scale, q from 0 to 255; the others do not use it.
struct RowScale {
  float scale;
  int32_t zero;
};

// What turns the sum of one output into its value.
struct Column {
  float bias;
  float scale;      // int8 only
  int32_t colsum;   // int8 only
};

struct Columns {
  const float* bias;      // [N], or null
  const float* scale;     // [N], int8 only
  const int32_t* colsum;  // [N], int8 only

  GPTX_DEVICE Column at(int n) const {
    return {bias == nullptr ? 0.0f : load_constant(bias + n), scale == nullptr ? 0.0f : load_constant(scale + n),
            colsum == nullptr ? 0 : load_constant(colsum + n)};
  }
};

template <int Words>
struct alignas(Words * 4) Operand {
  uint32_t word[Words];
};

GPTX_DEVICE void copy_words(uint32_t (&a)[4], const uint4& words) {
  a[0] = words.x;
  a[1] = words.y;
  a[2] = words.z;
  a[3] = words.w;
}

// float32 by float32, each as the sum of two TF32 numbers; of the four products the least is left out.
struct Float32Product {
  using Sum = float;
  static constexpr int kInputs = 1;
  static constexpr int kLaneWords = 2;
  static constexpr int kChainTiles = 16;
  static constexpr int kManyPanels = 1, kManyGroups = 4;
  static constexpr bool kScaledRows = false;
  static constexpr bool kWarpgroups = false;

  static GPTX_DEVICE void split(uint32_t bits, uint32_t& high, uint32_t& low) {
    const float x = as_float(bits);
    const float top = round_tf32(x);
    high = as_bits(top);
    // Infinity has no rest.
    low = as_bits(fabsf(top) <= 3.4e38f ? round_tf32(x - top) : 0.0f);
  }
  static GPTX_DEVICE void multiply_add(Sum (&c)[4], const uint4& weights, const Operand<2>& operand) {
    uint32_t w[4];
    copy_words(w, weights);
    uint32_t a_high[4], a_low[4], b_high[2], b_low[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) split(w[i], a_high[i], a_low[i]);
#pragma unroll
    for (int i = 0; i < 2; ++i) split(operand.word[i], b_high[i], b_low[i]);
    mma_tf32(c, a_low, b_high);
    mma_tf32(c, a_high, b_low);
    mma_tf32(c, a_high, b_high);
  }
  static GPTX_DEVICE Operand<1> round(const float (&x)[1], const RowScale&, float) { return {{as_bits(x[0])}}; }
  static GPTX_DEVICE float finish(Sum sum, const RowScale&, const Column& column) { return sum + column.bias; }
};

// bfloat16 by bfloat16, summed in float32.
struct BFloat16Product {
  using Sum = float;
  static constexpr int kInputs = 2;
  static constexpr int kLaneWords = 2;
  static constexpr int kChainTiles = 16;
  static constexpr int kManyPanels = 2, kManyGroups = 8;
  static constexpr bool kScaledRows = false;
  static constexpr bool kWarpgroups = true;

  static GPTX_DEVICE void expand(uint32_t (&a)[1][4], const uint4& weights) { copy_words(a[0], weights); }
  static GPTX_DEVICE void multiply_add(Sum (&c)[4], const uint4& weights, const Operand<2>& operand) {
    uint32_t a[1][4];
    expand(a, weights);
    mma_bf16(c, a[0], operand.word);
  }
  static GPTX_DEVICE void multiply_unit(Sum (&c)[kGroupsOfUnit][4], const uint32_t (&a)[4], uint64_t operand, bool adds) {
    wgmma_bf16(c, a, operand, adds);
  }
  static GPTX_DEVICE Operand<1> round(const float (&x)[2], const RowScale&, float) {
    return {{bf16_pair(x[0], x[1])}};
  }
  static GPTX_DEVICE float finish(Sum sum, const RowScale&, const Column& column) { return sum + column.bias; }
};

// int8 weights, exact in bfloat16, by bfloat16 activations.
struct Int8Product {
  using Sum = float;
  static constexpr int kInputs = 4;
  static constexpr int kLaneWords = 4;
  static constexpr int kChainTiles = 8;
  static constexpr int kManyPanels = 2, kManyGroups = 8;
  static constexpr bool kScaledRows = false;
  static constexpr bool kWarpgroups = true;

  // Bytes of a word as floats: 2^23 + 128 + b has the byte b + 128 as its last one.
  static GPTX_DEVICE void expand_word(uint32_t word, uint32_t& first, uint32_t& second) {
    const uint32_t biased = word ^ 0x80808080u;
    uint32_t bits[4];
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      bits[i] = as_bits(as_float(pick_bytes(biased, 0x4b000000u, 0x7440u + i)) - 8388736.0f);
    }
    first = pick_bytes(bits[0], bits[1], 0x7632u);
    second = pick_bytes(bits[2], bits[3], 0x7632u);
  }
  // The inputs of lines 0 to 3, and of lines 4 to 7.
  static GPTX_DEVICE void expand(uint32_t (&a)[2][4], const uint4& weights) {
    expand_word(weights.x, a[0][0], a[0][2]);
    expand_word(weights.y, a[0][1], a[0][3]);
    expand_word(weights.z, a[1][0], a[1][2]);
    expand_word(weights.w, a[1][1], a[1][3]);
  }
  static GPTX_DEVICE void multiply_add(Sum (&c)[4], const uint4& weights, const Operand<4>& operand) {
    uint32_t a[2][4];
    expand(a, weights);
    const uint32_t front[2] = {operand.word[0], operand.word[1]};
    const uint32_t back[2] = {operand.word[2], operand.word[3]};
    mma_bf16(c, a[0], front);
    mma_bf16(c, a[1], back);
  }
  static GPTX_DEVICE void multiply_unit(Sum (&c)[kGroupsOfUnit][4], const uint32_t (&a)[4], uint64_t operand, bool adds) {
    wgmma_bf16(c, a, operand, adds);
  }
  static GPTX_DEVICE Operand<2> round(const float (&x)[4], const RowScale&, float) {
    return {{bf16_pair(x[0], x[1]), bf16_pair(x[2], x[3])}};
  }
  static GPTX_DEVICE float finish(Sum sum, const RowScale&, const Column& column) {
    return fmaf(sum, column.scale, column.bias);
  }
};

// int8 weights by 8-bit activations, in exact integers: the sums are those of the CPU.
struct Int8FastProduct {
  using Sum = int32_t;
  static constexpr int kInputs = 4;
  static constexpr int kLaneWords = 2;
  static constexpr int kChainTiles = 8;
  static constexpr int kManyPanels = 2, kManyGroups = 8;
  static constexpr bool kScaledRows = true;
  static constexpr bool kWarpgroups = true;

  static GPTX_DEVICE void expand(uint32_t (&a)[1][4], const uint4& weights) { copy_words(a[0], weights); }
  static GPTX_DEVICE void multiply_add(Sum (&c)[4], const uint4& weights, const Operand<2>& operand) {
    uint32_t a[1][4];
    expand(a, weights);
    mma_int8(c, a[0], operand.word);
  }
  static GPTX_DEVICE void multiply_unit(Sum (&c)[kGroupsOfUnit][4], const uint32_t (&a)[4], uint64_t operand, bool adds) {
    wgmma_int8(c, a, operand, adds);
  }
  static GPTX_DEVICE Operand<1> round(const float (&x)[4], const RowScale& row, float inverse) {
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int32_t q = round_to_int(x[i] * inverse);
      const int32_t least = -row.zero, most = 255 - row.zero;
      const int32_t kept = q < least ? least : (q > most ? most : q);
      word |= static_cast<uint32_t>(kept + row.zero) << 8 * i;
    }
    return {{word}};
  }
  static GPTX_DEVICE float finish(Sum sum, const RowScale& row, const Column& column) {
    const float exact = static_cast<float>(sum - row.zero * column.colsum);
    return fmaf(exact, row.scale * column.scale, column.bias);
  }
};

template <class P>
inline constexpr int kLaneBytes = P::kLaneWords * 4;

// Bytes of an operand with `tiles` tiles.
template <class P>
inline constexpr size_t kOperandTileBytes = kWarp * kLaneBytes<P>;

// Element (output, k) of a matrix as float32.
struct WeightsView {
  const std::byte* tiles;
  const float* scale;  // int8 only
  int depth_tiles;
  int inputs;

  GPTX_DEVICE float at(int output, int k) const {
    const std::byte* const p = tiles + weight_offset(output, k, depth_tiles, inputs);
    if (inputs == 1) return *reinterpret_cast<const float*>(p);
    if (inputs == 2) return as_float(static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(p)) << 16);
    return static_cast<float>(*reinterpret_cast<const int8_t*>(p)) * scale[output];
  }
};

}  // namespace gptx::cuda
