// What the kernels for many rows share: how a block of threads gets its tiles, and what becomes of its sums.
#pragma once

#include "cuda/kernels/linear.h"

namespace gptx::cuda {

// `Tiles` tiles of all panels of a block in shared memory, and behind them those of all its groups of 8 rows.
template <class P, int Panels, int Groups, int Tiles, int Threads>
struct Stage {
  static constexpr size_t kOperands = size_t{Tiles} * Panels * kTileBytes;
  static constexpr size_t kBytes = kOperands + Tiles * Groups * kOperandTileBytes<P>;

  // Asks for stage `stage`, by all threads of the block, 16 bytes a copy; zeros for what does not exist.
  static GPTX_DEVICE void fetch(std::byte* to, const LinearTask& task, int first_panel, int first_group, int stage) {
    const auto copy = [&](std::byte* target, const std::byte* source, int present, int count, int tile_bytes) {
      const int copies = Tiles * tile_bytes / 16;
      for (int i = thread_index(); i < count * copies; i += Threads) {
        const int which = i / copies, offset = i % copies * 16;
        const bool exists = which < present && stage * Tiles + offset / tile_bytes < task.tiles;
        const size_t begin = (static_cast<size_t>(which) * static_cast<size_t>(task.tiles) +
                              static_cast<size_t>(stage * Tiles)) * static_cast<size_t>(tile_bytes);
        copy_16_bytes_async(target + i * 16, source + (exists ? begin + static_cast<size_t>(offset) : 0), exists);
      }
    };
    constexpr int kOperandBytes = static_cast<int>(kOperandTileBytes<P>);
    const size_t panel_bytes = static_cast<size_t>(task.tiles) * kTileBytes;
    const size_t group_bytes = static_cast<size_t>(task.tiles) * kOperandBytes;
    copy(to, reinterpret_cast<const std::byte*>(task.weights) + static_cast<size_t>(first_panel) * panel_bytes,
         task.panels - first_panel, Panels, kTileBytes);
    copy(to + kOperands, task.operands + static_cast<size_t>(first_group) * group_bytes,
         ceil_div(task.rows, kRows) - first_group, Groups, kOperandBytes);
  }
};

// Writes the sums of a warp, of `Panels` panels from `first_panel` on by `Groups` groups from `first_group` on, by way
// of its own part of shared memory, so that a lane writes one output of every row.
template <class P, int Panels, int Groups>
GPTX_DEVICE void write_sums(const LinearTask& task, const typename P::Sum (&total)[Panels][Groups][4], std::byte* shared,
                            int first_panel, int first_group) {
  using Sum = typename P::Sum;
  auto* const sums = reinterpret_cast<Sum*>(shared) + warp_index() * Panels * Groups * kTileWords;
#pragma unroll
  for (int p = 0; p < Panels; ++p) {
#pragma unroll
    for (int g = 0; g < Groups; ++g) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[((p * Groups + g) * kWarp + lane_index()) * 4 + i] = total[p][g][i];
    }
  }
  sync_warp();
  // A lane has one output of the warp's; with one panel, half of the lanes have the odd batches of rows.
  const int output = lane_index() % kPanel, panel = lane_index() / kPanel % Panels;
  const int n = (first_panel + panel) * kPanel + output;
  if (n >= task.out.columns) return;
  const Column column = task.columns.at(n);
  constexpr int kTogether = 8;
  const int first_row = first_group * kRows;
  constexpr int kLanesOfRows = kWarp / (Panels * kPanel);
  const int first = lane_index() / (Panels * kPanel) * kTogether;
  for (int base = first; base < Groups * kRows && first_row + base < task.rows; base += kLanesOfRows * kTogether) {
    float present[kTogether];
    RowPlace places[kTogether];
    RowScale scales[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int row = first_row + base + i;
      if (row >= task.rows) break;
      present[i] = task.out.present(row, n);
      places[i] = task.out.place_of(row);
      scales[i] = P::kScaledRows ? task.scales[row] : RowScale{};
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int r = base + i;
      if (first_row + r >= task.rows) break;
      const int fragment = (panel * Groups + r / kRows) * kWarp + output % 8 * 4 + r % kRows / 2;
      const Sum sum = sums[fragment * 4 + r % 2 + output / 8 * 2];
      task.out.write(first_row + r, n, P::finish(sum, scales[i], column), present[i], places[i]);
    }
  }
}

}  // namespace gptx::cuda
