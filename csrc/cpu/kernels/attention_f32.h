// Causal attention over KV blocks of 64 positions, with the softmax kept online (Milakov & Gimelshein,
// 2018). Blocks start at multiples of 64 and every row meets them in the same order with the same
// arithmetic, whether it is prefilled or decoded.
//
// K and V blocks are weight panels, so both products are the matmul of matmul_f32.h:
//   scores [rows, 64] = query [rows, D] x K [64/16, D, 16]
//   out [rows, Dp]   += scores [rows, 64] x V [Dp/16, 64, 16]
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

// Turns one row of scores into exp(score - maximum) over its n visible positions, zero beyond, and
// rescales what the row has gathered so far.
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
    const F32x16 p = exp(load(scores + i) - shift);
    const F32x16 visible = first_lanes(p, broadcast(0.0f), n > i ? n - i : 0);
    store(scores + i, visible);
    sum = sum + visible;
  }
  float scale_of_sum[kLanes];
  store(scale_of_sum, rescale);
  row.sum = __builtin_fmaf(row.sum, scale_of_sum[0], reduce_add(sum));
  row.maximum = maximum;
  for (size_t i = 0; i < width; i += kLanes) store(out + i, load(out + i) * rescale);
}

// Up to kGroup consecutive rows of one block.
inline void attend_group(const AttentionF32& t, size_t first, size_t rows) {
  const size_t depth = t.head_size;
  const size_t width = round_up(depth, kPanel);
  float* const scores = t.scratch;
  float* const query = scores + kGroup * kBlock;
  float* const gathered = query + kGroup * width;
  SoftmaxRow state[kGroup];
  for (size_t i = 0; i < rows; ++i) {
    state[i] = {-__builtin_inff(), 0.0f};
    const float* source = t.query + (first + i) * t.query_stride;
    for (size_t d = 0; d < width; d += kLanes) {
      store(query + i * width + d, load(source + d) * broadcast(t.scale));
      store(gathered + i * width + d, broadcast(0.0f));
    }
  }

  const size_t position = t.position + first;
  const size_t last_block = position / kBlock;
  for (size_t b = 0; b <= last_block; ++b) {
    const float* const keys = t.blocks[b];
    const float* const values = keys + kBlock * width;
    matmul<Into::kStore>({.out = scores, .out_stride = kBlock, .act = query, .act_stride = width,
                   .panels = keys, .panel_stride = depth * kPanel, .depth = depth},
                  rows, kBlock / kPanel);
    // In its own block a row sees the positions up to its own, elsewhere the whole block.
    const size_t visible = b < last_block ? kBlock : position % kBlock + 1;
    const size_t step = b < last_block ? 0 : 1;
    for (size_t i = 0; i < rows; ++i) {
      softmax_step(state[i], scores + i * kBlock, visible + i * step, gathered + i * width, width);
    }
    TileTask mix{.out = gathered, .out_stride = width, .act = scores, .act_stride = kBlock,
                 .panels = values, .panel_stride = kBlock * kPanel, .depth = visible};
    matmul<Into::kContinue>(mix, rows, width / kPanel);
    // The later rows of the diagonal block see more positions; hidden ones are never multiplied.
    for (size_t i = 1; i < rows * step; ++i) {
      TileTask rest = mix;
      rest.out += i * width;
      rest.act += i * kBlock + visible;
      rest.panels += visible * kPanel;
      rest.depth = i;
      matmul<Into::kContinue>(rest, 1, width / kPanel);
    }
  }

  for (size_t i = 0; i < rows; ++i) {
    const F32x16 sum = broadcast(state[i].sum);
    float* const out = t.out + (first + i) * t.out_stride;
    for (size_t d = 0; d < depth; d += kLanes) {
      store_first(out + d, load(gathered + i * width + d) / sum, depth - d);
    }
  }
}

inline void attention_f32(const AttentionF32& t) noexcept {
  for (size_t first = 0; first < t.rows; first += kGroup) {
    attend_group(t, first, first + kGroup <= t.rows ? kGroup : t.rows - first);
  }
}

inline void append_kv_f32(float* block, const float* key, const float* value, size_t position,
                          size_t head_size) noexcept {
  const size_t t = position % kBlock;
  const size_t width = round_up(head_size, kPanel);
  float* const keys = block + t / kPanel * head_size * kPanel + t % kPanel;
  for (size_t d = 0; d < head_size; ++d) keys[d * kPanel] = key[d];
  float* const values = block + kBlock * width + t * kPanel;
  for (size_t p = 0; p < width; p += kPanel) store(values + p * kBlock, load(value + p));
}

}  // namespace
}  // namespace gptx::cpu::GPTX_ISA
