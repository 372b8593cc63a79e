// What the kernels for many rows share: how a block of threads gets its tiles, and what becomes of its sums.
#pragma once

#include "cuda/kernels/linear.h"

namespace gptx::cuda {

// `Tiles` tiles of all panels of a block in shared memory, and behind them those of all its groups of 8 rows: what the
// threads of a block copy at a time, 16 bytes each, stage after stage.
template <class P, int Panels, int Groups, int Tiles, int Threads>
class Stages {
 public:
  static constexpr size_t kOperands = size_t{Tiles} * Panels * kTileBytes;
  static constexpr size_t kBytes = kOperands + Tiles * Groups * kOperandTileBytes<P>;

  GPTX_DEVICE Stages(const LinearTask& task, int first_panel, int first_group)
      : panels_(reinterpret_cast<const std::byte*>(task.weights), first_panel, task.panels, task.tiles),
        groups_(task.operands, first_group, ceil_div(task.rows, kRows), task.tiles) {}

  // Ask for the next stage, which is number `stage`. Tiles behind the last one are zeros. Panels and groups behind the
  // last ones are not copied: what memory holds there only reaches sums that nobody writes.
  GPTX_DEVICE void fetch_panels(std::byte* to, int stage, int tiles) { panels_.fetch(to, tiles - stage * Tiles); }
  GPTX_DEVICE void fetch_groups(std::byte* to, int stage, int tiles) {
    groups_.fetch(to + kOperands, tiles - stage * Tiles);
  }

 private:
  // `Count` panels or groups, of which a thread has the same 16 bytes in every kApart-th.
  template <int Count, int TileBytes>
  class Part {
   public:
    GPTX_DEVICE Part(const std::byte* all, int first, int total, int tiles) {
      const int which = thread_index() / kCopies, bytes = tiles * TileBytes;
      from_ = all + static_cast<size_t>(first + which) * static_cast<size_t>(bytes) +
              static_cast<size_t>(thread_index() % kCopies * 16);
      apart_ = kApart * static_cast<size_t>(bytes);
      exist_ = ceil_div(min(Count, total - first) - which, kApart);
    }

    GPTX_DEVICE void fetch(std::byte* to, int tiles) {
      const bool within = thread_index() % kCopies * 16 / TileBytes < tiles;
#pragma unroll
      for (int i = 0; i < ceil_div(Count, kApart); ++i) {
        if (i < exist_) copy_16_bytes_async(to + (i * Threads + thread_index()) * 16, from_ + i * apart_, within);
      }
      from_ += Tiles * TileBytes;
    }

   private:
    static constexpr int kCopies = Tiles * TileBytes / 16;  // of a panel or group
    static constexpr int kApart = Threads / kCopies;
    static_assert(Threads % kCopies == 0);
    const std::byte* from_;
    size_t apart_;
    int exist_;
  };

  Part<Panels, kTileBytes> panels_;
  Part<Groups, static_cast<int>(kOperandTileBytes<P>)> groups_;
};

// Stages in turn, each in one of `Count` places in shared memory, asked for `Ahead` stages before they are used.
template <class Tiles, int Count, int Ahead>
class StageRing {
 public:
  GPTX_DEVICE StageRing(const LinearTask& task, std::byte* shared, int first_panel, int first_group, int stages)
      : tiles_(task, first_panel, first_group), shared_(shared), depth_(task.tiles), stages_(stages) {}

  GPTX_DEVICE std::byte* place(int stage) const {
    return shared_ + static_cast<size_t>(stage % Count) * Tiles::kBytes;
  }

  // Weights do not depend on the kernel in front: the first ones are on their way while it ends.
  GPTX_DEVICE void begin() {
    for (int stage = 0; stage < Ahead; ++stage) fetch_panels(stage);
    wait_for_previous_kernel();
    for (int stage = 0; stage < Ahead; ++stage) fetch_groups(stage);
  }
  // Asks for the stage behind those that are on their way.
  GPTX_DEVICE void go_on(int stage) {
    fetch_panels(stage + Ahead);
    fetch_groups(stage + Ahead);
  }

 private:
  GPTX_DEVICE void fetch_panels(int stage) {
    if (stage < stages_) tiles_.fetch_panels(place(stage), stage, depth_);
  }
  GPTX_DEVICE void fetch_groups(int stage) {
    if (stage < stages_) tiles_.fetch_groups(place(stage), stage, depth_);
    close_async_group();
  }

  Tiles tiles_;
  std::byte* shared_;
  int depth_, stages_;
};

// The sums of a warp, of `Panels` panels from `first_panel` on by `Groups` groups from `first_group` on, in its part of
// shared memory, so that the lanes can share out the outputs as suits the place where they go.
template <class P, int Panels, int Groups>
struct WarpSums {
  using Sum = typename P::Sum;
  // The lanes of an output are 20 words from those of the next, so that rows and outputs spread over the banks.
  static constexpr int kOutput = 20, kFragment = 8 * kOutput + 16;
  static constexpr size_t kBytes = sizeof(Sum) * Panels * Groups * kFragment;
  static_assert(Groups % 2 == 0);  // groups are written in pairs

  const LinearTask& task;
  Sum* sums;
  int first_panel, first_group;

  GPTX_DEVICE WarpSums(const LinearTask& t, const Sum (&total)[Panels][Groups][4], std::byte* shared, int panel, int group)
      : task(t),
        sums(reinterpret_cast<Sum*>(shared) + warp_index() * Panels * Groups * kFragment),
        first_panel(panel),
        first_group(group) {
#pragma unroll
    for (int p = 0; p < Panels; ++p) {
#pragma unroll
      for (int g = 0; g < Groups; ++g) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sums[(p * Groups + g) * kFragment + lane_index() / 4 * kOutput + lane_index() % 4 * 4 + i] = total[p][g][i];
        }
      }
    }
    sync_warp();
  }

  // Of output 0 to 15 of a panel, and row 0 to 7 of a group.
  GPTX_DEVICE Sum at(int panel, int group, int output, int row) const {
    return sums[(panel * Groups + group) * kFragment + output % 8 * kOutput + row / 2 * 4 + row % 2 + output / 8 * 2];
  }

  GPTX_DEVICE RowScale scale_of(int row) const {
    if constexpr (P::kScaledRows) return task.scales[row];
    return {};
  }

  template <Order kOrder>
  GPTX_DEVICE void write() const {
    switch (task.out.kind) {
      case Output::kStore:
      case Output::kAdd: return for_each_panel([&](int p) { write_floats(p); });
      case Output::kRound:
        if constexpr (kOrder == Order::kCores && !P::kScaledRows) {
          return for_each_panel([&](int p) { write_cores(p); });
        } else {
          return for_each_panel([&](int p) { write_pairs(p); });
        }
      case Output::kQkv: return write_qkv();
    }
  }

  template <class F>
  GPTX_DEVICE void for_each_panel(F f) const {
#pragma unroll 1
    for (int p = 0; p < Panels; ++p) {
      if ((first_panel + p) * kPanel < task.out.columns) f(p);
    }
  }

  // 16 bytes of a row at a time. What lies behind the last column, up to a multiple of 32, belongs to nobody.
  GPTX_DEVICE void write_floats(int p) const {
    const int r = lane_index() / 4, output = lane_index() % 4 * 4;
    const int n = (first_panel + p) * kPanel + output;
    const bool adds = task.out.kind == Output::kAdd;
    Column column[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) column[i] = task.columns.at(n + i);
    const auto place = [&](int g) {
      return reinterpret_cast<Floats<4>*>(task.out.rows.row((first_group + g) * kRows + r) + n);
    };
    const auto exists = [&](int g) { return (first_group + g) * kRows + r < task.rows; };
    constexpr int kTogether = Groups % 4 == 0 ? 4 : 2;
#pragma unroll 1
    for (int base = 0; base < Groups; base += kTogether) {
      Floats<4> present[kTogether] = {};
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        if (adds && exists(base + i)) present[i] = *place(base + i);
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        if (!exists(base + i)) break;
        const RowScale scale = scale_of((first_group + base + i) * kRows + r);
        float value[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) value[e] = P::finish(at(p, base + i, output + e, r), scale, column[e]);
        activate(task.out.activation, value);
#pragma unroll
        for (int e = 0; e < 4; ++e) value[e] = adds ? present[i].x[e] + value[e] : value[e];
        *place(base + i) = {{value[0], value[1], value[2], value[3]}};
      }
    }
  }

  // 16 bytes of a core matrix at a time, 8 inputs of the next product; half of the lanes have the odd groups.
  GPTX_DEVICE void write_cores(int p) const {
    const int r = lane_index() % 8, half = lane_index() / 8 % 2;
    constexpr bool kWords = P::kInputs == 4;  // a line is two words, each in a core matrix of its own
    const auto output_of = [&](int i) { return kWords ? i / 2 * 4 + half * 2 + i % 2 : half * 8 + i; };
    const int panel = first_panel + p;
    Column column[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) column[i] = task.columns.at(panel * kPanel + output_of(i));
    const int line = kWords ? panel * 4 : panel * 8 + half * 4;
#pragma unroll 1
    for (int g = lane_index() / 16; g < Groups; g += 2) {
      const int row = (first_group + g) * kRows + r;
      if (row >= task.rows) break;
      float value[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) value[i] = P::finish(at(p, g, output_of(i), r), {}, column[i]);
      activate(task.out.activation, value);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (panel * kPanel + output_of(i) >= task.out.columns) value[i] = 0.0f;
      }
      const RoundedRows& out = task.out.rounded;
      *reinterpret_cast<Operand<4>*>(out.operands +
                                     core_offset(row, line, kWords ? half : 0, out.tiles, kLaneBytes<P>)) = {
          {bf16_pair(value[0], value[1]), bf16_pair(value[2], value[3]), bf16_pair(value[4], value[5]),
           bf16_pair(value[6], value[7])}};
    }
  }

  // Queries, and what a cache in int8 is made of, are rows of floats. Keys and values go to the cache in bfloat16 16
  // positions at a time where rows are a tile of it, as those of a prompt at the beginning of a step.
  GPTX_DEVICE void write_qkv() const {
    const CacheView& cache = task.out.cache;
    // Each lane looks where the rows of one pair of groups go, so that the warp waits once.
    static_assert(Groups / 2 <= kWarp);
    RowPlace mine = {-1, 0};
    const int row = (first_group + 2 * lane_index()) * kRows;
    if (cache.layout.inputs == 2 && lane_index() < Groups / 2 && row + 2 * kRows <= task.rows) {
      const RowPlace first = task.out.place_of(row), last = task.out.place_of(row + 2 * kRows - 1);
      const bool tile = first.position % kPanel == 0 && last.block == first.block &&
                        last.position == first.position + 2 * kRows - 1;
      if (tile) mine = first;
    }
    for_each_panel([&](int p) {
      const QkvColumn where = task.out.column_of((first_panel + p) * kPanel);
      if (where.part == 0 || cache.layout.scaled) return write_floats(p);
      if (where.part == 1) {
        write_tiles<true>(p, where, mine);
      } else {
        write_tiles<false>(p, where, mine);
      }
#pragma unroll 1
      for (int g = 0; g < Groups; g += 2) {
        if (shuffle(mine.block, g / 2) < 0) write_pair(p, g);
      }
    });
  }

  // The tiles of the cache in a panel of keys, or of values; lane i knows where pair i of groups goes, if it is one.
  template <bool kKeys>
  GPTX_DEVICE void write_tiles(int p, const QkvColumn& where, const RowPlace& mine) const {
    constexpr int kColumns = kKeys ? 4 : 2;  // outputs that a lane writes
    const auto output_of = [](int i) {
      return kKeys ? lane_index() % 4 * 2 + i % 2 + i / 2 * 8 : lane_index() / 4 + i * 8;
    };
    Column column[kColumns];
#pragma unroll
    for (int i = 0; i < kColumns; ++i) column[i] = task.columns.at((first_panel + p) * kPanel + output_of(i));
    const KvLayout& kv = task.out.cache.layout;
#pragma unroll 1
    for (int g = 0; g < Groups; g += 2) {
      const RowPlace place = {shuffle(mine.block, g / 2), shuffle(mine.position, g / 2)};
      if (place.block < 0) continue;
      // 16 outputs of 16 positions, 16 bytes a lane: lines t, t, t + 4 and t + 4 of a fragment. The words of a key hold
      // neighbouring numbers of a position, those of a value neighbouring positions of a number.
      const auto word = [&](int i) {
        float value[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int c = kKeys ? i / 2 * 2 + e : i % 2;
          const int position = kKeys ? lane_index() / 4 + i % 2 * 8 : lane_index() % 4 * 2 + e + i / 2 * 8;
          const RowScale scale = scale_of((first_group + g) * kRows + position);
          const float x = P::finish(at(p, g + position / 8, output_of(c), position % 8), scale, column[c]);
          value[e] = where.d + output_of(c) < kv.head_size ? finite_or_zero(x) : 0.0f;
        }
        return bf16_pair(value[0], value[1]);
      };
      const int tile = kKeys ? place.position / kPanel * kv.key_tiles() + where.d / kPanel
                             : where.d / kPanel * kv.value_tiles() + place.position / kPanel;
      std::byte* const to = task.out.cache.head(place.block, where.head) + (kKeys ? 0 : kv.value_begin()) +
                            static_cast<size_t>(tile) * kTileBytes;
      reinterpret_cast<Operand<4>*>(to)[lane_index()] = {{word(0), word(1), word(2), word(3)}};
    }
  }

  GPTX_DEVICE void write_pairs(int p) const {
#pragma unroll 1
    for (int g = 0; g < Groups; g += 2) write_pair(p, g);
  }

  // Two groups one by one: a lane has one output of one of them.
  GPTX_DEVICE void write_pair(int p, int pair) const {
    const int output = lane_index() % kPanel, g = pair + lane_index() / kPanel;
    const int n = (first_panel + p) * kPanel + output;
    if (n >= task.out.columns) return;
    const Column column = task.columns.at(n);
    const QkvColumn where = task.out.column_of(n);
    const int first_row = (first_group + g) * kRows;
    RowPlace places[kRows];
    float value[kRows] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int row = first_row + r;
      if (row >= task.rows) break;
      places[r] = task.out.place_of(row);
      value[r] = P::finish(at(p, g, output, r), scale_of(row), column);
    }
    activate(task.out.activation, value);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (first_row + r >= task.rows) break;
      task.out.write(first_row + r, n, where, value[r], 0.0f, places[r]);
    }
  }
};

}  // namespace gptx::cuda
