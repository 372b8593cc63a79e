// out = act weight^T, then scale, bias and what comes after. Two shapes of one sum: linear_few.h for few rows, where a
// warp has one chain of one panel, so that all of a small matrix is on its way at once; linear_many.h for many. Chains are
// of the same length and are added in the same order in both, so a row's bits do not depend on the others.
#pragma once

#include "cuda/kernels/products.h"
#include "cuda/kernels/rowwise.h"
#include "cuda/kernels/vocabulary.h"
#include "cuda/layout.h"

namespace gptx::cuda {

enum class Activation : int { kNone, kGeluNew, kGelu, kRelu };

// x / (1 + e^(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3): the tanh form without its cancellation.
GPTX_DEVICE float gelu_new(float x) {
  return divide(x, 1.0f + expf(x * fmaf(x * x, -0.0713548163f, -1.5957691216f)));
}
GPTX_DEVICE float gelu(float x) { return 0.5f * x * erfcf(-0.7071067812f * x); }
GPTX_DEVICE float relu(float x) { return x > 0.0f ? x : (x < 0.0f ? 0.0f : x); }

template <int N>
GPTX_DEVICE void activate(Activation activation, float (&x)[N]) {
  const auto each = [&](auto f) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = f(x[i]);
  };
  switch (activation) {
    case Activation::kNone: return;
    case Activation::kGeluNew: return each([](float v) { return gelu_new(v); });
    case Activation::kGelu: return each([](float v) { return gelu(v); });
    case Activation::kRelu: return each([](float v) { return relu(v); });
  }
}

// Where the K and V of a step go.
struct CacheView {
  std::byte* blocks;             // of this layer: [blocks, heads, KvLayout]
  KvLayout layout;
  int heads;
  const int32_t* positions;      // [T]
  const int32_t* block_tables;   // the ids of the blocks of all sequences
  const int32_t* row_tables;     // [T], where the table of a row's sequence begins

  GPTX_DEVICE std::byte* head(int block, int h) const {
    return blocks + (static_cast<size_t>(block) * static_cast<size_t>(heads) + static_cast<size_t>(h)) *
                        layout.bytes();
  }
};

// Where the K and V of a row go: a KV block, and a position in it.
struct RowPlace {
  int32_t block, position;
};

// What is cached of a number that is not finite: hidden positions are multiplied by zero.
GPTX_DEVICE float finite_or_zero(float x) { return is_finite(x) ? x : 0.0f; }

// What output n of c_attn is: number d of a head's query, key or value.
struct QkvColumn {
  int head, part, d;
};

// Where outputs go.
struct Output {
  enum Kind : int { kStore, kRound, kAdd, kQkv };
  Kind kind;
  Activation activation;
  RowsView rows;
  int columns;      // outputs that exist
  CacheView cache;      // kQkv: K and V go there too, unless it wants a scale for each row
  RoundedRows rounded;  // kRound: instead of `rows`

  GPTX_DEVICE RowPlace place_of(int row) const {
    if (kind != kQkv) return {};
    const int position = cache.positions[row];
    return {cache.block_tables[cache.row_tables[row] + position / kBlock], position % kBlock};
  }

  GPTX_DEVICE QkvColumn column_of(int n) const {
    if (kind != kQkv) return {};
    const int width = cache.layout.head_width, head = n / (3 * width), rest = n - head * 3 * width;
    const int part = rest < width ? 0 : (rest < 2 * width ? 1 : 2);
    return {head, part, rest - part * width};
  }

  // What is there already, to be asked for early.
  GPTX_DEVICE float present(int row, int n) const {
    return kind == kAdd && n < columns ? rows.row(row)[n] : 0.0f;
  }

  // A value behind the activation.
  GPTX_DEVICE void write(int row, int n, const QkvColumn& column, float value, float present,
                         const RowPlace& place) const {
    if (n >= columns) return;
    float* const p = rows.row(row) + n;
    switch (kind) {
      case kStore: *p = value; return;
      case kRound: rounded.column(n).store(row, value); return;
      case kAdd: *p = present + value; return;
      case kQkv: write_qkv(p, column, value, place); return;
    }
  }

  GPTX_DEVICE void write_qkv(float* p, const QkvColumn& column, float value, const RowPlace& place) const {
    const auto [head, part, d] = column;
    if (part == 0 || cache.layout.scaled) {
      *p = value;
      return;
    }
    const int inputs = cache.layout.inputs;
    std::byte* const base = cache.head(place.block, head);
    // Behind the end of a head a query is zero, but 0 * NaN is NaN: a key is written up to the end of its last tile.
    if (d >= cache.layout.head_size) {
      if (part == 2 || d >= cache.layout.key_tiles() * kTileLines * inputs) return;
      value = 0.0f;
    }
    const size_t offset = part == 1 ? weight_offset(place.position, d, cache.layout.key_tiles(), inputs)
                                    : cache.layout.value_begin() +
                                          weight_offset(d, place.position, cache.layout.value_tiles(), inputs);
    store_value(base + offset, inputs == 1, finite_or_zero(value));
  }
};

struct LinearTask {
  const uint4* weights;  // tiles
  Columns columns;
  int panels;
  int tiles;             // of a panel
  int depth;             // K
  int rows;
  RowsView in;           // for linear_few with 8 rows, which makes its operands itself
  Norm norm;
  const std::byte* operands;
  const RowScale* scales;
  Output out;
  int panels_per_block;  // linear_few
};

}  // namespace gptx::cuda
