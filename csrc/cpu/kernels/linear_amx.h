// The fast int8 mode on the tile registers of AMX: 32 rows by 2 panels at once, 16 lines a step.
//
//                  panels: tile 6, tile 7          16 lines of a panel, as they lie, are a tile
//   rows: tile 4     sums: tile 0, tile 1
//         tile 5           tile 2, tile 3
//
// The sums are integers, the same that ByteProduct makes; it takes the few rows that would leave
// most of a tile empty.
#pragma once

#include "cpu/kernel_table.h"

namespace gptx::cpu::GPTX_ISA {
namespace {

inline constexpr size_t kAmxRows = 16;    // of one tile
inline constexpr size_t kAmxBytes = 64;   // of one row of a tile
inline constexpr size_t kVectorRows = 4;  // up to here vectors are as fast
inline constexpr size_t kAmxWidth = 2 * kPanel;

// The instructions below read memory of which their definitions do not tell the compiler.
inline void written(const void* p) { asm volatile("" : : "r"(p) : "memory"); }

// The shapes of the tiles for `rows` rows, up to 32. Sets all sums to zero.
inline void configure_tiles(size_t rows) {
  struct {
    uint8_t palette = 1, start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  static_assert(sizeof config == 64);
  const auto upper = static_cast<uint8_t>(rows < kAmxRows ? rows : kAmxRows);
  const auto lower = static_cast<uint8_t>(rows - upper);
  const uint8_t tile_rows[] = {upper, upper, lower, lower, upper, lower, kAmxRows, kAmxRows};
  for (size_t i = 0; i < 8; ++i) {
    config.rows[i] = tile_rows[i];
    config.row_bytes[i] = tile_rows[i] == 0 ? 0 : kAmxBytes;
  }
  written(&config);
  _tile_loadconfig(&config);
}

// Where 16 lines of the operands of a block lie.
struct AmxStep {
  const std::byte* act;
  size_t act_stride;
  const std::byte* panels;
  size_t panel_stride;
};

// The sums of one step, for NI tiles of rows and NJ panels.
template <int NI, int NJ>
inline void multiply_tiles(const AmxStep& s) {
  _tile_loadd(6, s.panels, kLineBytes);
  _tile_loadd(4, s.act, s.act_stride);
  _tile_dpbusd(0, 4, 6);
  if constexpr (NJ == 2) {
    _tile_loadd(7, s.panels + s.panel_stride, kLineBytes);
    _tile_dpbusd(1, 4, 7);
  }
  if constexpr (NI == 2) {
    _tile_loadd(5, s.act + kAmxRows * s.act_stride, s.act_stride);
    _tile_dpbusd(2, 5, 6);
    if constexpr (NJ == 2) _tile_dpbusd(3, 5, 7);
  }
}

template <int NI, int NJ>
inline void store_sums(int32_t* sums) {
  constexpr size_t kStride = kAmxWidth * sizeof(int32_t);
  int32_t* const lower = sums + kAmxRows * kAmxWidth;
  _tile_stored(0, sums, kStride);
  if constexpr (NJ == 2) _tile_stored(1, sums + kPanel, kStride);
  if constexpr (NI == 2) {
    _tile_stored(2, lower, kStride);
    if constexpr (NJ == 2) _tile_stored(3, lower + kPanel, kStride);
  }
  _tile_zero(0);
  if constexpr (NJ == 2) _tile_zero(1);
  if constexpr (NI == 2) {
    _tile_zero(2);
    if constexpr (NJ == 2) _tile_zero(3);
  }
}

// sums[rows, 32] = act * panels over all lines; the tiles are configured for the rows.
template <int NI, int NJ>
inline void block(int32_t* sums, const LinearTask& t, size_t r, size_t rows, size_t p,
                  size_t lines) {
  const size_t panel_stride = lines * kLineBytes;
  const std::byte* const act = t.act + r * t.act_stride;
  const std::byte* const panels = t.panels + p * panel_stride;
  const size_t whole = lines / kAmxRows * kAmxRows;
  for (size_t k = 0; k < whole; k += kAmxRows) {
    multiply_tiles<NI, NJ>({act + k * ByteProduct::kGroupBytes, t.act_stride,
                            panels + k * kLineBytes, panel_stride});
  }
  if (whole < lines) {
    // What is left is less than a tile: a copy with zeros after it.
    alignas(64) std::byte last_act[2 * kAmxRows * kAmxBytes] = {};
    alignas(64) std::byte last_panels[2 * kAmxRows * kLineBytes] = {};
    const size_t left = lines - whole;
    for (size_t i = 0; i < rows; ++i) {
      __builtin_memcpy(last_act + i * kAmxBytes,
                       act + i * t.act_stride + whole * ByteProduct::kGroupBytes,
                       left * ByteProduct::kGroupBytes);
    }
    for (size_t j = 0; j < NJ; ++j) {
      __builtin_memcpy(last_panels + j * kAmxRows * kLineBytes,
                       panels + j * panel_stride + whole * kLineBytes, left * kLineBytes);
    }
    written(last_act);
    written(last_panels);
    multiply_tiles<NI, NJ>({last_act, kAmxBytes, last_panels, kAmxRows * kLineBytes});
  }
  store_sums<NI, NJ>(sums);
}

inline void linear_amx(const LinearTask& t, size_t panel_begin, size_t panel_end) noexcept {
  if (t.rows <= kVectorRows) return linear<ByteProduct>(t, panel_begin, panel_end);
  using Block = void (*)(int32_t*, const LinearTask&, size_t, size_t, size_t, size_t);
  constexpr Block kBlocks[2][2] = {{block<1, 1>, block<1, 2>}, {block<2, 1>, block<2, 2>}};
  alignas(64) int32_t sums[2 * kAmxRows * kAmxWidth];
  alignas(64) float scaled[2 * kAmxRows * kAmxWidth];
  const size_t lines = round_up(t.depth, ByteProduct::kInputs) / ByteProduct::kInputs;
  size_t configured = 0;
  for (size_t r = 0; r < t.rows; r += 2 * kAmxRows) {
    const size_t rows = t.rows - r < 2 * kAmxRows ? t.rows - r : 2 * kAmxRows;
    if (rows != configured) configure_tiles(rows);
    configured = rows;
    for (size_t p = panel_begin; p < panel_end; p += 2) {
      const size_t panels = panel_end - p < 2 ? 1 : 2;
      kBlocks[rows > kAmxRows][panels - 1](sums, t, r, rows, p, lines);
      TileTask tile{};
      tile.act_scale = t.act_scale + r;
      tile.colsum = t.colsum + p * kPanel;
      for (size_t i = 0; i < rows; ++i) {
        for (size_t j = 0; j < panels; ++j) {
          const size_t at = i * kAmxWidth + j * kPanel;
          store(scaled + at, ByteProduct::value(load_int(sums + at), tile, static_cast<int>(i),
                                                static_cast<int>(j)));
        }
      }
      finish<ByteProduct, kAmxWidth>(t, scaled, r, rows, p, panels);
    }
  }
  _tile_release();
}

// As probe: a step is kProbeChains lines by one row; a product of two tiles is 16 lines by 16 rows.
inline float probe_amx(size_t steps) noexcept {
  alignas(64) const std::byte zeros[kAmxRows * kLineBytes] = {};
  int32_t sums[2 * kAmxRows * kAmxWidth];
  configure_tiles(2 * kAmxRows);
  written(zeros);
  _tile_loadd(4, zeros, kAmxBytes);
  _tile_loadd(6, zeros, kLineBytes);
  for (size_t lines = 0; lines < steps * kProbeChains; lines += 4 * kAmxRows * kAmxRows) {
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 6);
    _tile_dpbusd(2, 4, 6);
    _tile_dpbusd(3, 4, 6);
  }
  store_sums<2, 2>(sums);
  _tile_release();
  return static_cast<float>(sums[0]);
}

}  // namespace
}  // namespace gptx::cpu::GPTX_ISA
