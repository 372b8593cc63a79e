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
GPTX_DEVICE float finite_or_zero(float x) { return fabsf(x) <= 3.4028234e38f ? x : 0.0f; }

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
      case kQkv: break;
    }
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

  // Inputs of the rows that linear_few keeps to normalize them.
  constexpr int norm_depth() const { return norm.gain == nullptr ? 0 : depth; }
};

// Shared memory of linear_few: rows to normalize and operands where it makes them, and the sums of the chains.
template <class P, int Groups>
struct FewLayout {
  int tiles, depth, items;  // depth 0: rows are not normalized
  constexpr size_t rows_bytes(int rows) const {
    return Groups > 1 ? 0 : static_cast<size_t>(rows) * static_cast<size_t>(round_up(depth, 4)) * sizeof(float);
  }
  constexpr size_t operands_begin(int rows) const { return rows_bytes(rows); }
  constexpr size_t scales_begin(int rows) const {
    return operands_begin(rows) + (Groups > 1 ? 0 : static_cast<size_t>(tiles) * kOperandTileBytes<P>);
  }
  constexpr size_t sums_begin(int rows) const { return scales_begin(rows) + kRows * sizeof(RowScale); }
  constexpr size_t bytes(int rows) const {
    return sums_begin(rows) + static_cast<size_t>(items) * Groups * kTileBytes;
  }
};

// Up to 8 * Groups rows. A warp takes items (panel, chain) of its block; with 8 rows it normalizes and rounds them too.
template <class P, int Groups>
GPTX_KERNEL void linear_few(LinearTask task) {
  using Sum = typename P::Sum;
  using Sums = Operand<4>;  // one lane's four sums
  let_next_kernel_start();
  const int chains = ceil_div(task.tiles, P::kChainTiles);
  const int first_panel = block_x() * task.panels_per_block;
  const int panels = min(task.panels_per_block, task.panels - first_panel);
  const int items = panels * chains;
  const FewLayout<P, Groups> layout{task.tiles, task.norm_depth(), items};
  std::byte* const shared = shared_memory();
  auto* const sums = reinterpret_cast<Sums*>(shared + layout.sums_begin(task.rows));
  const std::byte* operands = task.operands;
  const RowScale* scales = task.scales;

  // Weights do not depend on the kernel in front: they are on their way while it ends.
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
  wait_for_previous_kernel();

  if constexpr (Groups == 1) {
    // A norm goes over a row three times: all threads bring it near first.
    RowsView in = task.in;
    if (task.norm.gain != nullptr) {
      const RowsView near{reinterpret_cast<float*>(shared), round_up(task.depth, 4)};
      for (int r = 0; r < task.rows; ++r) {
        for (int i = thread_index(); i < task.depth; i += thread_count()) near.row(r)[i] = in.row(r)[i];
      }
      in = near;
      sync_block();
    }
    auto* const own_scales = reinterpret_cast<RowScale*>(shared + layout.scales_begin(task.rows));
    std::byte* const own_operands = shared + layout.operands_begin(task.rows);
    for (int r = warp_index(); r < task.rows; r += warp_count()) {
      const Normal value(in.row(r), task.norm, task.depth);
      const RowScale scale = write_operand<P>(own_operands, value, r, task.depth, task.tiles);
      if (lane_index() == 0) own_scales[r] = scale;
    }
    operands = own_operands;
    scales = own_scales;
    sync_block();
  }

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
      task.out.write(row, n, P::finish(total[i], P::kScaledRows ? scales[row] : RowScale{}, task.columns, n));
    }
  }
}

// Many rows: 128 outputs by 128 rows for a block of 8 warps, each with 32 outputs by 64 rows.
inline constexpr int kManyPanels = 8;
inline constexpr int kManyGroups = 16;  // of 8 rows
inline constexpr int kManyStages = 4;
inline constexpr int kManyThreads = 256;

template <class P>
inline constexpr size_t kManyStageBytes =
    kManyPanels * kTileBytes + kManyGroups * kOperandTileBytes<P>;

template <class P>
GPTX_KERNEL void __launch_bounds__(kManyThreads) linear_many(LinearTask task) {
  using Sum = typename P::Sum;
  using O = Operand<P::kLaneWords>;
  constexpr int kPanels = 2, kGroups = 8;  // of a warp
  let_next_kernel_start();
  std::byte* const shared = shared_memory();
  const int first_panel = block_x() * kManyPanels;
  const int first_group = block_y() * kManyGroups;
  const int warp_panel = warp_index() / 2 * kPanels;
  const int warp_group = warp_index() % 2 * kGroups;
  const int groups = ceil_div(task.rows, kRows);
  wait_for_previous_kernel();

  // Tile `tile` of all panels and groups of the block, 16 bytes a copy.
  const auto fetch = [&](int tile) {
    if (tile < task.tiles) {
      std::byte* const stage = shared + static_cast<size_t>(tile % kManyStages) * kManyStageBytes<P>;
      for (int i = thread_index(); i < kManyPanels * kWarp; i += kManyThreads) {
        const int panel = first_panel + i / kWarp;
        const bool exists = panel < task.panels;
        const uint4* const from =
            task.weights + (static_cast<size_t>(exists ? panel : 0) * static_cast<size_t>(task.tiles) +
                            static_cast<size_t>(tile)) * kWarp;
        copy_16_bytes_async(stage + i * 16, from + i % kWarp, exists);
      }
      constexpr int kCopies = static_cast<int>(kOperandTileBytes<P>) / 16;
      std::byte* const operands = stage + kManyPanels * kTileBytes;
      for (int i = thread_index(); i < kManyGroups * kCopies; i += kManyThreads) {
        const int group = first_group + i / kCopies;
        const bool exists = group < groups;
        const std::byte* const from =
            task.operands + (static_cast<size_t>(exists ? group : 0) * static_cast<size_t>(task.tiles) +
                             static_cast<size_t>(tile)) * kOperandTileBytes<P>;
        copy_16_bytes_async(operands + i * 16, from + i % kCopies * 16, exists);
      }
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

  for (int tile = 0; tile < kManyStages - 1; ++tile) fetch(tile);
  for (int tile = 0; tile < task.tiles; ++tile) {
    wait_async_groups<kManyStages - 2>();
    sync_block();
    fetch(tile + kManyStages - 1);
    const std::byte* const stage = shared + static_cast<size_t>(tile % kManyStages) * kManyStageBytes<P>;
    const auto* const weights = reinterpret_cast<const uint4*>(stage);
    const auto* const operands = reinterpret_cast<const O*>(stage + kManyPanels * kTileBytes);
    uint4 w[kPanels];
#pragma unroll
    for (int p = 0; p < kPanels; ++p) w[p] = weights[(warp_panel + p) * kWarp + lane_index()];
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const O o = operands[(warp_group + g) * kWarp + lane_index()];
#pragma unroll
      for (int p = 0; p < kPanels; ++p) P::multiply_add(c[p][g], w[p], o);
    }
    if ((tile + 1) % P::kChainTiles == 0) end_chain();
  }
  wait_async_groups<0>();
  if (task.tiles % P::kChainTiles != 0) end_chain();

#pragma unroll
  for (int p = 0; p < kPanels; ++p) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int n = (first_panel + warp_panel + p) * kPanel + lane_index() / 4 + i / 2 * 8;
        const int row = (first_group + warp_group + g) * kRows + lane_index() % 4 * 2 + i % 2;
        if (row >= task.rows || n >= task.out.columns) continue;
        const RowScale scale = P::kScaledRows ? task.scales[row] : RowScale{};
        task.out.write(row, n, P::finish(total[p][g][i], scale, task.columns, n));
      }
    }
  }
}

}  // namespace gptx::cuda
