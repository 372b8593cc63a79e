// Up to 64 rows: the weights are read once, and the kernel is as long as that takes.
#pragma once

#include "cuda/kernels/linear.h"

namespace gptx::cuda {

// Shared memory of linear_few, in bytes from its beginning. With one group of rows it makes their operands itself: rows
// that have to be looked at as a whole are brought near first, and so is the norm.
template <class P, int Groups>
struct FewLayout {
  int rows, depth, tiles, panels, items;
  bool normalized;

  static constexpr bool kMakesOperands = Groups == 1;
  constexpr bool near() const { return kMakesOperands && (normalized || P::kScaledRows); }
  constexpr int stride() const { return round_up(depth, 4); }
  constexpr size_t floats(int vectors) const {
    return static_cast<size_t>(vectors) * static_cast<size_t>(stride()) * sizeof(float);
  }
  constexpr size_t norm_begin() const { return near() ? floats(rows) : 0; }
  constexpr size_t operands_begin() const { return norm_begin() + (kMakesOperands && normalized ? floats(2) : 0); }
  constexpr size_t statistics_begin() const {
    return operands_begin() + (kMakesOperands ? static_cast<size_t>(tiles) * kOperandTileBytes<P> : 0);
  }
  constexpr size_t maxima_begin() const { return statistics_begin() + kRows * sizeof(RowStatistics); }
  constexpr size_t places_begin() const { return maxima_begin() + Groups * kRows * sizeof(uint64_t); }
  constexpr size_t columns_begin() const { return places_begin() + Groups * kRows * sizeof(RowPlace); }
  constexpr size_t sums_begin() const {
    return columns_begin() + static_cast<size_t>(panels) * kPanel * sizeof(Column);
  }
  constexpr size_t bytes() const { return sums_begin() + static_cast<size_t>(items) * Groups * kTileBytes; }
};

// The operands of up to 8 rows in shared memory, by the whole block; the norm is near already.
template <class P>
GPTX_DEVICE void make_own_operands(const LinearTask& task, const FewLayout<P, 1>& layout, std::byte* shared) {
  Norm norm = task.norm;
  if (layout.normalized) {
    norm.gain = reinterpret_cast<const float*>(shared + layout.norm_begin());
    norm.bias = norm.gain + layout.stride();
  }
  auto* const statistics = reinterpret_cast<RowStatistics*>(shared + layout.statistics_begin());
  const auto write = [&](const float* row, const RowStatistics& s, int r) {
    write_operand<P, Order::kFragments>(shared + layout.operands_begin(), row, norm, s, r, task.depth, task.tiles,
                                        thread_index(), thread_count());
  };
  if (layout.near()) {
    const RowsView near{reinterpret_cast<float*>(shared), layout.stride()};
    for (int r = 0; r < task.rows; ++r) {
      const auto* const from = reinterpret_cast<const float4*>(task.in.row(r));
      for (int i = thread_index(); i < layout.stride() / 4; i += thread_count()) {
        reinterpret_cast<float4*>(near.row(r))[i] = from[i];
      }
    }
    sync_block();
    for (int r = warp_index(); r < task.rows; r += warp_count()) {
      const RowStatistics s = row_statistics<P>(near.row(r), norm, task.depth);
      if (lane_index() == 0) statistics[r] = s;
    }
    sync_block();
    for (int r = 0; r < task.rows; ++r) write(near.row(r), statistics[r], r);
  } else {
    for (int r = 0; r < task.rows; ++r) write(task.in.row(r), RowStatistics{}, r);
  }
  sync_block();
}

// Blocks of so many warps share a multiprocessor in pairs: of 64 Ki registers a thread has 128.
inline constexpr int kSharingWarps = 8;
inline constexpr int kSharingThreads = 2 * kSharingWarps * kWarp;

// Up to 8 * Groups rows. A warp takes items (panel, chain) of its block.
template <class P, int Groups>
GPTX_KERNEL void __launch_bounds__(kSharingThreads, 1) linear_few(LinearTask task) {
  using Sum = typename P::Sum;
  using Sums = Operand<4>;  // one lane's four sums
  let_next_kernel_start();
  const int chains = ceil_div(task.tiles, P::kChainTiles);
  const int first_panel = block_x() * task.panels_per_block;
  const int panels = min(task.panels_per_block, task.panels - first_panel);
  const int items = panels * chains;
  const FewLayout<P, Groups> layout{task.rows, task.depth, task.tiles, task.panels_per_block, items,
                                    task.norm.gain != nullptr};
  std::byte* const shared = shared_memory();
  auto* const sums = reinterpret_cast<Sums*>(shared + layout.sums_begin());
  uint64_t* const maxima =
      task.out.rows.maxima == nullptr ? nullptr : reinterpret_cast<uint64_t*>(shared + layout.maxima_begin());

  auto* const places = reinterpret_cast<RowPlace*>(shared + layout.places_begin());
  auto* const columns = reinterpret_cast<Column*>(shared + layout.columns_begin());

  // Weights, norms and biases do not depend on the kernel in front: they are on their way while it ends. (Their branch
  // keeps ptxas from moving the loads behind the wait, to where they are used.)
  uint4 weights[P::kChainTiles];
  const auto load_chain = [&](int item) {
    const int tile = item % chains * P::kChainTiles;
    const uint4* const p = task.weights + (static_cast<size_t>(first_panel + item / chains) *
                                               static_cast<size_t>(task.tiles) +
                                           static_cast<size_t>(tile)) * kWarp +
                           static_cast<size_t>(lane_index());
#pragma unroll
    for (int i = 0; i < P::kChainTiles; ++i) {
      if (tile + i < task.tiles) weights[i] = load_streamed(p + i * kWarp);
    }
  };
  if (warp_index() < items) load_chain(warp_index());
  if constexpr (layout.kMakesOperands) {
    if (layout.normalized) {
      auto* const near = reinterpret_cast<float*>(shared + layout.norm_begin());
      for (int i = thread_index(); i < task.depth; i += thread_count()) {
        near[i] = load_constant(task.norm.gain + i);
        near[layout.stride() + i] = load_constant(task.norm.bias + i);
      }
    }
  }
  for (int i = thread_index(); i < panels * kPanel; i += thread_count()) {
    columns[i] = task.columns.at(first_panel * kPanel + i);
  }
  wait_for_previous_kernel();

  for (int row = thread_index(); row < task.rows; row += thread_count()) {
    places[row] = task.out.place_of(row);
    if (maxima != nullptr) maxima[row] = 0;
  }
  const std::byte* operands = task.operands;
  if constexpr (layout.kMakesOperands) {
    make_own_operands<P>(task, layout, shared);
    operands = shared + layout.operands_begin();
  }
  const auto scale_of = [&](int row) {
    if constexpr (!P::kScaledRows) return RowScale{};
    if constexpr (layout.kMakesOperands) {
      return reinterpret_cast<const RowStatistics*>(shared + layout.statistics_begin())[row].scale;
    }
    return task.scales[row];
  };

  for (int item = warp_index(); item < items; item += warp_count()) {
    if (item != warp_index()) load_chain(item);
    const int tile = item % chains * P::kChainTiles;
    Sum c[Groups][4] = {};
#pragma unroll
    for (int i = 0; i < P::kChainTiles; ++i) {
      if (tile + i >= task.tiles) break;
#pragma unroll
      for (int g = 0; g < Groups; ++g) {
        if (g * kRows >= task.rows) break;
        using O = Operand<P::kLaneWords>;
        const auto* const p = reinterpret_cast<const O*>(operands) +
                              (g * task.tiles + tile + i) * kWarp + lane_index();
        P::multiply_add(c[g], weights[i], *p);
      }
    }
#pragma unroll
    for (int g = 0; g < Groups; ++g) {
      Sums& mine = sums[(item * Groups + g) * kWarp + lane_index()];
#pragma unroll
      for (int i = 0; i < 4; ++i) reinterpret_cast<Sum*>(mine.word)[i] = c[g][i];
    }
  }
  sync_block();

  for (int pair = warp_index(); pair < panels * Groups; pair += warp_count()) {
    const int panel = pair / Groups, group = pair % Groups;
    const auto output = [&](int i) { return panel * kPanel + lane_index() / 4 + i / 2 * 8; };  // of the block
    const auto row_of = [&](int i) { return group * kRows + lane_index() % 4 * 2 + i % 2; };
    float present[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      present[i] = row_of(i) < task.rows ? task.out.present(row_of(i), first_panel * kPanel + output(i)) : 0.0f;
    }
    Sum total[4] = {};
    for (int chain = 0; chain < chains; ++chain) {
      const Sums& part = sums[((panel * chains + chain) * Groups + group) * kWarp + lane_index()];
#pragma unroll
      for (int i = 0; i < 4; ++i) total[i] += reinterpret_cast<const Sum*>(part.word)[i];
    }
    float value[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const RowScale scale = row_of(i) < task.rows ? scale_of(row_of(i)) : RowScale{};
      value[i] = P::finish(total[i], scale, columns[output(i)]);
    }
    activate(task.out.activation, value);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = row_of(i), n = first_panel * kPanel + output(i);
      if (row >= task.rows) continue;
      task.out.write(row, n, task.out.column_of(n), value[i], present[i], places[row]);
      if (maxima != nullptr && n < task.out.columns) atomic_max(&maxima[row], rank_of(value[i], n));
    }
  }
  if (maxima == nullptr) return;
  sync_block();
  for (int row = thread_index(); row < task.rows; row += thread_count()) {
    task.out.rows.maxima[row * grid_x() + block_x()] = maxima[row];
  }
}

}  // namespace gptx::cuda
