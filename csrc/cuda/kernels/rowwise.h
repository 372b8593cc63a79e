// What is done to one row at a time: layer norm, rounding to operands.
#pragma once

#include "cuda/kernels/products.h"
#include "cuda/kernels/vocabulary.h"
#include "cuda/layout.h"

namespace gptx::cuda {

// Floats in the order of unsigned integers.
GPTX_DEVICE uint32_t key_of(float x) {
  const uint32_t bits = as_bits(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
GPTX_DEVICE float float_of_key(uint32_t key) {
  return as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}
GPTX_DEVICE bool is_finite(float x) { return fabsf(x) <= 3.4028234e38f; }

// What the first of the largest of some values has more of than the others; what is not finite has the most.
inline constexpr uint64_t kNotFinite = ~uint64_t{0};
GPTX_DEVICE uint64_t rank_of(float x, int index) {
  if (!is_finite(x)) return kNotFinite;
  return uint64_t{key_of(x)} << 32 | (0xffffffffu - static_cast<uint32_t>(index));
}
GPTX_DEVICE int32_t index_of_rank(uint64_t rank) {
  return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(rank));
}

// The sum over the lanes of a warp, in one order for all.
GPTX_DEVICE float warp_sum(float x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}
GPTX_DEVICE float warp_max(float x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x = fmaxf(x, shuffle_xor(x, mask));
  return x;
}

template <int N>
struct alignas(N * 4) Floats {
  float x[N];
};

// What is made of a row before it is multiplied.
struct Norm {
  const float* gain;  // [C]; null: the row as it is
  const float* bias;
  float epsilon;
};

// What a row is normalized and rounded with.
struct RowStatistics {
  float mean = 0.0f, inverse_deviation = 1.0f;
  RowScale scale = {1.0f, 0};
  float inverse_scale = 0.0f;
};

// x -> (x - mean) / sqrt(variance + epsilon) * gain + bias (Ba et al., 2016).
GPTX_DEVICE float normal_value(float x, const Norm& norm, const RowStatistics& s, int i) {
  return norm.gain == nullptr ? x : fmaf((x - s.mean) * s.inverse_deviation, norm.gain[i], norm.bias[i]);
}

// A row whose values span less than this is a row of zeros.
inline constexpr float kSmallest = 0x1p-100f;

// One warp together.
template <class P>
GPTX_DEVICE RowStatistics row_statistics(const float* x, const Norm& norm, int columns) {
  RowStatistics s;
  if (norm.gain != nullptr) {
    float sum = 0.0f;
    for (int i = lane_index(); i < columns; i += kWarp) sum += x[i];
    s.mean = warp_sum(sum) / static_cast<float>(columns);
    float squares = 0.0f;
    for (int i = lane_index(); i < columns; i += kWarp) squares = fmaf(x[i] - s.mean, x[i] - s.mean, squares);
    s.inverse_deviation = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(columns) + norm.epsilon);
  }
  if constexpr (P::kScaledRows) {
    float least = 0.0f, most = 0.0f, check = 0.0f;
    for (int i = lane_index(); i < columns; i += kWarp) {
      const float value = normal_value(x[i], norm, s, i);
      least = fminf(least, value);
      most = fmaxf(most, value);
      check = fmaf(value, 0.0f, check);  // NaN if anything is not finite
    }
    least = -warp_max(-least);
    const float range = warp_max(most) - least + warp_sum(check);
    s.scale.scale = range < kSmallest ? 0.0f : range / 255.0f;
    if (range >= kSmallest) {
      s.inverse_scale = 255.0f / range;
      s.scale.zero = round_to_int(-least * s.inverse_scale);
    }
  }
  return s;
}

// The inputs of line `line`, zeros behind the end of the row. Rows begin at multiples of 16 bytes.
template <class P>
GPTX_DEVICE void load_line(float (&value)[P::kInputs], const float* x, int line, int columns) {
  const int k = line * P::kInputs;
  if (k + P::kInputs <= columns) {
    const auto whole = *reinterpret_cast<const Floats<P::kInputs>*>(x + k);
#pragma unroll
    for (int e = 0; e < P::kInputs; ++e) value[e] = whole.x[e];
    return;
  }
#pragma unroll
  for (int e = 0; e < P::kInputs; ++e) value[e] = k + e < columns ? x[k + e] : 0.0f;
}

// Who multiplies an operand decides how it lies.
enum class Order { kFragments, kCores };

GPTX_DEVICE void store_value(std::byte* p, bool is_float, float value) {
  if (is_float) {
    *reinterpret_cast<float*>(p) = value;
  } else {
    *reinterpret_cast<uint16_t*>(p) = static_cast<uint16_t>(bf16_pair(value, 0.0f));
  }
}

// One value of every row, as a float or in bfloat16.
struct ValueColumn {
  std::byte* first;  // of row 0
  size_t to_next_row, to_next_group;  // of 8 rows
  bool is_float;

  GPTX_DEVICE void store(int row, float value) const {
    std::byte* const p = first + static_cast<size_t>(row / kRows) * to_next_group +
                         static_cast<size_t>(row % kRows) * to_next_row;
    store_value(p, is_float, value);
  }
};

// Rows that only another product reads, as its operands.
struct RoundedRows {
  std::byte* operands = nullptr;  // [groups of 8 rows, tiles]; null: the rows are floats
  int tiles = 0;
  int inputs = 0;  // of a word of weights
  Order order = Order::kFragments;

  GPTX_DEVICE ValueColumn column(int k) const {
    const int line = line_of(k, inputs), word = (k & (inputs - 1)) / 2, lane_bytes = inputs == 4 ? 16 : 8;
    const bool cores = order == Order::kCores;
    const auto offset = [&](int row) {
      return cores ? core_offset(row, line, word, tiles, lane_bytes)
                   : operand_offset(row, line, tiles, lane_bytes) + static_cast<size_t>(word * 4);
    };
    const size_t half = inputs == 1 ? 0 : static_cast<size_t>(k % 2 * 2);
    return {operands + offset(0) + half, offset(1) - offset(0), offset(kRows) - offset(0), inputs == 1};
  }
};

// The words of a line of row `row`.
template <class P, Order kOrder>
GPTX_DEVICE void store_line(std::byte* operands, const Operand<P::kLaneWords / 2>& words, int row, int line, int tiles) {
  if constexpr (kOrder == Order::kFragments) {
    *reinterpret_cast<Operand<P::kLaneWords / 2>*>(operands + operand_offset(row, line, tiles, kLaneBytes<P>)) = words;
  } else {
#pragma unroll
    for (int i = 0; i < P::kLaneWords / 2; ++i) {
      *reinterpret_cast<uint32_t*>(operands + core_offset(row, line, i, tiles, kLaneBytes<P>)) = words.word[i];
    }
  }
}

// A row as operand `row`, zeros behind its end, by `threads` threads of which this is number `thread`. Several lines are
// loaded before the first is stored.
template <class P, Order kOrder>
GPTX_DEVICE void write_operand(std::byte* operands, const float* x, const Norm& norm, const RowStatistics& s, int row,
                               int columns, int tiles, int thread, int threads) {
  constexpr int kTogether = 4;
  const int lines = tiles * kTileLines;
  for (int first = thread; first < lines; first += kTogether * threads) {
    float value[kTogether][P::kInputs];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int line = first + i * threads;
      if (line < lines) load_line<P>(value[i], x, line, columns);
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int line = first + i * threads;
      if (line >= lines) break;
      if (norm.gain != nullptr) {
#pragma unroll
        for (int e = 0; e < P::kInputs; ++e) {
          const int k = line * P::kInputs + e;
          if (k < columns) value[i][e] = normal_value(value[i][e], norm, s, k);
        }
      }
      store_line<P, kOrder>(operands, P::round(value[i], s.scale, s.inverse_scale), row, line, tiles);
    }
  }
}

// Rows of floats [rows, stride] in device memory.
struct RowsView {
  float* data;
  int stride;
  uint64_t* maxima = nullptr;  // [rows, blocks of threads], where the largest values of what is stored are asked for
  constexpr float* row(int i) const { return data + static_cast<size_t>(i) * static_cast<size_t>(stride); }
  GPTX_DEVICE ValueColumn column(int k) const {
    const size_t bytes = static_cast<size_t>(stride) * sizeof(float);
    return {reinterpret_cast<std::byte*>(data + k), bytes, kRows * bytes, true};
  }
};

// Operands of many rows: a warp for each.
template <class P, Order kOrder>
GPTX_KERNEL void make_operands(std::byte* operands, RowScale* scales, RowsView in, Norm norm, int rows,
                               int columns, int tiles) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int row = block_x() * warp_count() + warp_index();
  if (row >= rows) return;
  const RowStatistics statistics = row_statistics<P>(in.row(row), norm, columns);
  write_operand<P, kOrder>(operands, in.row(row), norm, statistics, row, columns, tiles, lane_index(), kWarp);
  if (lane_index() == 0) scales[row] = statistics.scale;
}

}  // namespace gptx::cuda
