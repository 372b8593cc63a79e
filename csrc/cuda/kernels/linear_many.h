// Many rows: arithmetic is the bound.
#pragma once

#include "cuda/kernels/linear_block.h"

namespace gptx::cuda {

// A block of 8 warps has 4 * Panels panels by 2 * Groups groups of 8 rows, a warp Panels by Groups of them. Tiles come in
// pairs, the next ones while one is multiplied.
inline constexpr int kManyStages = 4;
inline constexpr int kManyThreads = 256;
inline constexpr int kStageTiles = 2;

template <class P, int Panels, int Groups>
struct ManyLayout {
  static constexpr int kPanels = 4 * Panels, kGroups = 2 * Groups;  // of a block
  using Tiles = Stages<P, kPanels, kGroups, kStageTiles, kManyThreads>;
  static constexpr size_t kSums = kManyThreads / kWarp * WarpSums<P, Panels, Groups>::kBytes;
  static constexpr size_t kBytes = kManyStages * Tiles::kBytes > kSums ? kManyStages * Tiles::kBytes : kSums;
};

// Blocks for a multiprocessor, which decides how registers are shared out.
template <int Panels>
inline constexpr int kManyBlocks = Panels == 1 ? 2 : 1;

template <class P, int Panels, int Groups>
GPTX_KERNEL void __launch_bounds__(kManyThreads, kManyBlocks<Panels>) linear_many(LinearTask task) {
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
  const int stages = ceil_div(task.tiles, kStageTiles);
  StageRing<typename Layout::Tiles, kManyStages, kManyStages - 1> ring(task, shared, first_panel, first_group, stages);
  ring.begin();

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

  for (int stage = 0; stage < stages; ++stage) {
    wait_async_groups<kManyStages - 2>();
    sync_block();
    ring.go_on(stage);
    const auto* const weights = reinterpret_cast<const uint4*>(ring.place(stage)) + lane_index();
    const auto* const operands = reinterpret_cast<const O*>(ring.place(stage) + Layout::Tiles::kOperands) + lane_index();
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
  const WarpSums<P, Panels, Groups> sums(task, total, shared, first_panel + warp_panel, first_group + warp_group);
  sums.template write<Order::kFragments>();
}

}  // namespace gptx::cuda
