// How a tile of weights meets an operand: the one place where precisions differ. A Product has
//   Sum             what the tensor cores add up in
//   kInputs         inputs of a word of weights
//   kLaneWords      words of an operand that a lane has for each tile
//   kChainTiles     tiles of one chain; the chains' sums are added in order, for any number of rows
//   kManyGroups     groups of 8 rows that a warp of linear_many has, as its registers allow
//   kManyBlocks     blocks of linear_many for a multiprocessor, which decides how registers are shared out; 0: unsaid
//   store           writes the inputs of one line as part of an operand
//   finish          the output of a whole sum
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

// float32 by float32, each as the sum of two TF32 numbers; of the four products the least is left out.
struct Float32Product {
  using Sum = float;
  static constexpr int kInputs = 1;
  static constexpr int kLaneWords = 2;
  static constexpr int kChainTiles = 16;
  static constexpr int kManyGroups = 4;
  static constexpr int kManyBlocks = 0;
  static constexpr bool kScaledRows = false;

  static GPTX_DEVICE void split(uint32_t bits, uint32_t& high, uint32_t& low) {
    const float x = as_float(bits);
    const float top = round_tf32(x);
    high = as_bits(top);
    // Infinity has no rest.
    low = as_bits(fabsf(top) <= 3.4e38f ? round_tf32(x - top) : 0.0f);
  }
  static GPTX_DEVICE void multiply_add(Sum (&c)[4], const uint4& weights, const Operand<2>& operand) {
    const uint32_t w[4] = {weights.x, weights.y, weights.z, weights.w};
    uint32_t a_high[4], a_low[4], b_high[2], b_low[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) split(w[i], a_high[i], a_low[i]);
#pragma unroll
    for (int i = 0; i < 2; ++i) split(operand.word[i], b_high[i], b_low[i]);
    mma_tf32(c, a_low, b_high);
    mma_tf32(c, a_high, b_low);
    mma_tf32(c, a_high, b_high);
  }
  static GPTX_DEVICE void store(std::byte* p, const float (&x)[1], const RowScale&, float) {
    *reinterpret_cast<float*>(p) = x[0];
  }
  static GPTX_DEVICE float finish(Sum sum, const RowScale&, const Column& column) { return sum + column.bias; }
};

// bfloat16 by bfloat16, summed in float32.
struct BFloat16Product {
  using Sum = float;
  static constexpr int kInputs = 2;
  static constexpr int kLaneWords = 2;
  static constexpr int kChainTiles = 16;
  static constexpr int kManyGroups = 8;
  static constexpr int kManyBlocks = 1;
  static constexpr bool kScaledRows = false;

  static GPTX_DEVICE void multiply_add(Sum (&c)[4], const uint4& weights, const Operand<2>& operand) {
    const uint32_t a[4] = {weights.x, weights.y, weights.z, weights.w};
    mma_bf16(c, a, operand.word);
  }
  static GPTX_DEVICE void store(std::byte* p, const float (&x)[2], const RowScale&, float) {
    *reinterpret_cast<uint32_t*>(p) = bf16_pair(x[0], x[1]);
  }
  static GPTX_DEVICE float finish(Sum sum, const RowScale&, const Column& column) { return sum + column.bias; }
};

// int8 weights, exact in bfloat16, by bfloat16 activations.
struct Int8Product {
  using Sum = float;
  static constexpr int kInputs = 4;
  static constexpr int kLaneWords = 4;
  static constexpr int kChainTiles = 8;
  static constexpr int kManyGroups = 8;
  static constexpr int kManyBlocks = 1;
  static constexpr bool kScaledRows = false;

  // Bytes of a word as floats: 2^23 + 128 + b has the byte b + 128 as its last one.
  static GPTX_DEVICE void expand(uint32_t word, uint32_t& first, uint32_t& second) {
    const uint32_t biased = word ^ 0x80808080u;
    uint32_t bits[4];
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      bits[i] = as_bits(as_float(pick_bytes(biased, 0x4b000000u, 0x7440u + i)) - 8388736.0f);
    }
    first = pick_bytes(bits[0], bits[1], 0x7632u);
    second = pick_bytes(bits[2], bits[3], 0x7632u);
  }
  static GPTX_DEVICE void multiply_add(Sum (&c)[4], const uint4& weights, const Operand<4>& operand) {
    uint32_t near[4], far[4];  // inputs of line t, and of line t + 4
    expand(weights.x, near[0], near[2]);
    expand(weights.y, near[1], near[3]);
    expand(weights.z, far[0], far[2]);
    expand(weights.w, far[1], far[3]);
    const uint32_t front[2] = {operand.word[0], operand.word[1]};
    const uint32_t back[2] = {operand.word[2], operand.word[3]};
    mma_bf16(c, near, front);
    mma_bf16(c, far, back);
  }
  static GPTX_DEVICE void store(std::byte* p, const float (&x)[4], const RowScale&, float) {
    auto* const words = reinterpret_cast<uint32_t*>(p);
    words[0] = bf16_pair(x[0], x[1]);
    words[1] = bf16_pair(x[2], x[3]);
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
  static constexpr int kManyGroups = 8;
  static constexpr int kManyBlocks = 1;
  static constexpr bool kScaledRows = true;

  static GPTX_DEVICE void multiply_add(Sum (&c)[4], const uint4& weights, const Operand<2>& operand) {
    const uint32_t a[4] = {weights.x, weights.y, weights.z, weights.w};
    mma_int8(c, a, operand.word);
  }
  static GPTX_DEVICE void store(std::byte* p, const float (&x)[4], const RowScale& row, float inverse) {
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int32_t q = round_to_int(x[i] * inverse);
      const int32_t least = -row.zero, most = 255 - row.zero;
      const int32_t kept = q < least ? least : (q > most ? most : q);
      word |= static_cast<uint32_t>(kept + row.zero) << 8 * i;
    }
    *reinterpret_cast<uint32_t*>(p) = word;
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
