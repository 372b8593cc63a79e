// From a Product to the kernels of its precision: shapes of launches, and the variant for the number of rows.
#pragma once

#include "cuda/kernel_table.h"
#include "cuda/kernels/linear_few.h"
#include "cuda/kernels/linear_many.h"
#include "cuda/kernels/linear_warpgroup.h"
#include "cuda/launch.h"

namespace gptx::cuda {

// Warps of a block of linear_few: as many as it has items, or so many that two blocks share a multiprocessor.
inline constexpr int kFewWarps = 12;

template <class P, int Groups>
LaunchShape few_shape(const Device& device, LinearTask& task) {
  const int chains = ceil_div(task.tiles, P::kChainTiles);
  // Two blocks for each multiprocessor; the sums of a block in 48 KiB.
  const int wanted = ceil_div(task.panels, 2 * device.properties().multiprocessors);
  const int most = max(1, 48 * 1024 / (chains * Groups * kTileBytes));
  task.panels_per_block = min(wanted, most);
  const int items = task.panels_per_block * chains;
  return {.x = static_cast<size_t>(ceil_div(task.panels, task.panels_per_block)),
          .threads = (items <= kFewWarps ? items : kSharingWarps) * kWarp,
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

template <class P, int Warpgroups, int Units>
void launch_warpgroup(Device& device, const LinearTask& task) {
  using Layout = WarpgroupLayout<P, Warpgroups, Units>;
  launch(device,
         {.x = static_cast<size_t>(ceil_div(task.panels, Layout::kPanels)),
          .y = static_cast<size_t>(ceil_div(task.rows, Layout::kGroups * kRows)),
          .threads = Layout::kThreads,
          .shared_bytes = Layout::kBytes},
         linear_warpgroup<P, Warpgroups, Units>, task);
}

// The blocks that a multiprocessor has one after another, each as long as what it reads: beyond a few rows, that is the
// bound.
template <class P, int Warpgroups, int Units>
int warpgroup_time(const Device& device, const LinearTask& task) {
  using Layout = WarpgroupLayout<P, Warpgroups, Units>;
  const int blocks = ceil_div(task.panels, Layout::kPanels) * ceil_div(task.rows, Layout::kGroups * kRows);
  return ceil_div(blocks, device.properties().multiprocessors) * (Layout::kPanels * kPanel + Layout::kGroups * kRows);
}

template <class P>
constexpr auto warpgroup_launcher() -> void (*)(Device&, const LinearTask&) {
  if constexpr (!P::kWarpgroups) {
    return nullptr;
  } else {
    return [](Device& device, const LinearTask& task) {
      struct Variant {
        int time;
        void (*launch)(Device&, const LinearTask&);
      };
      Variant best{warpgroup_time<P, 2, 3>(device, task), launch_warpgroup<P, 2, 3>};
      const auto consider = [&](const Variant& other) {
        if (other.time < best.time) best = other;
      };
      consider({warpgroup_time<P, 2, 2>(device, task), launch_warpgroup<P, 2, 2>});
      consider({warpgroup_time<P, 2, 1>(device, task), launch_warpgroup<P, 2, 1>});
      consider({warpgroup_time<P, 1, 1>(device, task), launch_warpgroup<P, 1, 1>});
      best.launch(device, task);
    };
  }
}

template <class P>
constexpr MatmulKernels make_matmul() {
  return {
      .inputs = P::kInputs,
      .operand_tile_bytes = kOperandTileBytes<P>,
      .scales_rows = P::kScaledRows,
      .make_operands =
          [](Device& device, Order order, std::byte* operands, RowScale* scales, const RowsView& in, const Norm& norm,
             int rows, int columns, int tiles) {
            const LaunchShape shape{.x = static_cast<size_t>(ceil_div(rows, kRows)), .threads = kRows * kWarp};
            const auto kernel = order == Order::kCores ? make_operands<P, Order::kCores> : make_operands<P, Order::kFragments>;
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
      .linear_warpgroup = warpgroup_launcher<P>(),
  };
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
