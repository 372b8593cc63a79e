// The register-tiled float32 matmul. Every output is computed in one order, whatever the number of
// rows: k ascending, one chain of fused multiply-adds per kDepthBlock inputs, the chains' results
// added in order. Short chains keep the rounding error below that of one long chain.
//
//   act [rows, depth]          panels [N/16, depth, 16]      tile
//   a00 a01 a02 ...            |16 columns|16 columns|...    MR rows x NV panels, in registers
//   a10 a11 a12 ...      x     k=0 |b b b b|b b b b|    ->   acc[i][j] += a[i][k] * b[k][j]
//
// Every loop over register arrays is unrolled by pragma: the compiler spills them otherwise.
#pragma once

#include "cpu/kernel_table.h"

namespace gptx::cpu::GPTX_ISA {
namespace {

// Inputs of one chain.
inline constexpr size_t kDepthBlock = 128;

// Where the operands of one tile lie; strides in floats.
struct TileTask {
  float* out;
  size_t out_stride;
  const float* act;
  size_t act_stride;
  const float* panels;
  size_t panel_stride;
  size_t depth;
};

// What becomes of the products of a tile.
enum class Into {
  kStore,     // out = sum
  kAdd,       // out = out + sum
  kContinue,  // the chain goes on from out
};

// out[MR, NV * 16] <- act * panels
template <int MR, int NV, Into kInto>
void tile(const TileTask& t) {
  F32x16 acc[MR][NV];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) {
      const float* const out = t.out + static_cast<size_t>(i) * t.out_stride;
      acc[i][j] = kInto == Into::kContinue ? load(out + kPanel * j) : broadcast(0.0f);
    }
  }
  const float* act = t.act;
  const float* panel = t.panels;
  for (size_t k = 0; k < t.depth; ++k, ++act, panel += kPanel) {
    F32x16 b[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) b[j] = load(panel + static_cast<size_t>(j) * t.panel_stride);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const F32x16 a = broadcast(act[static_cast<size_t>(i) * t.act_stride]);
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) acc[i][j] = fma(a, b[j], acc[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) {
      float* const out = t.out + static_cast<size_t>(i) * t.out_stride + kPanel * j;
      store(out, kInto == Into::kAdd ? load(out) + acc[i][j] : acc[i][j]);
    }
  }
}

inline constexpr int kMaxPanels = kRowPanels > kTilePanels ? kRowPanels : kTilePanels;

// A tile of one row may be wider than the others: it has registers to spare.
template <Into kInto, int MR, int NV>
constexpr auto tile_or_null() -> void (*)(const TileTask&) {
  if constexpr (NV <= (MR == 1 ? kMaxPanels : kTilePanels)) return tile<MR, NV, kInto>;
  return nullptr;
}

template <Into kInto>
struct Tiles {
  using Function = void (*)(const TileTask&);
  Function at[kTileRows][kMaxPanels];

  template <int MR, int NV>
  static constexpr void fill(Tiles& tiles) {
    tiles.at[MR - 1][NV - 1] = tile_or_null<kInto, MR, NV>();
    if constexpr (NV > 1) fill<MR, NV - 1>(tiles);
    else if constexpr (MR > 1) fill<MR - 1, kMaxPanels>(tiles);
  }
  static constexpr Tiles make() {
    Tiles tiles{};
    fill<kTileRows, kMaxPanels>(tiles);
    return tiles;
  }
};

template <Into kInto>
inline constexpr Tiles<kInto> kTiles = Tiles<kInto>::make();

// Calls f(row, rows, panel, panels) for the tiles that cover rows x panels, panels outermost.
template <class F>
inline void for_each_tile(size_t rows, size_t panel_begin, size_t panel_end, F f) {
  const size_t width = rows == 1 ? kMaxPanels : kTilePanels;
  for (size_t p = panel_begin; p < panel_end; p += width) {
    const size_t panels = p + width <= panel_end ? width : panel_end - p;
    for (size_t r = 0; r < rows; r += kTileRows) {
      f(r, r + kTileRows <= rows ? static_cast<size_t>(kTileRows) : rows - r, p, panels);
    }
  }
}

// out[rows, panels * 16] <- act * panels, in one chain and without an epilogue.
template <Into kInto>
inline void matmul(const TileTask& t, size_t rows, size_t panels) {
  for_each_tile(rows, 0, panels, [&](size_t r, size_t n_rows, size_t p, size_t n_panels) {
    TileTask part = t;
    part.out += r * t.out_stride + p * kPanel;
    part.act += r * t.act_stride;
    part.panels += p * t.panel_stride;
    kTiles<kInto>.at[n_rows - 1][n_panels - 1](part);
  });
}

template <class F>
inline void map_row(float* out, const float* x, const float* bias, size_t n, F f) {
  for (size_t i = 0; i < n; i += kLanes) store(out + i, f(load(x + i) + load(bias + i), i));
}

// One row of the epilogue: bias, then activation or residual.
inline void finish_row(const LinearF32& t, float* out, const float* x, const float* bias, size_t n) {
  if (t.add) return map_row(out, x, bias, n, [&](F32x16 v, size_t i) { return load(out + i) + v; });
  switch (t.activation) {
    case Activation::kNone:
      return map_row(out, x, bias, n, [](F32x16 v, size_t) { return v; });
    case Activation::kGeluNew:
      return map_row(out, x, bias, n, [](F32x16 v, size_t) { return gelu_new(v); });
    case Activation::kGelu:
      return map_row(out, x, bias, n, [](F32x16 v, size_t) { return gelu(v); });
    case Activation::kRelu:
      return map_row(out, x, bias, n, [](F32x16 v, size_t) { return relu(v); });
  }
}

inline void linear_f32(const LinearF32& t, size_t panel_begin, size_t panel_end) noexcept {
  constexpr size_t kWidth = kMaxPanels * kPanel;
  alignas(64) float sums[kTileRows * kWidth];
  const size_t panel_stride = t.depth * kPanel;
  for_each_tile(t.rows, panel_begin, panel_end, [&](size_t r, size_t rows, size_t p, size_t panels) {
    for (size_t k = 0; k < t.depth; k += kDepthBlock) {
      const auto& tiles = k == 0 ? kTiles<Into::kStore>.at : kTiles<Into::kAdd>.at;
      tiles[rows - 1][panels - 1]({.out = sums,
                                   .out_stride = kWidth,
                                   .act = t.act + r * t.act_stride + k,
                                   .act_stride = t.act_stride,
                                   .panels = t.panels + p * panel_stride + k * kPanel,
                                   .panel_stride = panel_stride,
                                   .depth = t.depth - k < kDepthBlock ? t.depth - k : kDepthBlock});
    }
    for (size_t i = 0; i < rows; ++i) {
      finish_row(t, t.out + (r + i) * t.out_stride + p * kPanel, sums + i * kWidth,
                 t.bias + p * kPanel, panels * kPanel);
    }
  });
}

}  // namespace
}  // namespace gptx::cpu::GPTX_ISA
