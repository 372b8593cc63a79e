// softmax(scale Q K^T) V, causal, over KV blocks of 64 positions counted from position 0. K and V of a block are matrices
// in tiles, so both products are those of the weights. Each block is computed by itself and folded into what came before
// (Milakov & Gimelshein, 2018; Dao et al., 2022), in the order of the blocks: in one block of threads where there are many
// queries, from memory by whoever comes last where there are few. The bits are the same.
#pragma once

#include "cuda/kernels/linear.h"
#include "cuda/kernels/products.h"
#include "cuda/kernels/rowwise.h"
#include "cuda/kernels/vocabulary.h"
#include "cuda/layout.h"

namespace gptx::cuda {

inline constexpr int kAttentionWarps = kBlock / kPanel;  // a panel of 16 positions for each
inline constexpr int kAttentionThreads = kAttentionWarps * kWarp;

// Consecutive positions of one sequence inside one KV block.
struct QueryItem {
  int32_t row, out_row, rows, position;
  int32_t table;  // where the block table of the sequence begins
};

struct AttentionTask {
  RowsView qkv;   // [T, H, 3, Dp]
  RowsView out;   // [T, H D]
  RoundedRows rounded;  // instead of `out`, unless null
  CacheView cache;
  const QueryItem* queries;
  float scale;
  int few_rows;       // the most rows of a query, for few queries
  float* partials;    // [queries, heads, blocks, few_rows, Dp + 2], likewise
  uint32_t* tickets;  // [queries, heads], zeros
};

// Shared memory, for 8 * Groups queries of one head.
template <class P, int Groups>
struct AttentionLayout {
  KvLayout kv;
  static constexpr int kQueries = Groups * kRows;
  constexpr size_t query_bytes() const {
    return static_cast<size_t>(Groups * kv.key_tiles()) * kOperandTileBytes<P>;
  }
  constexpr size_t weights_begin() const { return query_bytes(); }  // of the positions, as an operand
  constexpr size_t statistics_begin() const {
    return weights_begin() + static_cast<size_t>(Groups * kv.value_tiles()) * kOperandTileBytes<P>;
  }
  constexpr size_t out_begin() const { return statistics_begin() + sizeof(float) * kQueries * kStatistics; }
  // float32 needs all registers for its split numbers.
  static constexpr bool kSpareRegisters = P::kInputs > 1;
  // Whether every warp has one panel of values at most, whose sums it can keep.
  constexpr bool sums_in_registers() const { return kSpareRegisters && kv.head_width <= kAttentionWarps * kPanel; }
  constexpr int out_stride() const { return kv.head_width + 4; }  // no two of 8 rows begin in the same bank
  constexpr size_t bytes() const {
    const bool in_memory = Groups > 1 && !sums_in_registers();
    return out_begin() + (in_memory ? sizeof(float) * kQueries * static_cast<size_t>(out_stride()) : 0);
  }
  // Maxima and sums of the four warps, then m, l and how old and new are weighed.
  static constexpr int kStatistics = 2 * kAttentionWarps + 4;
};

// How two parts of a softmax become one.
struct Fold {
  float old_weight, new_weight;
  GPTX_DEVICE Fold(float& m, float& l, float block_m, float block_l) {
    const float top = fmaxf(m, block_m);
    old_weight = expf(m - top);
    new_weight = expf(block_m - top);
    m = top;
    l = fmaf(l, old_weight, block_l * new_weight);
  }
  GPTX_DEVICE static float apply(float out, float old_weight, float block, float new_weight) {
    return fmaf(out, old_weight, block * new_weight);
  }
};

// One head, up to 8 * Groups queries.
template <class P, int Groups>
struct Attention {
  using O = Operand<P::kLaneWords>;
  static constexpr int kQueries = Groups * kRows;
  static constexpr int kAhead = 4;  // tiles that are loaded together: all of 64 inputs in bfloat16

  const AttentionTask& task;
  const QueryItem query;
  const int head;
  const KvLayout kv;
  const AttentionLayout<P, Groups> layout;
  std::byte* const shared;
  float* const maxima;  // [4 warps, queries]
  float* const sums;    // [4 warps, queries]

  GPTX_DEVICE Attention(const AttentionTask& t, int q, int h)
      : task(t),
        query(t.queries[q]),
        head(h),
        kv(t.cache.layout),
        layout{kv},
        shared(shared_memory()),
        maxima(reinterpret_cast<float*>(shared + layout.statistics_begin())),
        sums(maxima + kAttentionWarps * kQueries) {}

  GPTX_DEVICE float* state(int i) const { return sums + (kAttentionWarps + i) * kQueries; }

  // The queries as an operand, zeros where there are none.
  GPTX_DEVICE void load_queries() const {
    const int lines = kv.key_tiles() * kTileLines;
    for (int i = thread_index(); i < kQueries * lines; i += kAttentionThreads) {
      const int r = i / lines, line = i % lines;
      float x[P::kInputs];
#pragma unroll
      for (int e = 0; e < P::kInputs; ++e) {
        const int d = line * P::kInputs + e;
        const bool exists = r < query.rows && d < kv.head_size;
        x[e] = exists ? task.qkv.row(query.row + r)[3 * head * kv.head_width + d] : 0.0f;
      }
      store_line<P, Order::kFragments>(shared, P::round(x, RowScale{}, 0.0f), r, line, kv.key_tiles());
    }
    sync_block();
  }

  GPTX_DEVICE const std::byte* block(int b) const {
    return task.cache.head(task.cache.block_tables[query.table + b], head);
  }

  // Tiles from `first` on of a panel of a matrix, all on their way at once.
  GPTX_DEVICE void load(uint4 (&w)[kAhead], const std::byte* matrix, int panel, int tiles, int first = 0) const {
    const auto* const p = reinterpret_cast<const uint4*>(matrix) + (panel * tiles + first) * kWarp + lane_index();
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i < tiles) w[i] = p[i * kWarp];
    }
  }

  // The product of a panel with an operand in shared memory; `w` holds its first tiles. `mend(words, tile)` may change
  // what was loaded.
  template <class Mend>
  GPTX_DEVICE void multiply(float (&c)[Groups][4], uint4 (&w)[kAhead], const std::byte* matrix, int panel, int tiles,
                            const std::byte* operand, Mend mend) const {
    for (int first = 0; first < tiles; first += kAhead) {
      if (first > 0) load(w, matrix, panel, tiles, first);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (first + i >= tiles) break;
        mend(w[i], first + i);
#pragma unroll
        for (int g = 0; g < Groups; ++g) {
          const auto* const o = reinterpret_cast<const O*>(operand) + (g * tiles + first + i) * kWarp + lane_index();
          P::multiply_add(c[g], w[i], *o);
        }
      }
    }
  }

  // The weights of block b: exp(score - maximum of the block), as an operand, with maxima and sums of the warps. Keys are
  // in `keys`, and those of the next block are asked for as soon as they have been used.
  GPTX_DEVICE void weigh(int b, const std::byte* block, uint4 (&keys)[kAhead], const std::byte* next = nullptr) const {
    const auto* const key_scale = reinterpret_cast<const float*>(block + kv.scale_begin());
    const float* const value_scale = key_scale + kBlock;
    const int g = lane_index() / 4, t = lane_index() % 4;
    float c[Groups][4] = {};
    // A position is a row of this product, so what memory holds behind the last one stays there.
    multiply(c, keys, block, warp_index(), kv.key_tiles(), shared, [](uint4&, int) {});
    if (next != nullptr) load_keys(keys, next);

    const auto in_block = [&](int i) { return warp_index() * kPanel + g + i / 2 * 8; };
    const auto row_of = [&](int group, int i) { return group * kRows + t * 2 + i % 2; };
#pragma unroll
    for (int group = 0; group < Groups; ++group) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float s = c[group][i];
        if (kv.scaled) s *= key_scale[in_block(i)];
        const bool hidden = b * kBlock + in_block(i) > query.position + row_of(group, i);
        c[group][i] = hidden ? -INFINITY : s * task.scale;
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float top = fmaxf(c[group][i], c[group][i + 2]);
#pragma unroll
        for (int mask = 4; mask < kWarp; mask *= 2) top = fmaxf(top, shuffle_xor(top, mask));
        if (g == 0) maxima[warp_index() * kQueries + row_of(group, i)] = top;
      }
    }
    sync_block();
#pragma unroll
    for (int group = 0; group < Groups; ++group) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int r = row_of(group, i);
        const float top = block_maximum(r);
        const float near = expf(c[group][i] - top), far = expf(c[group][i + 2] - top);
        store_weight(r, in_block(i), near, value_scale);
        store_weight(r, in_block(i + 2), far, value_scale);
        float sum = near + far;
#pragma unroll
        for (int mask = 4; mask < kWarp; mask *= 2) sum += shuffle_xor(sum, mask);
        if (g == 0) sums[warp_index() * kQueries + r] = sum;
      }
    }
    sync_block();
  }

  GPTX_DEVICE float block_maximum(int r) const {
    float top = maxima[r];
    for (int w = 1; w < kAttentionWarps; ++w) top = fmaxf(top, maxima[w * kQueries + r]);
    return top;
  }
  GPTX_DEVICE float block_sum(int r) const {
    float sum = sums[r];
    for (int w = 1; w < kAttentionWarps; ++w) sum += sums[w * kQueries + r];
    return sum;
  }

  GPTX_DEVICE void store_weight(int r, int position, float weight, const float* value_scale) const {
    if (kv.scaled && weight != 0.0f) weight *= value_scale[position];  // of a hidden position it may be anything
    constexpr int kElement = kLaneBytes<P> / 2 / P::kInputs;  // bytes of an input
    std::byte* const p = shared + layout.weights_begin() +
                         operand_offset(r, position / P::kInputs, kv.value_tiles(), kLaneBytes<P>) +
                         position % P::kInputs * kElement;
    if constexpr (kElement == 4) {
      *reinterpret_cast<float*>(p) = weight;
    } else {
      *reinterpret_cast<uint16_t*>(p) = static_cast<uint16_t>(bf16_pair(weight, 0.0f));
    }
  }

  // The bits of a word of which the first n inputs are kept.
  GPTX_DEVICE static uint32_t first_inputs(int n) {
    if (n >= P::kInputs) return 0xffffffffu;
    return n <= 0 ? 0u : 0xffffffffu >> (32 - 32 / P::kInputs * n);
  }

  // Calls f(row, d, value, i) for the weighted values of block b; each element is always the same lane's, and with one
  // panel its i-th. `values` holds the first tiles of this warp's first panel.
  template <class F>
  GPTX_DEVICE void for_each_value(int b, const std::byte* block, uint4 (&values)[kAhead], F f) const {
    const std::byte* const matrix = block + kv.value_begin();
    // Behind the positions that the queries see memory may hold anything, and 0 * NaN is NaN; bytes are always numbers.
    const int seen = query.position + query.rows - b * kBlock;
    const auto hide_unseen = [&](uint4& w, int tile) {
      if (P::kInputs == 4 || seen >= kBlock) return;
      const int rest = seen - (tile * kTileLines + lane_index() % 4) * P::kInputs;
      const uint32_t near = first_inputs(rest), far = first_inputs(rest - kTileLines / 2 * P::kInputs);
      w = {w.x & near, w.y & near, w.z & far, w.w & far};
    };
    for (int panel = warp_index(); panel < kv.head_width / kPanel; panel += kAttentionWarps) {
      float c[Groups][4] = {};
      if (panel != warp_index()) load(values, matrix, panel, kv.value_tiles());
      multiply(c, values, matrix, panel, kv.value_tiles(), shared + layout.weights_begin(), hide_unseen);
      for_each_element(panel, [&](int r, int d, int i) { f(r, d, c[i / 4][i % 4], i); });
    }
  }

  // Calls f(row, d, i) for the elements of a panel that are this lane's.
  template <class F>
  GPTX_DEVICE void for_each_element(int panel, F f) const {
#pragma unroll
    for (int i = 0; i < Groups * 4; ++i) {
      f(i / 4 * kRows + lane_index() % 4 * 2 + i % 2, panel * kPanel + lane_index() / 4 + i % 4 / 2 * 8, i);
    }
  }

  GPTX_DEVICE void load_keys(uint4 (&keys)[kAhead], const std::byte* block) const {
    load(keys, block, warp_index(), kv.key_tiles());
  }
  GPTX_DEVICE void load_values(uint4 (&values)[kAhead], const std::byte* block) const {
    if (warp_index() < kv.head_width / kPanel) load(values, block + kv.value_begin(), warp_index(), kv.value_tiles());
  }

  GPTX_DEVICE ValueColumn column(int d) const {
    const int n = head * kv.head_size + d;
    return task.rounded.operands == nullptr ? task.out.column(n) : task.rounded.column(n);
  }
  GPTX_DEVICE void write(int r, int d, float out, float l) const {
    if (d < kv.head_size) column(d).store(query.out_row + r, divide(out, l));
  }
};

// Many queries: one block of threads goes through the KV blocks. x queries, y heads.
template <class P, int Groups, bool kInRegisters>
GPTX_KERNEL void __launch_bounds__(kAttentionThreads, 2) attend_many(AttentionTask task) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  // Late positions see the most: they go first, so that no long piece is left for the end.
  const Attention<P, Groups> attention(task, grid_x() - 1 - block_x(), block_y());
  constexpr int kQueries = Groups * kRows;
  const int width = attention.kv.head_width, stride = attention.layout.out_stride();
  float* const m = attention.state(0);
  float* const l = attention.state(1);
  float* const old_weight = attention.state(2);
  float* const new_weight = attention.state(3);
  auto* const out = reinterpret_cast<float*>(attention.shared + attention.layout.out_begin());
  float own[kInRegisters ? Groups * 4 : 1] = {};
  if constexpr (!kInRegisters) {
    for (int i = thread_index(); i < kQueries * stride; i += kAttentionThreads) out[i] = 0.0f;
  }
  for (int r = thread_index(); r < kQueries; r += kAttentionThreads) {
    m[r] = -INFINITY;
    l[r] = 0.0f;
  }
  constexpr bool kAhead = AttentionLayout<P, Groups>::kSpareRegisters;
  const int blocks = attention.query.position / kBlock + 1;
  const std::byte* block = attention.block(0);
  uint4 keys[attention.kAhead], values[attention.kAhead];
  const auto load_block = [&] {
    attention.load_keys(keys, block);
    attention.load_values(values, block);
  };
  if (kAhead) load_block();
  attention.load_queries();
  for (int b = 0; b < blocks; ++b) {
    const std::byte* const next = b + 1 < blocks ? attention.block(b + 1) : nullptr;
    if (!kAhead) load_block();
    attention.weigh(b, block, keys, kAhead ? next : nullptr);
    for (int r = thread_index(); r < kQueries; r += kAttentionThreads) {
      const Fold fold(m[r], l[r], attention.block_maximum(r), attention.block_sum(r));
      old_weight[r] = fold.old_weight;
      new_weight[r] = fold.new_weight;
    }
    sync_block();
    attention.for_each_value(b, block, values, [&](int r, int d, float value, int i) {
      float& o = kInRegisters ? own[kInRegisters ? i : 0] : out[r * stride + d];
      o = Fold::apply(o, old_weight[r], value, new_weight[r]);
    });
    if (kAhead && next != nullptr) attention.load_values(values, next);
    block = next;
  }
  if constexpr (kInRegisters) {
    // A lane has two numbers of its rows.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int number = warp_index() * kPanel + lane_index() / 4 + half * 8;
      if (number >= attention.kv.head_size) return;
      const ValueColumn column = attention.column(number);
      attention.for_each_element(warp_index(), [&](int r, int d, int i) {
        if (d == number && r < attention.query.rows) column.store(attention.query.out_row + r, divide(own[i], l[r]));
      });
    }
  } else {
    sync_block();
    for (int i = thread_index(); i < attention.query.rows * width; i += kAttentionThreads) {
      attention.write(i / width, i % width, out[i / width * stride + i % width], l[i / width]);
    }
  }
}

// Few queries, up to 8: a block of threads for each KV block; the last one to finish folds. x blocks, y heads, z queries.
template <class P>
GPTX_KERNEL void __launch_bounds__(kAttentionThreads, 8) attend_few(AttentionTask task) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const Attention<P, 1> attention(task, block_z(), block_y());
  const int blocks = attention.query.position / kBlock + 1;
  if (block_x() >= blocks) return;
  const int width = attention.kv.head_width;
  const int pair = block_z() * task.cache.heads + block_y();
  const int rows = task.few_rows;
  const int stride = rows * (width + 2);
  float* const partials = task.partials + static_cast<size_t>(pair) * static_cast<size_t>(grid_x() * stride);
  float* const mine = partials + block_x() * stride;
  const std::byte* const block = attention.block(block_x());
  uint4 keys[attention.kAhead], values[attention.kAhead];
  attention.load_keys(keys, block);
  attention.load_values(values, block);
  attention.load_queries();
  attention.weigh(block_x(), block, keys);
  if (blocks == 1) {
    attention.for_each_value(0, block, values, [&](int r, int d, float value, int) {
      if (r >= attention.query.rows) return;
      float m = -INFINITY, l = 0.0f;
      const Fold fold(m, l, attention.block_maximum(r), attention.block_sum(r));
      attention.write(r, d, Fold::apply(0.0f, fold.old_weight, value, fold.new_weight), l);
    });
    return;
  }
  attention.for_each_value(block_x(), block, values, [&](int r, int d, float value, int) {
    if (r < rows) mine[r * width + d] = value;
  });
  if (thread_index() < rows) {
    mine[rows * width + thread_index()] = attention.block_maximum(thread_index());
    mine[rows * (width + 1) + thread_index()] = attention.block_sum(thread_index());
  }
  sync_block();
  auto* const last = reinterpret_cast<int*>(attention.maxima);
  if (thread_index() == 0) {
    *last = take_ticket(task.tickets + pair) == static_cast<uint32_t>(blocks - 1);
    if (*last) task.tickets[pair] = 0;
  }
  sync_block();
  if (!*last) return;
  for (int i = thread_index(); i < attention.query.rows * width; i += kAttentionThreads) {
    const int r = i / width;
    float m = -INFINITY, l = 0.0f, out = 0.0f;
    for (int b = 0; b < blocks; ++b) {
      const float* const part = partials + b * stride;
      const Fold fold(m, l, part[rows * width + r], part[rows * (width + 1) + r]);
      out = Fold::apply(out, fold.old_weight, part[i], fold.new_weight);
    }
    attention.write(r, i % width, out, l);
  }
}

}  // namespace gptx::cuda
