// Causal attention over KV blocks of 64 positions, with the softmax kept online (Milakov & Gimelshein,
// 2018). Blocks start at multiples of 64 and every row meets them in the same order with the same
// arithmetic, whether it is prefilled or decoded.
//
// K and V blocks are weight panels, so both products are the matmul of tile.h, with G positions or
// dimensions in a line (1 float32, 2 bfloat16 or 4 int8):
//   scores [rows, 64] = query [rows, D] x K [64/16, D/G, 16, G]
//   out [rows, Dp]   += scores [rows, 64] x V [Dp/16, 64/G, 16, G]
//
// What is particular to a type of cache is in its Cache: PanelCache for float32 and bfloat16,
// ByteCache for int8.
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

// The parts of the scratch memory, and the shape of the head.
struct AttentionScratch {
  explicit AttentionScratch(const AttentionTask& t)
      : head_size(t.head_size),
        width(round_up(t.head_size, kPanel)),
        scores(t.scratch),
        gathered(scores + kGroup * kBlock),
        sums(gathered + kGroup * width),
        query(as_bytes(sums + kGroup * width)),
        weights(query + kGroup * width * kOperandBytes) {}

  size_t head_size;    // D
  size_t width;        // Dp
  float* scores;       // [kGroup, 64]
  float* gathered;     // [kGroup, Dp], the result so far
  float* sums;         // [kGroup, Dp], for the Cache
  std::byte* query;    // [kGroup, Dp] as operands
  std::byte* weights;  // [kGroup, 64] as operands
};

inline F32x16 visible(F32x16 v, F32x16 hidden, size_t lanes) {
  return lanes == kLanes ? v : first_lanes(v, hidden, lanes);
}

// Turns row i of the scores into weights exp(score - maximum) over its n visible positions, zero to the end of the vector,
// and rescales what the row has gathered so far.
template <class Cache>
inline void softmax_step(const Cache& cache, SoftmaxRow& row, size_t i, size_t n) {
  const AttentionScratch& s = cache.s;
  const float* const scores = s.scores + i * kBlock;
  const F32x16 hidden = broadcast(-__builtin_inff());
  F32x16 top = hidden;
  for_each_vector(n, [&](size_t j, size_t lanes) {
    top = max(visible(load(scores + j), hidden, lanes), top);
  });
  const float block_maximum = reduce_max(top);
  const float maximum = row.maximum > block_maximum ? row.maximum : block_maximum;
  const F32x16 shift = broadcast(maximum);

  F32x16 sum = broadcast(0.0f);
  for_each_vector(n, [&](size_t j, size_t lanes) {
    const F32x16 p = visible(Cache::round(exp(load(scores + j) - shift)), broadcast(0.0f), lanes);
    cache.weigh(i, j, p);
    sum = sum + p;
  });
  const F32x16 rescale = exp(broadcast(row.maximum) - shift);
  row.sum = __builtin_fmaf(row.sum, first_lane(rescale), reduce_add(sum));
  if (maximum == row.maximum) return;  // the factor is 1
  row.maximum = maximum;
  float* const out = s.gathered + i * s.width;
  for (size_t d = 0; d < s.width; d += kLanes) store(out + d, load(out + d) * rescale);
}

// float32 or bfloat16 panels.
template <class P>
struct PanelCache {
  static constexpr size_t kG = P::kInputs;
  static constexpr size_t kWeightBytes = kBlock / kG * P::kGroupBytes;
  static constexpr size_t kValueBytes = kBlock / kG * kLineBytes;  // of one panel of V

  static F32x16 round(F32x16 p) { return P::round(p); }

  void weigh(size_t row, size_t j, F32x16 weights) const {
    P::put(s.weights + row * kWeightBytes, j, weights);
  }

  size_t query_bytes() const { return s.width / kG * P::kGroupBytes; }

  void set_query(size_t row, const float* scaled) {
    P::operand(s.query + row * query_bytes(), scaled, s.width);
  }

  // The scores of the first n positions of the block, to the end of a panel.
  void score(const std::byte* block, size_t rows, size_t n) const {
    const size_t lines = round_up(s.head_size, kG) / kG;
    TileTask t{};
    t.out = s.scores;
    t.out_stride = kBlock;
    t.act = s.query;
    t.act_stride = query_bytes();
    t.panels = block;
    t.panel_stride = lines * kLineBytes;
    t.lines = lines;
    t.fetch = {values(block), kLineBytes, lines, nullptr};
    matmul<P, Into::kStore>(t, rows, round_up(n, kPanel) / kPanel);
  }

  // Of the block's positions row i sees seen + i * step; hidden ones are never multiplied. Fetches the next block.
  void gather(const std::byte* block, size_t rows, size_t seen, size_t step,
              const std::byte* next) const {
    const size_t shared = seen / kG;  // lines that every row sees
    TileTask t{};
    t.out = s.gathered;
    t.out_stride = s.width;
    t.act = s.weights;
    t.act_stride = kWeightBytes;
    t.panels = values(block);
    t.panel_stride = kValueBytes;
    t.lines = shared;
    t.fetch = {next, kLineBytes, shared, nullptr};
    matmul<P, Into::kContinue>(t, rows, s.width / kPanel);
    if (step == 0) return;
    for (size_t i = 0; i < rows; ++i) {
      const size_t end = (seen + i) / kG;
      if (end > shared) gather_lines(values(block) + shared * kLineBytes, kValueBytes, i, shared, end - shared);
      if constexpr (kG == 2) {
        if ((seen + i) % kG != 0) gather_first_of_pair(values(block) + end * kLineBytes, i, end);
      }
    }
  }

  // Some lines for one row, whose weights start at line `first`.
  void gather_lines(const std::byte* panels, size_t panel_stride, size_t row, size_t first, size_t lines) const {
    TileTask t{};
    t.out = s.gathered + row * s.width;
    t.out_stride = s.width;
    t.act = s.weights + row * kWeightBytes + first * P::kGroupBytes;
    t.act_stride = kWeightBytes;
    t.panels = panels;
    t.panel_stride = panel_stride;
    t.lines = lines;
    t.fetch = {panels, 0, lines, nullptr};
    matmul<P, Into::kContinue>(t, 1, s.width / kPanel);
  }

  // The last position where it is the first of a pair, whose second is hidden.
  void gather_first_of_pair(const std::byte* line, size_t row, size_t first) const {
    for (size_t i = 0; i < s.width; i += kPanel) {
      store(s.sums + i, even_bf16_in_place(line + i / kPanel * kValueBytes));
    }
    gather_lines(as_bytes(s.sums), kLineBytes, row, first, 1);
  }

  const std::byte* values(const std::byte* block) const {
    return block + kBlock / kPanel * (s.width / kG) * kLineBytes;
  }

  const AttentionScratch& s;
};

// int8 panels with a scale for each position, K and V apart: [64] each behind the panels. Queries and
// weights are int16; the scales of V go into the weights before they are rounded.
struct ByteCache {
  using P = Int8Product;
  static constexpr size_t kG = P::kInputs;
  static constexpr size_t kWeightBytes = kBlock / kG * P::kGroupBytes;

  static F32x16 round(F32x16 p) { return p; }

  void weigh(size_t row, size_t j, F32x16 weights) const {
    store(s.scores + row * kBlock + j, weights);
  }

  size_t query_bytes() const { return s.width / kG * P::kGroupBytes; }

  void set_query(size_t row, const float* scaled) {
    query_scale[row] = P::operand(s.query + row * query_bytes(), scaled, s.width).scale;
  }

  void score(const std::byte* block, size_t rows, size_t n) const {
    constexpr size_t kChainLines = P::kChain / kG;
    const size_t lines = round_up(s.head_size, kG) / kG;
    const size_t panels = round_up(n, kPanel) / kPanel;
    for (size_t k = 0; k < lines; k += kChainLines) {
      TileTask t{};
      t.out = s.scores;
      t.out_stride = kBlock;
      t.act = s.query + k * P::kGroupBytes;
      t.act_stride = query_bytes();
      t.panels = block + k * kLineBytes;
      t.panel_stride = lines * kLineBytes;
      t.lines = lines - k < kChainLines ? lines - k : kChainLines;
      t.fetch = {block + kBlock * s.width, kLineBytes, lines, nullptr};
      if (k == 0) {
        matmul<P, Into::kStore>(t, rows, panels);
      } else {
        matmul<P, Into::kAdd>(t, rows, panels);
      }
    }
    const float* const scale = scales(block);
    for (size_t i = 0; i < rows; ++i) {
      float* const row = s.scores + i * kBlock;
      for (size_t j = 0; j < n; j += kLanes) {
        store(row + j, load(row + j) * (broadcast(query_scale[i]) * load(scale + j)));
      }
    }
  }

  void gather(const std::byte* block, size_t rows, size_t seen, size_t step,
              const std::byte* next) const {
    const float* const scale = scales(block) + kBlock;
    float weight_scale[kGroup];
    for (size_t i = 0; i < rows; ++i) {
      float* const row = s.scores + i * kBlock;
      const size_t n = seen + i * step;
      for (size_t j = 0; j < kBlock; j += kLanes) {
        // The scale of a hidden position might be anything.
        const F32x16 weight = load(row + j) * load(scale + j);
        store(row + j, first_lanes(weight, broadcast(0.0f), n > j ? n - j : 0));
      }
      weight_scale[i] = P::operand(s.weights + i * kWeightBytes, row, kBlock).scale;
    }
    TileTask t{};
    t.out = s.sums;
    t.out_stride = s.width;
    t.act = s.weights;
    t.act_stride = kWeightBytes;
    t.panels = block + kBlock * s.width;
    t.panel_stride = kBlock / kG * kLineBytes;
    t.lines = kBlock / kG;
    t.fetch = {next, kLineBytes, t.lines, nullptr};
    matmul<P, Into::kStore>(t, rows, s.width / kPanel);
    for (size_t i = 0; i < rows; ++i) {
      float* const out = s.gathered + i * s.width;
      for (size_t d = 0; d < s.width; d += kLanes) {
        const F32x16 sum = load(s.sums + i * s.width + d);
        store(out + d, fma(sum, broadcast(weight_scale[i]), load(out + d)));
      }
    }
  }

  const float* scales(const std::byte* block) const {
    return as_floats(block + 2 * kBlock * s.width);
  }

  const AttentionScratch& s;
  float query_scale[kGroup] = {};
};

// Up to kGroup consecutive rows of one block.
template <class Cache>
inline void attend_group(const AttentionTask& t, size_t first, size_t rows) {
  const AttentionScratch s(t);
  const size_t width = s.width;
  Cache cache{s};
  SoftmaxRow state[kGroup];
  for (size_t i = 0; i < rows; ++i) {
    state[i] = {-__builtin_inff(), 0.0f};
    const float* const source = t.query + (first + i) * t.query_stride;
    float* const gathered = s.gathered + i * width;
    for (size_t d = 0; d < width; d += kLanes) {
      store(gathered + d, load(source + d) * broadcast(t.scale));
    }
    cache.set_query(i, gathered);
    for (size_t d = 0; d < width; d += kLanes) store(gathered + d, broadcast(0.0f));
  }

  // The queries of the next rows come while these meet the blocks.
  const size_t after = t.rows - first - rows;
  for (size_t i = 0; i < (after < kGroup ? after : kGroup); ++i) {
    const float* const source = t.query + (first + rows + i) * t.query_stride;
    for (size_t d = 0; d < width; d += kLanes) __builtin_prefetch(source + d);
  }

  const size_t position = t.position + first;
  const size_t last_block = position / kBlock;
  for (size_t b = 0; b <= last_block; ++b) {
    // In its own block a row sees the positions up to its own, elsewhere the whole block.
    const size_t seen = b < last_block ? kBlock : position % kBlock + 1;
    const size_t step = b < last_block ? 0 : 1;
    cache.score(t.blocks[b], rows, seen + (rows - 1) * step);
    for (size_t i = 0; i < rows; ++i) softmax_step(cache, state[i], i, seen + i * step);
    cache.gather(t.blocks[b], rows, seen, step, b < last_block ? t.blocks[b + 1] : t.next);
  }

  for (size_t i = 0; i < rows; ++i) {
    const F32x16 sum = broadcast(state[i].sum);
    float* const out = t.out + (first + i) * t.out_stride;
    for (size_t d = 0; d < t.head_size; d += kLanes) {
      store_first(out + d, load(s.gathered + i * width + d) / sum, t.head_size - d);
    }
  }
}

template <class Cache>
inline void attention(const AttentionTask& t) noexcept {
  for (size_t first = 0; first < t.rows; first += kGroup) {
    attend_group<Cache>(t, first, first + kGroup <= t.rows ? kGroup : t.rows - first);
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

// The n floats of x as int8 with one scale, x ~ q * scale with scale = max|x| / 127, four at a time:
// f(group, bytes) takes inputs 4 * group to 4 * group + 3.
template <class F>
inline float for_each_four_bytes(const float* x, size_t n, F f) {
  const float top = largest(x, n);
  const bool empty = !(top >= kSmallest);  // zeros, or NaN, which the scale carries on
  const F32x16 inverse = broadcast(127.0f / top);
  alignas(64) std::byte pairs[2 * kLanes];
  for_each_vector(n, [&](size_t i, size_t lanes) {
    const F32x16 q = empty ? broadcast(0.0f) : load_first(x + i, lanes) * inverse;
    store_pairs(pairs, round_to_int(q));
    for (size_t g = 0; 4 * g < lanes; ++g) {
      // The low bytes of the int16, whose order is 0, 2, 1, 3.
      const std::byte* const p = pairs + 8 * g;
      const std::byte bytes[] = {p[0], p[4], p[2], p[6]};
      f(i / 4 + g, bytes);
    }
  });
  return top < kSmallest ? 0.0f : top / 127.0f;
}

inline void append_key_int8(std::byte* block, const float* key, size_t position,
                            size_t head_size) noexcept {
  const size_t t = position % kBlock;
  const size_t width = round_up(head_size, kPanel);
  const size_t lines = round_up(head_size, 4) / 4;
  std::byte* const keys = block + t / kPanel * lines * kLineBytes + t % kPanel * 4;
  as_floats(block + 2 * kBlock * width)[t] =
      for_each_four_bytes(key, head_size, [&](size_t group, const std::byte* bytes) {
        __builtin_memcpy(keys + group * kLineBytes, bytes, 4);
      });
}

inline void append_value_int8(std::byte* block, const float* value, size_t position,
                              size_t head_size) noexcept {
  const size_t t = position % kBlock;
  const size_t width = round_up(head_size, kPanel);
  std::byte* const values = block + kBlock * width + t / 4 * kLineBytes + t % 4;
  as_floats(block + 2 * kBlock * width)[kBlock + t] =
      for_each_four_bytes(value, width, [&](size_t group, const std::byte* bytes) {
        for (size_t e = 0; e < 4; ++e) {
          const size_t d = 4 * group + e;
          values[d / kPanel * (kBlock / 4) * kLineBytes + d % kPanel * 4] = bytes[e];
        }
      });
}

}  // namespace
}  // namespace gptx::cpu::GPTX_ISA
