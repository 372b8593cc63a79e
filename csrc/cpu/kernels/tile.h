// The register-tiled matmul, written once for every precision. A Product (products.h) says how one line
// of packed weights, 64 bytes, meets one group of activations.
//
//   act [rows, groups]         panels [N/16, lines, 64 B]    tile
//   a00 a01 a02 ...            |16 columns|16 columns|...    MR rows x NV panels, in registers
//   a10 a11 a12 ...      x     line 0     | line 0   |  ->   acc[i][j] += a[i][k] * b[k][j]
//
// Every output is computed in one order, k ascending, whatever the number of rows.
// Every loop over register arrays is unrolled by pragma: the compiler spills them otherwise.
#pragma once

#include "cpu/kernel_table.h"

namespace gptx::cpu::GPTX_ISA {
namespace {

// What a tile fetches while it multiplies: of each panel one line, or a part of one, for each of its own.
struct Fetch {
  const std::byte* at;    // of the first panel, for the first line
  size_t step;            // bytes from line to line
  size_t turn;            // the line from which on it goes on at `then`
  const std::byte* then;
};

// Where the operands of one tile lie.
struct TileTask {
  float* out;
  size_t out_stride;          // floats
  const std::byte* act;
  size_t act_stride;          // bytes
  const std::byte* panels;
  size_t panel_stride;        // bytes
  size_t lines;
  Fetch fetch;
  const RowScale* act_scale;  // of the rows of this tile, where the Product wants them
  const int32_t* colsum;      // of its columns, likewise
};

// What becomes of the products of a tile.
enum class Into {
  kStore,     // out = sum
  kAdd,       // out = out + sum
  kContinue,  // the chain goes on from out; float accumulators only
};

struct TileShape {
  size_t rows, panels;
};

// The tiles of `rows` rows whose panels come from memory. Few rows are one tile, so that panels are read once; of many each
// tile has about the same: 14 in tiles of up to 6 are 5 + 5 + 4.
constexpr TileShape tile_shape(size_t rows) {
  if (rows == 1) return {1, kRowPanels};
  if (rows <= kLowRows) return {rows, kLowPanels};
  if (rows <= kTallRows) return {rows, kTallPanels};
  const size_t tiles = (rows + kTileRows - 1) / kTileRows;
  return {(rows + tiles - 1) / tiles, kTilePanels};
}

// The panels of a tile of up to kTileRows rows whose panels are in a cache.
constexpr size_t cached_tile_panels(size_t rows) {
  if (rows == 1) return kRowPanels;
  return rows <= kLowRows ? kLowPanels : kTilePanels;
}

inline constexpr int kMaxTileRows = kTallRows > kTileRows ? kTallRows : kTileRows;
inline constexpr int kMaxPanels = kRowPanels;
static_assert(kMaxPanels >= kLowPanels && kMaxPanels >= kTallPanels && kMaxPanels >= kTilePanels);

// The most panels of a tile of this many rows.
constexpr int most_panels(int rows) {
  const int alone = static_cast<int>(tile_shape(static_cast<size_t>(rows)).panels);
  return rows <= kTileRows && alone < kTilePanels ? kTilePanels : alone;
}

// out[MR, NV * 16] <- act * panels. Flat: the compiler makes calls where a value is of several
// registers, and a call in the loop costs them all.
template <class P, int MR, int NV, Into kInto>
[[gnu::flatten]] void tile(const TileTask& t) {
  typename P::Sum acc[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) {
      if constexpr (kInto == Into::kContinue) {
        acc[i][j] = load(t.out + static_cast<size_t>(i) * t.out_stride + kPanel * j);
      } else {
        acc[i][j] = P::zero();
      }
    }
  }
  const std::byte* act = t.act;
  const std::byte* line = t.panels;
  const std::byte* fetch = t.fetch.at;
  for (size_t k = 0; k < t.lines; ++k, act += P::kGroupBytes, line += kLineBytes) {
    // The processor follows a stream only after a few misses, and does not see the next one.
    if (k == t.fetch.turn) fetch = t.fetch.then;
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) {
      __builtin_prefetch(fetch + static_cast<size_t>(j) * t.panel_stride);
    }
    fetch += t.fetch.step;
#pragma GCC unroll 2
    for (int part = 0; part < P::kParts; ++part) {
      typename P::Factor b[NV];
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) {
        b[j] = P::weights(line + static_cast<size_t>(j) * t.panel_stride, part);
      }
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
        const typename P::Factor a =
            P::activation(act + static_cast<size_t>(i) * t.act_stride, part);
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) acc[i][j] = P::multiply_add(acc[i][j], a, b[j]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) {
      float* const out = t.out + static_cast<size_t>(i) * t.out_stride + kPanel * j;
      const F32x16 sum = P::value(acc[i][j], t, i, j);
      store(out, kInto == Into::kAdd ? load(out) + sum : sum);
    }
  }
}

template <class P, Into kInto, int MR, int NV>
constexpr auto tile_or_null() -> void (*)(const TileTask&) {
  if constexpr (NV <= most_panels(MR)) return tile<P, MR, NV, kInto>;
  return nullptr;
}

template <class P, Into kInto>
struct Tiles {
  using Function = void (*)(const TileTask&);
  Function at[kMaxTileRows][kMaxPanels];

  template <int MR, int NV>
  static constexpr void fill(Tiles& tiles) {
    tiles.at[MR - 1][NV - 1] = tile_or_null<P, kInto, MR, NV>();
    if constexpr (NV > 1) fill<MR, NV - 1>(tiles);
    else if constexpr (MR > 1) fill<MR - 1, kMaxPanels>(tiles);
  }
  static constexpr Tiles make() {
    Tiles tiles{};
    fill<kMaxTileRows, kMaxPanels>(tiles);
    return tiles;
  }
};

template <class P, Into kInto>
inline constexpr Tiles<P, kInto> kTiles = Tiles<P, kInto>::make();

// out[rows, panels * 16] <- act * panels for up to kTileRows rows, in one chain and without an epilogue. Moves the task past
// the panels: a copy of it would wait for the stores of its fields.
template <class P, Into kInto>
inline void matmul(TileTask& t, size_t rows, size_t panels) {
  const size_t width = cached_tile_panels(rows);
  for (size_t left = panels; left > 0;) {
    const size_t n = left < width ? left : width;
    kTiles<P, kInto>.at[rows - 1][n - 1](t);
    t.out += n * kPanel;
    t.panels += n * t.panel_stride;
    left -= n;
  }
}

}  // namespace
}  // namespace gptx::cpu::GPTX_ISA
