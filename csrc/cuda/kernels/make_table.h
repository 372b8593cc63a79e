// From a Product to the kernels of its precision: shapes of launches, and the variant for the number of rows.
#pragma once

#include "cuda/kernel_table.h"
#include "cuda/kernels/linear_few.h"
#include "cuda/kernels/linear_many.h"
#include "cuda/kernels/linear_warpgroup.h"
#include "cuda/launch.h"

namespace gptx::cuda {

// Warps of a block of linear_few: as many as it has items, but where a multiprocessor has several blocks, not more than
// let two of them share it.
inline constexpr int kFewWarps = 12;

template <class P, int Groups>
LaunchShape few_shape(const Device& device, LinearTask& task) {
  const int chains = ceil_div(task.tiles, P::kChainTiles);
  // Two blocks for each multiprocessor; the sums of a block in 48 KiB.
  const int wanted = ceil_div(task.panels, 2 * device.properties().multiprocessors);
  const int most = max(1, 48 * 1024 / (chains * Groups * kTileBytes));
  task.panels_per_block = min(wanted, most);
  const int items = task.panels_per_block * chains;
  const int blocks = ceil_div(task.panels, task.panels_per_block);
  const int warps = blocks <= device.properties().multiprocessors && items <= kFewWarps ? kFewWarps : kSharingWarps;
  return {.x = static_cast<size_t>(blocks),
          .threads = min(items, warps) * kWarp,
          .shared_bytes = FewLayout<P, Groups>{task.rows, task.depth, task.tiles, task.panels_per_block,
                                                items, task.norm.gain != nullptr}
                              .bytes()};
}

template <class P, int Groups>
bool fits_few(const Device& device, LinearTask task) {
  return few_shape<P, Groups>(device, task).shared_bytes <= device.properties().shared_bytes;
}

// Some rows of a task, from a multiple of 8 on.
template <class P>
LinearTask rows_of(LinearTask task, int first, int rows, size_t blocks) {
  task.operands += static_cast<size_t>(first / kRows) * static_cast<size_t>(task.tiles) * kOperandTileBytes<P>;
  task.scales += first;
  task.out.rows.data = task.out.rows.row(first);
  task.out.rounded.operands += static_cast<size_t>(first / kRows) * static_cast<size_t>(task.out.rounded.tiles) *
                               kOperandTileBytes<P>;
  if (task.out.rows.maxima != nullptr) task.out.rows.maxima += static_cast<size_t>(first) * blocks;
  task.out.cache.positions += first;
  task.out.cache.row_tables += first;
  task.rows = min(rows, task.rows - first);
  return task;
}

// All rows, as many at a time as a block has room for. The blocks are the same for all.
template <class P, int Groups>
size_t launch_few(Device& device, LinearTask task) {
  const int rows = task.rows;
  LaunchShape shape = few_shape<P, Groups>(device, task);
  for (int first = 0; first < rows; first += Groups * kRows) {
    const LinearTask part = Groups == 1 ? task : rows_of<P>(task, first, Groups * kRows, shape.x);
    launch(device, shape, linear_few<P, Groups>, part);
  }
  return shape.x;
}

// The larger the part of a block, the less it reads for each product; but every multiprocessor should have one.
template <class P, int Panels, int Groups>
bool launch_many(Device& device, const LinearTask& task, bool always) {
  using Layout = ManyLayout<P, Panels, Groups>;
  const LaunchShape shape{.x = static_cast<size_t>(ceil_div(task.panels, Layout::kPanels)),
                          .y = static_cast<size_t>(ceil_div(task.rows, Layout::kGroups * kRows)),
                          .threads = kManyThreads,
                          .shared_bytes = Layout::kBytes};
  if (!always && shape.x * shape.y < static_cast<size_t>(device.properties().multiprocessors)) return false;
  launch(device, shape, linear_many<P, Panels, Groups>, task);
  return true;
}

// Calls f with the layout of tiles of a size, from the largest on: one of kWarpgroupSizes.
template <class P, class F>
void with_warpgroup_size(int size, F f) {
  switch (size) {
    case 0: return f(WarpgroupLayout<P, 2, 3>());
    case 1: return f(WarpgroupLayout<P, 2, 2>());
    case 2: return f(WarpgroupLayout<P, 2, 1>());
    case 3: return f(WarpgroupLayout<P, 1, 1>());
    default: return;
  }
}

template <class P>
void launch_warpgroup(Device& device, const LinearTask& task, int size) {
  with_warpgroup_size<P>(size, [&](auto layout) {
    launch(device,
           {.x = static_cast<size_t>(ceil_div(task.panels, layout.kPanels)),
            .y = static_cast<size_t>(ceil_div(task.rows, layout.kGroups * kRows)),
            .threads = layout.kThreads,
            .shared_bytes = layout.kBytes},
           linear_warpgroup<P, layout.kWarpgroups, layout.kUnits>, task);
  });
}

// The size with which it takes least: as long as the blocks that a multiprocessor has one after another, each as long as
// what it reads, for beyond a few rows that is the bound.
template <class P>
int best_warpgroup_size(const Device& device, const LinearTask& task) {
  int best = 0, least = 0;
  for (int size = 0; size < kWarpgroupSizes; ++size) {
    int time = 0;
    with_warpgroup_size<P>(size, [&](auto layout) {
      const int blocks = ceil_div(task.panels, layout.kPanels) * ceil_div(task.rows, layout.kGroups * kRows);
      time = ceil_div(blocks, device.properties().multiprocessors) * (layout.kPanels * kPanel + layout.kGroups * kRows);
    });
    if (size > 0 && time >= least) continue;
    best = size;
    least = time;
  }
  return best;
}

template <class P>
constexpr MatmulKernels make_matmul() {
  MatmulKernels table = {
      .inputs = P::kInputs,
      .operand_tile_bytes = kOperandTileBytes<P>,
      .scales_rows = P::kScaledRows,
      .make_operands =
          [](Device& device, Order order, std::byte* operands, RowScale* scales, const RowsView& in, const Norm& norm,
             int rows, int columns, int tiles) {
            const LaunchShape shape{.x = static_cast<size_t>(ceil_div(rows, kRows)), .threads = kRows * kWarp};
            const auto kernel =
                order == Order::kCores ? make_operands<P, Order::kCores> : make_operands<P, Order::kFragments>;
            launch(device, shape, kernel, operands, scales, in, norm, rows, columns, tiles);
          },
      .makes_operands =
          [](const Device& device, const LinearTask& task) {
            return task.rows <= kRows && fits_few<P, 1>(device, task);
          },
      .linear_few =
          [](Device& device, const LinearTask& task) {
            if (task.operands == nullptr) return launch_few<P, 1>(device, task);
            if (task.rows > 4 * kRows && fits_few<P, 8>(device, task)) return launch_few<P, 8>(device, task);
            if (task.rows > 2 * kRows && fits_few<P, 4>(device, task)) return launch_few<P, 4>(device, task);
            return launch_few<P, 2>(device, task);
          },
      .fits_few = [](const Device& device, const LinearTask& task) { return fits_few<P, 2>(device, task); },
      .linear_many =
          [](Device& device, const LinearTask& task) {
            if (launch_many<P, P::kManyPanels, P::kManyGroups>(device, task, false)) return;
            if (launch_many<P, 1, 4>(device, task, false)) return;
            launch_many<P, 1, 2>(device, task, true);
          },
      .linear_warpgroup = nullptr,
      .linear_warpgroup_sized = nullptr,
  };
  if constexpr (P::kWarpgroups) {
    table.linear_warpgroup_sized = launch_warpgroup<P>;
    table.linear_warpgroup = [](Device& device, const LinearTask& task) {
      launch_warpgroup<P>(device, task, best_warpgroup_size<P>(device, task));
    };
  }
  return table;
}

inline constexpr int kManyQueryGroups = kBlock / kRows;

template <class P>
constexpr AttentionKernels make_attention() {
  return {
      .inputs = P::kInputs,
      .has_many =
          [](const Device& device, const KvLayout& kv) {
            return AttentionLayout<P, kManyQueryGroups>{kv}.bytes() <= device.properties().shared_bytes;
          },
      .many =
          [](Device& device, const AttentionTask& task, size_t queries) {
            const AttentionLayout<P, kManyQueryGroups> layout{task.cache.layout};
            const LaunchShape shape{.x = queries,
                                    .y = static_cast<size_t>(task.cache.heads),
                                    .threads = kAttentionThreads,
                                    .shared_bytes = layout.bytes()};
            if constexpr (layout.kSpareRegisters) {
              if (layout.sums_in_registers()) {
                return launch(device, shape, attend_many<P, kManyQueryGroups, true>, task);
              }
            }
            launch(device, shape, attend_many<P, kManyQueryGroups, false>, task);
          },
      .few =
          [](Device& device, const AttentionTask& task, size_t queries, size_t blocks) {
            const LaunchShape shape{.x = blocks,
                                    .y = static_cast<size_t>(task.cache.heads),
                                    .z = queries,
                                    .threads = kAttentionThreads,
                                    .shared_bytes = AttentionLayout<P, 1>{task.cache.layout}.bytes()};
            launch(device, shape, attend_few<P>, task);
          },
  };
}

}  // namespace gptx::cuda
