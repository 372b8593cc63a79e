// Many rows on compute capability 9.0: a warpgroup multiplies its weights, in registers, by rows in shared memory, and
// fetches and adds up while it does. Only so Hopper reaches the rate of its tensor cores.
#pragma once

#include "cuda/kernels/linear_block.h"

namespace gptx::cuda {

// A block of `Warpgroups` warpgroups has 4 panels each, by `Units` units of 64 rows for all.
template <class P, int Warpgroups, int Units>
struct WarpgroupLayout {
  static constexpr int kWarpgroups = Warpgroups, kUnits = Units;
  static constexpr int kThreads = Warpgroups * 4 * kWarp;
  static constexpr int kPanels = Warpgroups * 4, kGroups = Units * kGroupsOfUnit;
  static constexpr int kSteps = P::kLaneWords / 2;  // products of a tile
  static constexpr int kTiles = 2;                  // of a stage
  // Of these, two are being multiplied, and the others are on their way.
  static constexpr int kStages = 6;
  static constexpr int kAhead = kStages - 2;
  using Tiles = Stages<P, kPanels, kGroups, kTiles, kThreads>;
  static constexpr size_t kSums = kPanels * WarpSums<P, 1, kGroups>::kBytes;
  static constexpr size_t kBytes = kStages * Tiles::kBytes > kSums ? kStages * Tiles::kBytes : kSums;
};

// Blocks for a multiprocessor: as many as the registers of their sums allow.
template <int Warpgroups, int Units>
inline constexpr int kWarpgroupBlocks = Units == 1 ? 4 / Warpgroups : 1;

template <class P, int Warpgroups, int Units>
GPTX_KERNEL void __launch_bounds__(Warpgroups * 4 * kWarp, kWarpgroupBlocks<Warpgroups, Units>)
    linear_warpgroup(LinearTask task) {
  using Sum = typename P::Sum;
  using Layout = WarpgroupLayout<P, Warpgroups, Units>;
  constexpr int kTiles = Layout::kTiles, kSteps = Layout::kSteps;
  static_assert(P::kChainTiles % (2 * kTiles) == 0);
  let_next_kernel_start();
  std::byte* const shared = shared_memory();
  const int first_panel = block_x() * Layout::kPanels;
  const int first_group = block_y() * Layout::kGroups;
  // Stages come in pairs, each with registers of its own for weights.
  const int pairs = ceil_div(task.tiles, 2 * kTiles);
  constexpr int kChainPairs = P::kChainTiles / (2 * kTiles);
  if constexpr (!kHasWarpgroups) return wait_for_previous_kernel();  // nobody launches it

  StageRing<typename Layout::Tiles, Layout::kStages, Layout::kAhead> ring(task, shared, first_panel, first_group,
                                                                          2 * pairs);
  ring.begin();

  Sum total[1][Layout::kGroups][4] = {};
  Sum c[Units][kGroupsOfUnit][4];
  uint32_t a[2][kTiles][kSteps][4];

  // The products of a stage are put into the queue of the tensor cores behind those of the stage before, for which it
  // waits then. So, behind the next barrier, all warpgroups are done with the stage before that one.
  const auto multiply = [&](int stage, uint32_t (&fragments)[kTiles][kSteps][4], bool begins) {
    wait_async_groups<Layout::kAhead - 1>();
    publish_to_warpgroups();
    sync_block();
    const auto* const weights = reinterpret_cast<const uint4*>(ring.place(stage)) + lane_index();
    const std::byte* const operands = ring.place(stage) + Layout::Tiles::kOperands;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      P::expand(fragments[tile], weights[(warp_index() * kTiles + tile) * kWarp]);
    }
    begin_warpgroup_products();
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int u = 0; u < Units; ++u) {
          constexpr int kGroupBytes = kTiles * static_cast<int>(kOperandTileBytes<P>);
          const std::byte* const b = operands + u * kGroupsOfUnit * kGroupBytes +
                                     tile * static_cast<int>(kOperandTileBytes<P>) + step * 2 * kCoreBytes;
          P::multiply_unit(c[u], fragments[tile][step], matrix_descriptor(b, kCoreBytes, kGroupBytes),
                           !begins || tile > 0 || step > 0);
        }
      }
    }
    close_warpgroup_products();
    ring.go_on(stage);
    wait_warpgroup_products<1>();
  };

  for (int first = 0; first < pairs; first += kChainPairs) {
    const int end = min(first + kChainPairs, pairs);
    for (int pair = first; pair < end; ++pair) {
      multiply(2 * pair, a[0], pair == first);
      multiply(2 * pair + 1, a[1], false);
    }
    wait_warpgroup_products<0>();
#pragma unroll
    for (int u = 0; u < Units; ++u) {
#pragma unroll
      for (int g = 0; g < kGroupsOfUnit; ++g) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          pin(c[u][g][i]);
          total[0][u * kGroupsOfUnit + g][i] += c[u][g][i];
        }
      }
    }
  }
  wait_async_groups<0>();
  sync_block();
  const WarpSums<P, 1, Layout::kGroups> sums(task, total, shared, first_panel + warp_index(), first_group);
  sums.template write<Order::kCores>();
}

}  // namespace gptx::cuda
