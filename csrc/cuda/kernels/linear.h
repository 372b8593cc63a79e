// out = act weight^T, then scale, bias and what comes after. Two shapes of one sum: for few rows a warp has one chain of
// one panel, so that all of a small matrix is on its way at once; for many rows a block has 128 outputs by 128 rows.
// Chains are of the same length and are added in the same order in both, so a row's bits do not depend on the others.
#pragma once

#include "cuda/kernels/products.h"
#include "cuda/kernels/rowwise.h"
#include "cuda/kernels/vocabulary.h"
#include "cuda/layout.h"

namespace gptx::cuda {

enum class Activation : int { kNone, kGeluNew, kGelu, kRelu };

GPTX_DEVICE float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::kNone: return x;
    // x / (1 + e^(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3): the tanh form without its cancellation.
    case Activation::kGeluNew: return x / (1.0f + expf(x * fmaf(x * x, -0.0713548163f, -1.5957691216f)));
    case Activation::kGelu: return 0.5f * x * erfcf(-0.7071067812f * x);
    case Activation::kRelu: return x > 0.0f ? x : (x < 0.0f ? 0.0f : x);
  }
  return x;
}

// Where the K and V of a step go.
struct CacheView {
  std::byte* blocks;             // of this layer: [blocks, heads, KvLayout]
  KvLayout layout;
  int heads;
  const int32_t* positions;      // [T]
  const int32_t* block_tables;   // the ids of the blocks of all sequences
  const int32_t* row_tables;     // [T], where the table of a row's sequence begins

  GPTX_DEVICE std::byte* head(int block, int h) const {
    return blocks + (static_cast<size_t>(block) * static_cast<size_t>(heads) + static_cast<size_t>(h)) *
                        layout.bytes();
  }
  GPTX_DEVICE std::byte* head_of_row(int row, int h) const {
    return head(block_tables[row_tables[row] + positions[row] / kBlock], h);
  }
};

// What is cached of a number that is not finite: hidden positions are multiplied by zero.
GPTX_DEVICE float finite_or_zero(float x) { return is_finite(x) ? x : 0.0f; }

GPTX_DEVICE void store_cached(std::byte* p, int inputs, float x) {
  x = finite_or_zero(x);
  if (inputs == 1) {
    *reinterpret_cast<float*>(p) = x;
  } else {
    *reinterpret_cast<uint16_t*>(p) = static_cast<uint16_t>(bf16_pair(x, 0.0f));
  }
}

// Where outputs go.
struct Output {
  enum Kind : int { kStore, kAdd, kQkv };
  Kind kind;
  Activation activation;
  RowsView rows;
  int columns;      // outputs that exist
  CacheView cache;  // kQkv: K and V go there too, unless it wants a scale for each row

  GPTX_DEVICE void write(int row, int n, float value) const {
    if (n >= columns) return;
    float* const p = rows.row(row) + n;
    switch (kind) {
      case kStore: *p = activate(activation, value); return;
      case kAdd: *p += value; return;
      case kQkv: write_qkv(p, row, n, value); return;
    }
  }

  GPTX_DEVICE void write_qkv(float* p, int row, int n, float value) const {
    const int width = cache.layout.head_width;
    const int head = n / (3 * width), part = n / width % 3, d = n % width;
    if (part == 0 || cache.layout.scaled) *p = value;
    if (part == 0 || cache.layout.scaled || d >= cache.layout.head_size) return;
    const int position = cache.positions[row] % kBlock;
    const int inputs = cache.layout.inputs;
    std::byte* const base = cache.head_of_row(row, head);
    if (part == 1) {
      store_cached(base + weight_offset(position, d, cache.layout.key_tiles(), inputs), inputs, value);
    } else {
      store_cached(base + cache.layout.value_begin() +
                       weight_offset(d, position, cache.layout.value_tiles(), inputs),
                   inputs, value);
    }
  }
};

struct LinearTask {
  const uint4* weights;  // tiles
  Columns columns;
  int panels;
  int tiles;             // of a panel
  int depth;             // K
  int rows;
  RowsView in;           // for linear_few with 8 rows, which makes its operands itself
  Norm norm;
  const std::byte* operands;
  const RowScale* scales;
  Output out;
  int panels_per_block;  // linear_few
};

// Shared memory of linear_few, in bytes from its beginning. With one group of rows it makes their operands itself: rows
// that have to be looked at as a whole are brought near first, and so is the norm.
template <class P, int Groups>
struct FewLayout {
  int rows, depth, tiles, items;
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
  constexpr size_t sums_begin() const { return maxima_begin() + Groups * kRows * sizeof(uint64_t); }
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
  RowsView in = task.in;
  auto* const statistics = reinterpret_cast<RowStatistics*>(shared + layout.statistics_begin());
  if (layout.near()) {
    const RowsView near{reinterpret_cast<float*>(shared), layout.stride()};
    const int quads = layout.stride() / 4;
    for (int i = thread_index(); i < task.rows * quads; i += thread_count()) {
      reinterpret_cast<float4*>(near.row(i / quads))[i % quads] =
          reinterpret_cast<const float4*>(in.row(i / quads))[i % quads];
    }
    in = near;
    sync_block();
    for (int r = warp_index(); r < task.rows; r += warp_count()) {
      const RowStatistics s = row_statistics<P>(in.row(r), norm, task.depth);
      if (lane_index() == 0) statistics[r] = s;
    }
    sync_block();
  }
  const int lines = task.tiles * kTileLines;
  for (int i = thread_index(); i < task.rows * lines; i += thread_count()) {
    const int r = i / lines;
    write_operand_line<P>(shared + layout.operands_begin(), in.row(r), norm,
                          layout.near() ? statistics[r] : RowStatistics{}, r, i % lines, task.depth, task.tiles);
  }
  sync_block();
}

// Up to 8 * Groups rows. A warp takes items (panel, chain) of its block.
template <class P, int Groups>
GPTX_KERNEL void linear_few(LinearTask task) {
  using Sum = typename P::Sum;
  using Sums = Operand<4>;  // one lane's four sums
  let_next_kernel_start();
  const int chains = ceil_div(task.tiles, P::kChainTiles);
  const int first_panel = block_x() * task.panels_per_block;
  const int panels = min(task.panels_per_block, task.panels - first_panel);
  const int items = panels * chains;
  const FewLayout<P, Groups> layout{task.rows, task.depth, task.tiles, items, task.norm.gain != nullptr};
  std::byte* const shared = shared_memory();
  auto* const sums = reinterpret_cast<Sums*>(shared + layout.sums_begin());
  uint64_t* const maxima =
      task.out.rows.maxima == nullptr ? nullptr : reinterpret_cast<uint64_t*>(shared + layout.maxima_begin());

  // Weights and norms do not depend on the kernel in front: they are on their way while it ends.
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
  wait_for_previous_kernel();

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
  if (maxima != nullptr) {
    for (int row = thread_index(); row < task.rows; row += thread_count()) maxima[row] = 0;
  }
  sync_block();

  for (int pair = warp_index(); pair < panels * Groups; pair += warp_count()) {
    const int panel = pair / Groups, group = pair % Groups;
    Sum total[4] = {};
    for (int chain = 0; chain < chains; ++chain) {
      const Sums& part = sums[((panel * chains + chain) * Groups + group) * kWarp + lane_index()];
#pragma unroll
      for (int i = 0; i < 4; ++i) total[i] += reinterpret_cast<const Sum*>(part.word)[i];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int n = (first_panel + panel) * kPanel + lane_index() / 4 + i / 2 * 8;
      const int row = group * kRows + lane_index() % 4 * 2 + i % 2;
      if (row >= task.rows) continue;
      const float value = P::finish(total[i], scale_of(row), task.columns, n);
      task.out.write(row, n, value);
      if (maxima != nullptr && n < task.out.columns) atomic_max(&maxima[row], rank_of(value, n));
    }
  }
  if (maxima == nullptr) return;
  sync_block();
  for (int row = thread_index(); row < task.rows; row += thread_count()) {
    task.out.rows.maxima[row * grid_x() + block_x()] = maxima[row];
  }
}

// Many rows: 128 outputs by up to 128 rows for a block of 8 warps, each with a quarter of the outputs and half of the rows.
// Tiles come in pairs, the next ones while one is multiplied.
inline constexpr int kManyPanels = 8;
inline constexpr int kManyStages = 4;
inline constexpr int kManyThreads = 256;
inline constexpr int kStageTiles = 2;

template <class P>
inline constexpr int kBlockGroups = 2 * P::kManyGroups;  // of 8 rows

template <class P>
struct ManyLayout {
  static constexpr size_t kOperands = kStageTiles * kManyPanels * kTileBytes;  // where they begin in a stage
  static constexpr size_t kStage = kOperands + kStageTiles * kBlockGroups<P> * kOperandTileBytes<P>;
  static constexpr size_t kSums = size_t{kManyPanels * kPanel} * kBlockGroups<P> * kRows * sizeof(float);
  static constexpr size_t kBytes = kManyStages * kStage > kSums ? kManyStages * kStage : kSums;
};

template <class P>
GPTX_KERNEL void __launch_bounds__(kManyThreads) linear_many(LinearTask task) {
  using Sum = typename P::Sum;
  using O = Operand<P::kLaneWords>;
  using Layout = ManyLayout<P>;
  constexpr int kPanels = 2, kGroups = P::kManyGroups;  // of a warp
  static_assert(P::kChainTiles % kStageTiles == 0);
  let_next_kernel_start();
  std::byte* const shared = shared_memory();
  const int first_panel = block_x() * kManyPanels;
  const int first_group = block_y() * kBlockGroups<P>;
  const int warp_panel = warp_index() / 2 * kPanels;
  const int warp_group = warp_index() % 2 * kGroups;
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
           task.panels - first_panel, kManyPanels, kTileBytes);
      copy(to + Layout::kOperands, task.operands + static_cast<size_t>(first_group) * group_bytes,
           groups - first_group, kBlockGroups<P>, kOperandBytes);
    }
    close_async_group();
  };

  Sum total[kPanels][kGroups][4] = {};
  Sum c[kPanels][kGroups][4] = {};
  const auto end_chain = [&] {
#pragma unroll
    for (int p = 0; p < kPanels; ++p) {
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
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
      uint4 w[kPanels];
#pragma unroll
      for (int p = 0; p < kPanels; ++p) w[p] = weights[((warp_panel + p) * kStageTiles + tile) * kWarp];
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const O o = operands[((warp_group + g) * kStageTiles + tile) * kWarp];
#pragma unroll
        for (int p = 0; p < kPanels; ++p) P::multiply_add(c[p][g], w[p], o);
      }
    }
    if ((stage + 1) * kStageTiles % P::kChainTiles == 0) end_chain();
  }
  if (stages * kStageTiles % P::kChainTiles != 0) end_chain();
  sync_block();

  // Through shared memory, so that a lane writes one output of every row.
  auto* const sums = reinterpret_cast<Sum*>(shared) + warp_index() * kPanels * kGroups * kTileWords;
#pragma unroll
  for (int p = 0; p < kPanels; ++p) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[((p * kGroups + g) * kWarp + lane_index()) * 4 + i] = total[p][g][i];
    }
  }
  sync_warp();
  const int output = lane_index() % kPanel, panel = lane_index() / kPanel;
  const int n = (first_panel + warp_panel + panel) * kPanel + output;
  if (n >= task.out.columns) return;
  const int first_row = (first_group + warp_group) * kRows;
  for (int r = 0; r < kGroups * kRows && first_row + r < task.rows; ++r) {
    const int fragment = (panel * kGroups + r / kRows) * kWarp + output % 8 * 4 + r % kRows / 2;
    const Sum sum = sums[fragment * 4 + r % 2 + output / 8 * 2];
    const RowScale scale = P::kScaledRows ? task.scales[first_row + r] : RowScale{};
    task.out.write(first_row + r, n, P::finish(sum, scale, task.columns, n));
  }
}

}  // namespace gptx::cuda
