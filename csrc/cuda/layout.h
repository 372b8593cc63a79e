// How matrices, rows and the KV cache lie in device memory. Everything is tiles in the order in which the lanes of a
// warp hand them to the tensor cores, so that a tile is one 16-byte load per lane.
//
// A matrix [N, K] is panels of 16 outputs, as in the file (docs/model-file.md): lines of 16 words, a word being 4 bytes
// of one output. A tile is 8 lines, 512 bytes: lane 4g + t holds the words (line t, output g), (t, g + 8), (t + 4, g) and
// (t + 4, g + 8), which is fragment A of every mma (PTX ISA, "Matrix fragments").
// An operand is 8 rows of activations: lane 4g + t holds, of row g, the inputs of line t and then of line t + 4.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/batch.h"

namespace gptx::cuda {

inline constexpr int kPanel = 16;      // outputs of a panel
inline constexpr int kTileLines = 8;   // lines of a tile
inline constexpr int kTileWords = 128;
inline constexpr int kTileBytes = 512;
inline constexpr int kRows = 8;        // rows of an operand
inline constexpr int kCoreBytes = 128;
inline constexpr int kBlock = static_cast<int>(kBlockTokens);

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
constexpr int round_up(int n, int multiple) { return ceil_div(n, multiple) * multiple; }

// Tiles of one panel with `depth` inputs.
constexpr int tiles_for(int depth, int inputs_per_line) { return ceil_div(depth, inputs_per_line * kTileLines); }

// The word of a tile that holds (line, output).
constexpr int word_of(int line, int output) {
  return ((output & 7) * 4 + (line & 3)) * 4 + (output >> 3) + 2 * (line >> 2);
}

// The line of input k, a word of which holds 1, 2 or 4 inputs, without a division.
constexpr int line_of(int k, int inputs) { return k >> (inputs >> 1); }

// Where input k of an output lies in a matrix whose words hold `inputs` inputs, in bytes.
constexpr size_t weight_offset(int output, int k, int tiles, int inputs) {
  const int line = line_of(k, inputs);
  const size_t tile = static_cast<size_t>(output / kPanel) * static_cast<size_t>(tiles) +
                      static_cast<size_t>(line / kTileLines);
  return tile * kTileBytes + static_cast<size_t>(word_of(line % kTileLines, output % kPanel)) * 4 +
         static_cast<size_t>((k & (inputs - 1)) * (4 >> (inputs >> 1)));
}

// Where the inputs of a line begin in the operand of a row, in bytes; `lane_bytes` a lane has of each tile.
constexpr size_t operand_offset(int row, int line, int tiles, int lane_bytes) {
  const size_t tile = static_cast<size_t>(row / kRows) * static_cast<size_t>(tiles) +
                      static_cast<size_t>(line / kTileLines);
  const int lane = row % kRows * 4 + line % 4;
  return (tile * 32 + static_cast<size_t>(lane)) * static_cast<size_t>(lane_bytes) +
         static_cast<size_t>(line % kTileLines / 4 * (lane_bytes / 2));
}

// The same for the products of warpgroups: 8 rows by 4 lines are 128 bytes, row by row, for each word that is made of a
// line. Such a core matrix is what they read at once (PTX ISA, "Strides", without swizzling).
constexpr size_t core_offset(int row, int line, int word, int tiles, int lane_bytes) {
  const size_t tile = static_cast<size_t>(row / kRows) * static_cast<size_t>(tiles) +
                      static_cast<size_t>(line / kTileLines);
  const int core = line % kTileLines / 4 * (lane_bytes / 8) + word;
  return tile * 32 * static_cast<size_t>(lane_bytes) +
         static_cast<size_t>(core * kCoreBytes + row % kRows * 16 + line % 4 * 4);
}

// One head of one KV block: K is a matrix [64 positions, D], V one of [Dp, 64 positions], and in int8 a scale for each
// position of both. Letters as in docs/architecture.md.
struct KvLayout {
  int head_size = 0;   // D
  int head_width = 0;  // Dp
  int inputs = 1;      // inputs of a word: 1 float32, 2 bfloat16, 4 int8
  bool scaled = false;

  constexpr int key_tiles() const { return tiles_for(head_size, inputs); }
  constexpr int value_tiles() const { return tiles_for(kBlock, inputs); }
  constexpr size_t value_begin() const {
    return static_cast<size_t>(kBlock / kPanel * key_tiles()) * kTileBytes;
  }
  constexpr size_t scale_begin() const {
    return value_begin() + static_cast<size_t>(head_width / kPanel * value_tiles()) * kTileBytes;
  }
  constexpr size_t bytes() const { return scale_begin() + (scaled ? 2 * kBlock * sizeof(float) : 0); }
};

}  // namespace gptx::cuda
