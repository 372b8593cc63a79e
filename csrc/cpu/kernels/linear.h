// The linear layer: tiles over chains of inputs, then the epilogue (scale, bias, activation or residual)
// while the sums are in the first cache.
#pragma once

#include "cpu/kernel_table.h"

namespace gptx::cpu::GPTX_ISA {
namespace {

// out = f(sum) for one row of n columns, where f also gets the column.
template <class F>
inline void map_row(float* out, const float* sums, size_t n, F f) {
  for (size_t i = 0; i < n; i += kLanes) store(out + i, f(load(sums + i), i));
}

// One row of the epilogue; `scaled` turns sums into sum * scale + bias.
template <class F>
inline void finish_row(const LinearTask& t, float* out, const float* sums, size_t n, F scaled) {
  const auto map = [&](auto f) {
    map_row(out, sums, n, [&](F32x16 v, size_t i) { return f(scaled(v, i)); });
  };
  if (t.add) {
    return map_row(out, sums, n, [&](F32x16 v, size_t i) { return load(out + i) + scaled(v, i); });
  }
  switch (t.activation) {
    case Activation::kNone: return map([](F32x16 v) { return v; });
    case Activation::kGeluNew: return map([](F32x16 v) { return gelu_new(v); });
    case Activation::kGelu: return map([](F32x16 v) { return gelu(v); });
    case Activation::kRelu: return map([](F32x16 v) { return relu(v); });
  }
}

// The epilogue of `rows` rows from r and `panels` panels from p, whose sums stand kWidth apart.
template <class P, size_t kWidth>
inline void finish(const LinearTask& t, const float* sums, size_t r, size_t rows, size_t p,
                   size_t panels) {
  const float* const bias = t.bias + p * kPanel;
  for (size_t i = 0; i < rows; ++i) {
    float* const out = t.out + (r + i) * t.out_stride + p * kPanel;
    if constexpr (P::kInputs == 4) {
      const F32x16 row_scale = broadcast(t.act_scale[r + i].scale);
      const float* const scale = t.scale + p * kPanel;
      finish_row(t, out, sums + i * kWidth, panels * kPanel, [&](F32x16 v, size_t c) {
        return fma(v, row_scale * load(scale + c), load(bias + c));
      });
    } else {
      finish_row(t, out, sums + i * kWidth, panels * kPanel,
                 [&](F32x16 v, size_t c) { return v + load(bias + c); });
    }
  }
}

// How far ahead of a single pass over panels memory is read, all of them together.
inline constexpr size_t kAheadLines = 96;

// From line k on of some panels of `lines` lines, and at their end from the first of the next ones.
inline Fetch fetch_from(size_t k, const std::byte* panels, const std::byte* next, size_t lines) {
  if (k >= lines) return {next + (k - lines) * kLineBytes, kLineBytes, lines, next};
  return {panels + k * kLineBytes, kLineBytes, lines - k, next};
}

// Brings what `finish` reads and writes into the first cache while the tiles multiply.
template <class P>
inline void fetch_epilogue(const LinearTask& t, size_t r, size_t rows, size_t p, size_t panels) {
  for (size_t c = p * kPanel; c < (p + panels) * kPanel; c += kPanel) {
    __builtin_prefetch(t.bias + c);
    if constexpr (P::kInputs == 4) {
      __builtin_prefetch(t.scale + c);
      __builtin_prefetch(t.colsum + c);
    }
    for (size_t i = 0; i < rows; ++i) __builtin_prefetch(t.out + (r + i) * t.out_stride + c, 1);
  }
}

template <class P>
inline void linear(const LinearTask& t, size_t panel_begin, size_t panel_end) noexcept {
  if (t.rows == 0) return;
  constexpr size_t kWidth = kMaxPanels * kPanel;
  constexpr size_t kChainLines = P::kChain / P::kInputs;
  alignas(64) float sums[kMaxTileRows * kWidth];
  const size_t lines = round_up(t.depth, P::kInputs) / P::kInputs;
  const size_t panel_stride = lines * kLineBytes;
  const auto [height, width] = tile_shape(t.rows);
  const size_t passes = (t.rows + height - 1) / height;
  const size_t fetch_step = kLineBytes / passes;
  for (size_t p = panel_begin; p < panel_end; p += width) {
    const size_t panels = p + width <= panel_end ? width : panel_end - p;
    const std::byte* const own = t.panels + p * panel_stride;
    const std::byte* const next = own + panels * panel_stride;
    const size_t ahead = kAheadLines / panels;
    size_t spread = 0;  // lines of the passes so far, which share the next panels: memory is read all the time
    for (size_t r = 0; r < t.rows; r += height, spread += lines) {
      const size_t rows = r + height <= t.rows ? height : t.rows - r;
      fetch_epilogue<P>(t, r, rows, p, panels);
      for (size_t k = 0; k < lines; k += kChainLines) {
        const auto& tiles = k == 0 ? kTiles<P, Into::kStore>.at : kTiles<P, Into::kAdd>.at;
        tiles[rows - 1][panels - 1](
            {.out = sums,
             .out_stride = kWidth,
             .act = t.act + r * t.act_stride + k * P::kGroupBytes,
             .act_stride = t.act_stride,
             .panels = own + k * kLineBytes,
             .panel_stride = panel_stride,
             .lines = lines - k < kChainLines ? lines - k : kChainLines,
             .fetch = passes == 1 ? fetch_from(k + ahead, own, next, lines)
                                  : Fetch{next + (spread + k) * fetch_step, fetch_step, lines, next},
             .act_scale = t.act_scale + r,
             .colsum = P::kInputs == 4 ? t.colsum + p * kPanel : nullptr});
      }
      finish<P, kWidth>(t, sums, r, rows, p, panels);
    }
  }
}

}  // namespace
}  // namespace gptx::cpu::GPTX_ISA
