// Many rows: arithmetic is the bound.
#pragma once

#include "cuda/kernels/linear.h"

namespace gptx::cuda {

// A block of 8 warps has 4 * Panels panels by 2 * Groups groups of 8 rows, a warp Panels by Groups of them. Tiles come in
// pairs, the next ones while one is multiplied.
inline constexpr int kManyStages = 4;
inline constexpr int kManyThreads = 256;
inline constexpr int kStageTiles = 2;

template <class P, int Panels, int Groups>
struct ManyLayout {
  static constexpr int kPanels = 4 * Panels, kGroups = 2 * Groups;  // of a block
  static constexpr size_t kOperands = kStageTiles * kPanels * kTileBytes;  // where they begin in a stage
  static constexpr size_t kStage = kOperands + kStageTiles * kGroups * kOperandTileBytes<P>;
  static constexpr size_t kSums = size_t{kPanels * kPanel} * kGroups * kRows * sizeof(float);
  static constexpr size_t kBytes = kManyStages * kStage > kSums ? kManyStages * kStage : kSums;
};

template <class P, int Panels, int Groups>
GPTX_KERNEL void __launch_bounds__(kManyThreads, P::kManyBlocks) linear_many(LinearTask task) {
  using Sum = typename P::Sum;
  using O = Operand<P::kLaneWords>;
  using Layout = ManyLayout<P, Panels, Groups>;
  static_assert(P::kChainTiles % kStageTiles == 0);
  let_next_kernel_start();
  std::byte* const shared = shared_memory();
  const int first_panel = block_x() * Layout::kPanels;
  const int first_group = block_y() * Layout::kGroups;
  const int warp_panel = warp_index() / 2 * Panels;
  const int warp_group = warp_index() % 2 * Groups;
  const int groups = ceil_div(task.rows, kRows);
  const int stages = ceil_div(task.tiles, kStageTiles);
  wait_for_previous_kernel();

  // The pair `stage` of tiles of all panels and groups of the block, 16 bytes a copy, zeros behind the last tile.
  const auto fetch = [&](int stage) {
    if (stage < stages) {
      std::byte* const to = shared + static_cast<size_t>(stage % kManyStages) * Layout::kStage;
      const auto copy = [&](std::byte* target, const std::byte* source, int present, int count, int tile_bytes) {
        const int copies = kStageTiles * tile_bytes / 16;
        for (int i = thread_index(); i < count * copies; i += kManyThreads) {
          const int which = i / copies, offset = i % copies * 16;
          const bool exists = which < present && stage * kStageTiles + offset / tile_bytes < task.tiles;
          const size_t begin = (static_cast<size_t>(which) * static_cast<size_t>(task.tiles) +
                                static_cast<size_t>(stage * kStageTiles)) * static_cast<size_t>(tile_bytes);
          copy_16_bytes_async(target + i * 16, source + (exists ? begin + static_cast<size_t>(offset) : 0), exists);
        }
      };
      constexpr int kOperandBytes = static_cast<int>(kOperandTileBytes<P>);
      const size_t panel_bytes = static_cast<size_t>(task.tiles) * kTileBytes;
      const size_t group_bytes = static_cast<size_t>(task.tiles) * kOperandBytes;
      copy(to, reinterpret_cast<const std::byte*>(task.weights) + static_cast<size_t>(first_panel) * panel_bytes,
           task.panels - first_panel, Layout::kPanels, kTileBytes);
      copy(to + Layout::kOperands, task.operands + static_cast<size_t>(first_group) * group_bytes,
           groups - first_group, Layout::kGroups, kOperandBytes);
    }
    close_async_group();
  };

  Sum total[Panels][Groups][4] = {};
  Sum c[Panels][Groups][4] = {};
  const auto end_chain = [&] {
#pragma unroll
    for (int p = 0; p < Panels; ++p) {
#pragma unroll
      for (int g = 0; g < Groups; ++g) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          total[p][g][i] += c[p][g][i];
          c[p][g][i] = 0;
        }
      }
    }
  };

  for (int stage = 0; stage < kManyStages - 1; ++stage) fetch(stage);
  for (int stage = 0; stage < stages; ++stage) {
    wait_async_groups<kManyStages - 2>();
    sync_block();
    fetch(stage + kManyStages - 1);
    const std::byte* const from = shared + static_cast<size_t>(stage % kManyStages) * Layout::kStage;
    const auto* const weights = reinterpret_cast<const uint4*>(from) + lane_index();
    const auto* const operands = reinterpret_cast<const O*>(from + Layout::kOperands) + lane_index();
#pragma unroll
    for (int tile = 0; tile < kStageTiles; ++tile) {
      uint4 w[Panels];
#pragma unroll
      for (int p = 0; p < Panels; ++p) w[p] = weights[((warp_panel + p) * kStageTiles + tile) * kWarp];
#pragma unroll
      for (int g = 0; g < Groups; ++g) {
        const O o = operands[((warp_group + g) * kStageTiles + tile) * kWarp];
#pragma unroll
        for (int p = 0; p < Panels; ++p) P::multiply_add(c[p][g], w[p], o);
      }
    }
    if ((stage + 1) * kStageTiles % P::kChainTiles == 0) end_chain();
  }
  if (stages * kStageTiles % P::kChainTiles != 0) end_chain();
  sync_block();

  // Through shared memory, so that a lane writes one output of every row.
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
  const int n = (first_panel + warp_panel + panel) * kPanel + output;
  if (n >= task.out.columns) return;
  const Column column = task.columns.at(n);
  constexpr int kTogether = 8;
  const int first_row = (first_group + warp_group) * kRows;
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
