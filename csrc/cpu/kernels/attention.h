// Causal attention over KV blocks of 64 positions, with the softmax kept online (Milakov & Gimelshein,
// 2018). Blocks start at multiples of 64 and every row meets them in the same order with the same
// arithmetic, whether it is prefilled or decoded.
//
// K and V blocks are weight panels, so both products are the matmul of tile.h, with G positions or
// dimensions in a line (1 float32 or 2 bfloat16):
//   scores [rows, 64] = query [rows, D] x K [64/16, D/G, 16, G]
//   out [rows, Dp]   += scores [rows, 64] x V [Dp/16, 64/G, 16, G]
#pragma once

#include "cpu/kernel_table.h"

namespace gptx::cpu::GPTX_ISA {
namespace {

inline constexpr size_t kGroup = kTileRows;  // rows that go through a block together
static_assert(kGroup <= kMaxAttentionRows);

struct SoftmaxRow {
  float maximum;
  float sum;
};

// Turns one row of scores into exp(score - maximum) over its n visible positions, rounded as P holds
// them, zero beyond, and rescales what the row has gathered so far.
template <class P>
inline void softmax_step(SoftmaxRow& row, float* scores, size_t n, float* out, size_t width) {
  const F32x16 hidden = broadcast(-__builtin_inff());
  F32x16 top = hidden;
  for (size_t i = 0; i < kBlock; i += kLanes) {
    top = max(first_lanes(load(scores + i), hidden, n > i ? n - i : 0), top);
  }
  const float block_maximum = reduce_max(top);
  const float maximum = row.maximum > block_maximum ? row.maximum : block_maximum;
  const F32x16 shift = broadcast(maximum);
  const F32x16 rescale = exp(broadcast(row.maximum) - shift);

  F32x16 sum = broadcast(0.0f);
  for (size_t i = 0; i < kBlock; i += kLanes) {
    const F32x16 p = P::round(exp(load(scores + i) - shift));
    const F32x16 visible = first_lanes(p, broadcast(0.0f), n > i ? n - i : 0);
    store(scores + i, visible);
    sum = sum + visible;
  }
  row.sum = __builtin_fmaf(row.sum, first_lane(rescale), reduce_add(sum));
  row.maximum = maximum;
  for (size_t i = 0; i < width; i += kLanes) store(out + i, load(out + i) * rescale);
}

// The last position alone where it is the first of a pair: the second belongs to a position that is
// hidden, and is never multiplied.
inline void keep_even(float* lines, const std::byte* values, size_t panel_stride, size_t width) {
  for (size_t i = 0; i < width; i += kPanel) {
    store(lines + i, even_bf16_in_place(values + i / kPanel * panel_stride));
  }
}

// Up to kGroup consecutive rows of one block.
template <class P>
inline void attend_group(const AttentionTask& t, size_t first, size_t rows) {
  constexpr size_t kG = P::kInputs;
  const size_t width = round_up(t.head_size, kPanel);
  const size_t key_lines = round_up(t.head_size, kG) / kG;
  const size_t operand_bytes = width / kG * P::kGroupBytes;
  constexpr size_t kWeightBytes = kBlock / kG * P::kGroupBytes;
  constexpr size_t kValueBytes = kBlock / kG * kLineBytes;  // of one panel of V

  float* const scores = t.scratch;
  float* const gathered = scores + kGroup * kBlock;
  float* const last_line = gathered + kGroup * width;
  std::byte* const query = as_bytes(last_line + width);
  std::byte* const weights = query + kGroup * width * kOperandBytes;
  SoftmaxRow state[kGroup];
  for (size_t i = 0; i < rows; ++i) {
    state[i] = {-__builtin_inff(), 0.0f};
    const float* const source = t.query + (first + i) * t.query_stride;
    float* const scaled = gathered + i * width;
    for (size_t d = 0; d < width; d += kLanes) {
      store(scaled + d, load(source + d) * broadcast(t.scale));
    }
    P::operand(query + i * operand_bytes, scaled, width);
    for (size_t d = 0; d < width; d += kLanes) store(scaled + d, broadcast(0.0f));
  }

  const size_t position = t.position + first;
  const size_t last_block = position / kBlock;
  for (size_t b = 0; b <= last_block; ++b) {
    const std::byte* const keys = t.blocks[b];
    const std::byte* const values = keys + kBlock / kPanel * (width / kG) * kLineBytes;
    TileTask score{};
    score.out = scores;
    score.out_stride = kBlock;
    score.act = query;
    score.act_stride = operand_bytes;
    score.panels = keys;
    score.panel_stride = key_lines * kLineBytes;
    score.lines = key_lines;
    score.next = values;
    matmul<P, Into::kStore>(score, rows, kBlock / kPanel);
    // In its own block a row sees the positions up to its own, elsewhere the whole block.
    const size_t visible = b < last_block ? kBlock : position % kBlock + 1;
    const size_t step = b < last_block ? 0 : 1;
    for (size_t i = 0; i < rows; ++i) {
      float* const p = scores + i * kBlock;
      softmax_step<P>(state[i], p, visible + i * step, gathered + i * width, width);
      P::operand(weights + i * kWeightBytes, p, kBlock);
    }
    TileTask mix{};
    mix.out = gathered;
    mix.out_stride = width;
    mix.act = weights;
    mix.act_stride = kWeightBytes;
    mix.panels = values;
    mix.panel_stride = kValueBytes;
    mix.lines = visible / kG;
    mix.next = values;
    matmul<P, Into::kContinue>(mix, rows, width / kPanel);
    if (step == 0) continue;
    // The later rows of the diagonal block see more positions; hidden ones are never multiplied.
    for (size_t i = 0; i < rows; ++i) {
      const size_t more = visible + i - mix.lines * kG;
      TileTask rest = mix;
      rest.out += i * width;
      rest.act += i * kWeightBytes + mix.lines * P::kGroupBytes;
      rest.panels += mix.lines * kLineBytes;
      rest.lines = more / kG;
      if (rest.lines > 0) matmul<P, Into::kContinue>(rest, 1, width / kPanel);
      if constexpr (kG == 2) {
        if (more % kG == 0) continue;
        keep_even(last_line, rest.panels + rest.lines * kLineBytes, kValueBytes, width);
        rest.act += rest.lines * P::kGroupBytes;
        rest.panels = as_bytes(last_line);
        rest.panel_stride = kLineBytes;
        rest.lines = 1;
        matmul<P, Into::kContinue>(rest, 1, width / kPanel);
      }
    }
  }

  for (size_t i = 0; i < rows; ++i) {
    const F32x16 sum = broadcast(state[i].sum);
    float* const out = t.out + (first + i) * t.out_stride;
    for (size_t d = 0; d < t.head_size; d += kLanes) {
      store_first(out + d, load(gathered + i * width + d) / sum, t.head_size - d);
    }
  }
}

template <class P>
inline void attention(const AttentionTask& t) noexcept {
  for (size_t first = 0; first < t.rows; first += kGroup) {
    attend_group<P>(t, first, first + kGroup <= t.rows ? kGroup : t.rows - first);
  }
}

inline void append_key_f32(std::byte* block, const float* key, size_t position,
                           size_t head_size) noexcept {
  const size_t t = position % kBlock;
  float* const keys = as_floats(block) + t / kPanel * head_size * kPanel + t % kPanel;
  for (size_t d = 0; d < head_size; ++d) keys[d * kPanel] = key[d];
}

inline void append_value_f32(std::byte* block, const float* value, size_t position,
                             size_t head_size) noexcept {
  const size_t width = round_up(head_size, kPanel);
  float* const values = as_floats(block) + kBlock * width + position % kBlock * kPanel;
  for (size_t p = 0; p < width; p += kPanel) store(values + p * kBlock, load(value + p));
}

// A pair of dimensions is one store of 4 bytes; the padding of an odd head size is written too.
inline void append_key_bf16(std::byte* block, const float* key, size_t position,
                            size_t head_size) noexcept {
  const size_t t = position % kBlock;
  const size_t lines = round_up(head_size, 2) / 2;
  std::byte* const keys = block + t / kPanel * lines * kLineBytes + t % kPanel * 4;
  alignas(64) std::byte pairs[2 * kLanes];
  for_each_vector(head_size, [&](size_t d, size_t lanes) {
    store_bf16(pairs, round_bf16(load_first(key + d, lanes)));
    for (size_t i = 0; i < round_up(lanes, 2) / 2; ++i) {
      __builtin_memcpy(keys + (d / 2 + i) * kLineBytes, pairs + 4 * i, 4);
    }
  });
}

// Two positions share a line. The first of them clears the place of the second, so that nothing
// older stands there while it is hidden.
inline void append_value_bf16(std::byte* block, const float* value, size_t position,
                              size_t head_size) noexcept {
  const size_t t = position % kBlock;
  const size_t width = round_up(head_size, kPanel);
  std::byte* const values = block + kBlock * width * 2 + t / 2 * kLineBytes;
  for (size_t p = 0; p < width; p += kPanel) {
    std::byte* const line = values + p / kPanel * (kBlock / 2) * kLineBytes;
    const F32x16 rounded = round_bf16(load(value + p));
    if (t % 2 == 0) {
      store_even_bf16(line, rounded);
    } else {
      store_odd_bf16(line, rounded);
    }
  }
}

}  // namespace
}  // namespace gptx::cpu::GPTX_ISA
