// The int8 modes on the tile registers of AMX: 32 rows by 2 panels at once, 16 lines a step.
//
//                  panels: tile 6, tile 7          16 lines of a panel, as they lie, are a tile
//   rows: tile 4     sums: tile 0, tile 1
//         tile 5           tile 2, tile 3
//
// The sums are integers, the same that ByteProduct and Int8Product make; these take the few rows that would leave most of
// a tile empty.
#pragma once

#include "cpu/kernel_table.h"

namespace gptx::cpu::GPTX_ISA {
namespace {

inline constexpr size_t kAmxRows = 16;    // of one tile
inline constexpr size_t kAmxBytes = 64;   // of one row of a tile
inline constexpr size_t kVectorRows = 4;  // up to here vectors are as fast
inline constexpr size_t kAmxWidth = 2 * kPanel;

// The fast mode: a byte for each activation.
struct AmxBytes : ByteProduct {
  using FewRows = ByteProduct;
  static constexpr int kPlanes = 1;
  static size_t plane(size_t, int) { return 0; }
};

// 16-bit activations: as Int8Product has them for few rows, and behind them in two planes, a byte for each activation:
// the high bytes, which are signed, and the low ones.
struct AmxPlanes : Int8Product {
  using FewRows = Int8Product;
  static constexpr int kPlanes = 2;
  static size_t plane(size_t depth, int i) { return (2 + static_cast<size_t>(i)) * round_up(depth, kLanes); }

  static RowScale operand(std::byte* out, const float* x, size_t n) noexcept {
    const RowScale row = Int8Product::operand(out, x, n);
    const F32x16 inverse = broadcast(row.scale == 0.0f ? 0.0f : 32767.0f / largest(x, n));
    std::byte* const high = out + plane(n, 0);
    std::byte* const low = out + plane(n, 1);
    for_each_vector(n, [&](size_t i, size_t lanes) {
      const I32x16 q = round_to_int(load_first(x + i, lanes) * inverse);
      store_bytes(high + i, {_mm512_srli_epi32(q.v, 8)});
      store_bytes(low + i, q);
    });
    return row;
  }
};

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

// The sums of one step, for NI tiles of rows, signed or not, and NJ panels. The names of tiles are part of the
// instructions.
template <bool kSigned, int NI, int NJ>
inline void multiply_tiles(const AmxStep& s) {
  _tile_loadd(6, s.panels, kLineBytes);
  _tile_loadd(4, s.act, s.act_stride);
  if constexpr (kSigned) _tile_dpbssd(0, 4, 6);
  else _tile_dpbusd(0, 4, 6);
  if constexpr (NJ == 2) {
    _tile_loadd(7, s.panels + s.panel_stride, kLineBytes);
    if constexpr (kSigned) _tile_dpbssd(1, 4, 7);
    else _tile_dpbusd(1, 4, 7);
  }
  if constexpr (NI == 2) {
    _tile_loadd(5, s.act + kAmxRows * s.act_stride, s.act_stride);
    if constexpr (kSigned) _tile_dpbssd(2, 5, 6);
    else _tile_dpbusd(2, 5, 6);
    if constexpr (NJ == 2) {
      if constexpr (kSigned) _tile_dpbssd(3, 5, 7);
      else _tile_dpbusd(3, 5, 7);
    }
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

// Where the operands of a chain of a block lie; act[rows, act_stride] are bytes.
struct AmxTask {
  const std::byte* act;
  size_t act_stride, rows;
  const std::byte* panels;
  size_t panel_stride, lines;
};

// sums[rows, 32] = act * panels; the tiles are configured for the rows.
template <bool kSigned, int NI, int NJ>
inline void block(int32_t* sums, const AmxTask& t) {
  const size_t whole = t.lines / kAmxRows * kAmxRows;
  for (size_t k = 0; k < whole; k += kAmxRows) {
    multiply_tiles<kSigned, NI, NJ>({t.act + 4 * k, t.act_stride, t.panels + k * kLineBytes, t.panel_stride});
  }
  if (whole < t.lines) {
    // What is left is less than a tile: a copy with zeros after it.
    alignas(64) std::byte last_act[2 * kAmxRows * kAmxBytes] = {};
    alignas(64) std::byte last_panels[2 * kAmxRows * kLineBytes] = {};
    const size_t left = t.lines - whole;
    for (size_t i = 0; i < t.rows; ++i) {
      __builtin_memcpy(last_act + i * kAmxBytes, t.act + i * t.act_stride + 4 * whole, 4 * left);
    }
    for (size_t j = 0; j < NJ; ++j) {
      __builtin_memcpy(last_panels + j * kAmxRows * kLineBytes, t.panels + j * t.panel_stride + whole * kLineBytes,
                       left * kLineBytes);
    }
    written(last_act);
    written(last_panels);
    multiply_tiles<kSigned, NI, NJ>({last_act, kAmxBytes, last_panels, kAmxRows * kLineBytes});
  }
  store_sums<NI, NJ>(sums);
}

template <bool kSigned>
inline void multiply_block(int32_t* sums, const AmxTask& t, size_t panels) {
  using Block = void (*)(int32_t*, const AmxTask&);
  constexpr Block kBlocks[2][2] = {{block<kSigned, 1, 1>, block<kSigned, 1, 2>},
                                   {block<kSigned, 2, 1>, block<kSigned, 2, 2>}};
  kBlocks[t.rows > kAmxRows][panels - 1](sums, t);
}

template <class P>
inline void linear_amx(const LinearTask& t, size_t panel_begin, size_t panel_end) noexcept {
  if (t.rows <= kVectorRows) return linear<typename P::FewRows>(t, panel_begin, panel_end);
  constexpr size_t kChainLines = P::kChain / P::kInputs;
  alignas(64) int32_t sums[P::kPlanes][2 * kAmxRows * kAmxWidth];
  alignas(64) float scaled[2 * kAmxRows * kAmxWidth];
  const size_t lines = round_up(t.depth, P::kInputs) / P::kInputs;
  const size_t panel_stride = lines * kLineBytes;
  size_t configured = 0;
  for (size_t r = 0; r < t.rows; r += 2 * kAmxRows) {
    const size_t rows = t.rows - r < 2 * kAmxRows ? t.rows - r : 2 * kAmxRows;
    if (rows != configured) configure_tiles(rows);
    configured = rows;
    for (size_t p = panel_begin; p < panel_end; p += 2) {
      const size_t panels = panel_end - p < 2 ? 1 : 2;
      TileTask tile{};
      tile.act_scale = t.act_scale + r;
      tile.colsum = t.colsum + p * kPanel;
      for (size_t k = 0; k < lines; k += kChainLines) {
        AmxTask chain{.act = t.act + r * t.act_stride + P::plane(t.depth, 0) + 4 * k,
                      .act_stride = t.act_stride,
                      .rows = rows,
                      .panels = t.panels + p * panel_stride + k * kLineBytes,
                      .panel_stride = panel_stride,
                      .lines = lines - k < kChainLines ? lines - k : kChainLines};
        multiply_block<P::kPlanes == 2>(sums[0], chain, panels);
        if constexpr (P::kPlanes == 2) {
          chain.act += P::plane(t.depth, 1) - P::plane(t.depth, 0);
          multiply_block<false>(sums[1], chain, panels);
        }
        for (size_t i = 0; i < rows; ++i) {
          for (size_t j = 0; j < panels; ++j) {
            const size_t at = i * kAmxWidth + j * kPanel;
            I32x16 sum = load_int(sums[0] + at);
            if constexpr (P::kPlanes == 2) sum = add(multiply(sum, broadcast_int(256)), load_int(sums[1] + at));
            const F32x16 value = P::value(sum, tile, static_cast<int>(i), static_cast<int>(j));
            store(scaled + at, k == 0 ? value : load(scaled + at) + value);
          }
        }
      }
      finish<P, kAmxWidth>(t, scaled, r, rows, p, panels);
    }
  }
  _tile_release();
}

// As probe: a step is kProbeLines lines by one row; a product of two tiles is 16 lines by 16 rows of one plane.
template <class P>
inline float probe_amx(size_t steps) noexcept {
  alignas(64) const std::byte zeros[kAmxRows * kLineBytes] = {};
  int32_t sums[2 * kAmxRows * kAmxWidth];
  configure_tiles(2 * kAmxRows);
  written(zeros);
  _tile_loadd(4, zeros, kAmxBytes);
  _tile_loadd(6, zeros, kLineBytes);
  for (size_t lines = 0; lines < steps * kProbeLines * P::kPlanes; lines += 4 * kAmxRows * kAmxRows) {
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 6);
    _tile_dpbusd(2, 4, 6);
    _tile_dpbusd(3, 4, 6);
  }
  store_sums<2, 2>(sums);
  _tile_release();
  return static_cast<float>(sums[0]);
}

template <class P>
constexpr MatmulKernels amx_kernels() {
  return {.operand = P::operand, .linear = linear_amx<P>, .probe = probe_amx<P>};
}

}  // namespace
}  // namespace gptx::cpu::GPTX_ISA
