// The int8 modes on the matrix product of Armv8.6 I8MM: 2 rows by 2 columns, eight inputs at once.
//
//   two lines of a panel, four inputs each     c0 c1 c2 c3 ...
//                                              c0 c1 c2 c3 ...   zipped: (c0 c0)(c1 c1), (c2 c2)(c3 c3)
//   rows: (r0 r0)(r1 r1)                       sums: r0c0 r0c1 r1c0 r1c1, r0c2 r0c3 r1c2 r1c3
//
// The sums are integers, the same that ByteProduct and Int8Product make.
#pragma once

#include "cpu/kernel_table.h"

namespace gptx::cpu::GPTX_ISA {
namespace {

inline constexpr int kMatrixPairs = 3;  // of rows: 24 sums, 3 operands of rows, 4 of weights: 31 of 32 registers
inline constexpr size_t kMatrixRows = 2 * kMatrixPairs;
inline constexpr size_t kMatrixFetchRows = 4;  // up to here rows wait for memory

// The fast mode: a byte for each activation.
struct MatrixBytes : ByteProduct {
  // Eight inputs of two rows.
  static uint8x16_t rows(const std::byte* a, const std::byte* b, int) {
    return vcombine_u8(vld1_u8(reinterpret_cast<const uint8_t*>(a)), vld1_u8(reinterpret_cast<const uint8_t*>(b)));
  }
  static int32x4_t multiply_add(int32x4_t sum, uint8x16_t rows, int8x16_t columns, int) {
    return vmmlaq_s32(sum, vreinterpretq_s8_u8(rows), columns);
  }
};

// 16-bit activations in two planes: of four inputs the high bytes, which are signed, then the low ones.
struct MatrixPlanes {
  static constexpr size_t kInputs = 4;
  static constexpr int kParts = 2;
  static constexpr size_t kGroupBytes = 8;
  static constexpr size_t kChain = Int8Product::kChain;

  static uint8x16_t rows(const std::byte* a, const std::byte* b, int part) {
    const uint32x4_t first = vreinterpretq_u32_u8(load_quarter(a)), second = vreinterpretq_u32_u8(load_quarter(b));
    return vreinterpretq_u8_u32(part == 0 ? vuzp1q_u32(first, second) : vuzp2q_u32(first, second));
  }
  static int32x4_t multiply_add(int32x4_t sum, uint8x16_t rows, int8x16_t columns, int part) {
    return part == 0 ? vmmlaq_s32(sum, vreinterpretq_s8_u8(rows), columns) : vusmmlaq_s32(sum, rows, columns);
  }
  template <class Task>
  static F32x16 value(I32x16 sum, const Task&, int, int) {
    return to_float(sum);
  }

  // As Int8Product, in planes.
  static RowScale operand(std::byte* out, const float* x, size_t n) noexcept {
    const float top = largest(x, n);
    const F32x16 inverse = broadcast(top < kSmallest ? 0.0f : 32767.0f / top);
    for_each_vector(n, [&](size_t i, size_t lanes) {
      const I32x16 q = round_to_int(load_first(x + i, lanes) * inverse);
      const uint32x4_t high = vreinterpretq_u32_u8(bytes_of(each<I32x16>([&](int j) { return vshrq_n_s32(q.v[j], 8); })));
      const uint32x4_t low = vreinterpretq_u32_u8(bytes_of(q));
      store_quarter(out + 2 * i, vreinterpretq_u8_u32(vzip1q_u32(high, low)));
      store_quarter(out + 2 * i + 16, vreinterpretq_u8_u32(vzip2q_u32(high, low)));
    });
    return {top < kSmallest ? 0.0f : top / 32767.0f, 0};
  }

 private:
  // The lowest byte of each lane.
  static uint8x16_t bytes_of(I32x16 a) {
    const int16x8_t first = vcombine_s16(vmovn_s32(a.v[0]), vmovn_s32(a.v[1]));
    const int16x8_t last = vcombine_s16(vmovn_s32(a.v[2]), vmovn_s32(a.v[3]));
    return vreinterpretq_u8_s8(vcombine_s8(vmovn_s16(first), vmovn_s16(last)));
  }
};

// Where the operands of a block of rows and a panel lie; `lines` is even.
struct MatrixTask {
  const std::byte* rows[kMatrixRows];
  const std::byte* panel;
  size_t lines;
  size_t ahead;  // bytes from a line to what is to be fetched meanwhile, 0: nothing
};

// sums[2 NP, 16] += rows * panel. The planes one after the other: the lines are in the first cache then.
template <class P, int NP>
[[gnu::flatten]] void matrix_block(int32_t* sums, const MatrixTask& t) {
  int32x4_t acc[NP][8];
#pragma GCC unroll 3
  for (int i = 0; i < NP; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) acc[i][j] = vdupq_n_s32(0);
  }
#pragma GCC unroll 2
  for (int part = 0; part < P::kParts; ++part) {
    const std::byte* line = t.panel;
    for (size_t k = 0; k < t.lines; k += 2, line += 2 * kLineBytes) {
      if (part == 0 && t.ahead != 0) {
        __builtin_prefetch(line + t.ahead);
        __builtin_prefetch(line + t.ahead + kLineBytes);
      }
      uint8x16_t a[NP];
#pragma GCC unroll 3
      for (int i = 0; i < NP; ++i) {
        a[i] = P::rows(t.rows[2 * i] + k * P::kGroupBytes, t.rows[2 * i + 1] + k * P::kGroupBytes, part);
      }
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const uint32x4_t first = words_of(line, j), second = words_of(line + kLineBytes, j);
        const int8x16_t b0 = vreinterpretq_s8_u32(vzip1q_u32(first, second));
        const int8x16_t b1 = vreinterpretq_s8_u32(vzip2q_u32(first, second));
#pragma GCC unroll 3
        for (int i = 0; i < NP; ++i) {
          acc[i][2 * j] = P::multiply_add(acc[i][2 * j], a[i], b0, part);
          acc[i][2 * j + 1] = P::multiply_add(acc[i][2 * j + 1], a[i], b1, part);
        }
        asm volatile("" : : : "memory");  // lines are loaded when it is their turn: there is no register to wait in
      }
    }
    if (part + 1 == P::kParts) break;
#pragma GCC unroll 3
    for (int i = 0; i < NP; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) acc[i][j] = vshlq_n_s32(acc[i][j], 8);
    }
  }
#pragma GCC unroll 3
  for (int i = 0; i < NP; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      int32_t* const upper = sums + static_cast<size_t>(2 * i) * kPanel + 2 * j;
      int32_t* const lower = upper + kPanel;
      vst1_s32(upper, vadd_s32(vld1_s32(upper), vget_low_s32(acc[i][j])));
      vst1_s32(lower, vadd_s32(vld1_s32(lower), vget_high_s32(acc[i][j])));
    }
  }
}

// One chain of a block, whose lines may be odd: the last one then meets a copy of itself in zeros.
template <class P>
inline void matrix_sums(int32_t* sums, MatrixTask t, size_t rows) {
  using Block = void (*)(int32_t*, const MatrixTask&);
  constexpr Block kBlocks[kMatrixPairs] = {matrix_block<P, 1>, matrix_block<P, 2>, matrix_block<P, 3>};
  const Block block = kBlocks[(rows - 1) / 2];
  const size_t lines = t.lines;
  t.lines = lines / 2 * 2;
  block(sums, t);
  if (t.lines == lines) return;
  alignas(64) std::byte last_rows[kMatrixRows][2 * P::kGroupBytes] = {};
  alignas(64) std::byte last_lines[2 * kLineBytes] = {};
  for (size_t i = 0; i < kMatrixRows; ++i) {
    __builtin_memcpy(last_rows[i], t.rows[i] + t.lines * P::kGroupBytes, P::kGroupBytes);
    t.rows[i] = last_rows[i];
  }
  __builtin_memcpy(last_lines, t.panel + t.lines * kLineBytes, kLineBytes);
  t.panel = last_lines;
  t.lines = 2;
  t.ahead = 0;
  block(sums, t);
}

template <class P>
inline void linear_matrix(const LinearTask& t, size_t panel_begin, size_t panel_end) noexcept {
  if (t.rows == 0) return;
  constexpr size_t kChainLines = P::kChain / P::kInputs;
  const size_t lines = round_up(t.depth, P::kInputs) / P::kInputs;
  const size_t panel_stride = lines * kLineBytes;
  // Blocks of even heights, as even as they come.
  const size_t blocks = (t.rows + kMatrixRows - 1) / kMatrixRows;
  const size_t height = round_up((t.rows + blocks - 1) / blocks, 2);
  alignas(64) float scaled[kMatrixRows * kPanel];
  for (size_t p = panel_begin; p < panel_end; ++p) {
    for (size_t r = 0; r < t.rows; r += height) {
      const size_t rows = t.rows - r < height ? t.rows - r : height;
      for (size_t k = 0; k < lines; k += kChainLines) {
        alignas(64) int32_t sums[kMatrixRows * kPanel] = {};
        MatrixTask block{.rows = {},
                         .panel = t.panels + p * panel_stride + k * kLineBytes,
                         .lines = lines - k < kChainLines ? lines - k : kChainLines,
                         .ahead = t.rows <= kMatrixFetchRows ? panel_stride : 0};
        for (size_t i = 0; i < kMatrixRows; ++i) {  // a row that is not there is the last one again
          block.rows[i] = t.act + (r + (i < rows ? i : rows - 1)) * t.act_stride + k * P::kGroupBytes;
        }
        matrix_sums<P>(sums, block, rows);
        TileTask tile{};
        tile.act_scale = t.act_scale + r;
        tile.colsum = t.colsum + p * kPanel;
        for (size_t i = 0; i < rows; ++i) {
          const F32x16 sum = P::value(load_int(sums + i * kPanel), tile, static_cast<int>(i), 0);
          store(scaled + i * kPanel, k == 0 ? sum : load(scaled + i * kPanel) + sum);
        }
      }
      finish<P, kPanel>(t, scaled, r, rows, p, 1);
    }
  }
}

// As probe: a step is kProbeLines lines by one row, of which a product is half a line.
template <class P>
[[gnu::flatten]] inline float probe_matrix(size_t steps) noexcept {
  constexpr int kChains = 12;
  static_assert(2 * kProbeLines % kChains == 0);
  alignas(64) std::byte bytes[kLineBytes] = {};
  int32x4_t acc[kChains];
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) {
    acc[i] = vdupq_n_s32(0);
    asm volatile("" : "+w"(acc[i]));  // to the compiler they differ, or it would compute one of them
  }
  for (size_t s = 0; s < steps * (2 * kProbeLines / kChains); ++s) {
#pragma GCC unroll 2
    for (int part = 0; part < P::kParts; ++part) {
      asm volatile("" : : "r"(bytes) : "memory");
      const uint8x16_t a = P::rows(bytes, bytes, part);
      const int8x16_t b = vreinterpretq_s8_u8(load_quarter(bytes));
#pragma GCC unroll 16
      for (int i = 0; i < kChains; ++i) acc[i] = P::multiply_add(acc[i], a, b, part);
    }
  }
  int32x4_t sum = acc[0];
#pragma GCC unroll 16
  for (int i = 1; i < kChains; ++i) sum = vaddq_s32(sum, acc[i]);
  return static_cast<float>(vaddvq_s32(sum));
}

template <class P>
constexpr MatmulKernels matrix_kernels() {
  return {.operand = P::operand, .linear = linear_matrix<P>, .probe = probe_matrix<P>};
}

}  // namespace
}  // namespace gptx::cpu::GPTX_ISA
