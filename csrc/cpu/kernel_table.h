// What an ISA supplies: plain functions on plain pointers. Dispatch, tests and benchmarks go through
// this table, so a kernel that is not in it does not exist. Sixteen virtual lanes, explicit fused
// multiply-adds and fixed orders of summation: an entry gives the same bits on every ISA. The one
// exception is the bfloat16 dot product of the hardware, which flushes subnormal numbers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/precision.h"

namespace gptx::cpu {

// Output columns of a packed panel, positions per K panel.
inline constexpr size_t kPanel = 16;
// One step of one panel: 16 outputs by 1 float32, 2 bfloat16 or 4 int8 inputs.
inline constexpr size_t kLineBytes = 64;
// Positions of a KV block; attention works block by block, counted from position 0.
inline constexpr size_t kBlock = 64;

constexpr size_t round_up(size_t n, size_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

enum class Activation : uint8_t { kNone, kGeluNew, kGelu, kRelu };

// Inputs in one line of a panel; rows of activations are padded to it.
constexpr size_t inputs_per_line(Precision precision) {
  constexpr size_t kInputs[kPrecisions] = {1, 2, 4, 4};
  return kInputs[static_cast<size_t>(precision)];
}

// What one row of activations was divided by, and the integer that stands for 0.
struct RowScale {
  float scale;
  int32_t zero;
};

// Bytes of an operand row for each input, at most.
inline constexpr size_t kOperandBytes = 4;
// The longest row whose int8 products fit an int32 sum: 255 * 127 * 65536 < 2^31.
inline constexpr size_t kMaxInt8Depth = 65536;

// out = f(act * weight^T + bias), or out += act * weight^T + bias where `add` is set.
// Each output is summed in one order, k ascending, for any number of rows (linear.h).
struct LinearTask {
  float* out;                // [rows, out_stride], whole panels are written
  size_t out_stride;
  const std::byte* act;      // [rows, act_stride], rows that `operand` wrote
  size_t act_stride;         // bytes
  const RowScale* act_scale; // [rows]
  const std::byte* panels;   // [N/16, lines, 64 bytes]
  const float* scale;        // [N], int8 only
  const int32_t* colsum;     // [N], int8 only
  const float* bias;         // [N]
  size_t rows;
  size_t depth;              // K
  Activation activation;
  bool add;
};

// Lines that a step of a probe of the arithmetic peak multiplies.
inline constexpr int kProbeLines = 120;

// The matmul of one precision.
struct MatmulKernels {
  // Writes the n floats of x as an operand row, zeros up to the end of the last line.
  RowScale (*operand)(std::byte* out, const float* x, size_t n) noexcept;
  // The columns of panels [panel_begin, panel_end).
  void (*linear)(const LinearTask& task, size_t panel_begin, size_t panel_end) noexcept;
  // The yardstick: `steps` times the multiply-adds of kProbeLines lines by one row, in registers.
  float (*probe)(size_t steps) noexcept;
};

// Rows that attention takes through a block together, at most.
inline constexpr size_t kMaxAttentionRows = 8;

// Floats of scratch that attention wants for heads of `width` columns, a multiple of 16.
constexpr size_t attention_scratch(size_t width) {
  return kMaxAttentionRows * (3 * width + 2 * kBlock);
}

// Causal attention of one head for `rows` consecutive positions inside one KV block. E is the type
// of the cache, G the positions or dimensions of one line: 1 float32, 2 bfloat16 or 4 int8.
struct AttentionTask {
  float* out;                      // [rows, out_stride], the first head_size columns are written
  size_t out_stride;
  const float* query;              // [rows, query_stride]
  size_t query_stride;
  // For each block: K E[64/16, D/G, 16, G], V E[Dp/16, 64/G, 16, G]; of int8 the scales of K and V [2, 64].
  const std::byte* const* blocks;
  const std::byte* next;           // the block that is wanted afterwards, to be fetched
  size_t position;                 // of the first row
  size_t rows;
  size_t head_size;
  float scale;
  float* scratch;  // attention_scratch floats, aligned to 64 bytes
};

// Bytes of K and V of one head in one block, for heads of `width` columns, a multiple of 16.
constexpr size_t kv_head_bytes(KvType type, size_t width) {
  switch (type) {
    case KvType::kFloat32: return 2 * kBlock * width * 4;
    case KvType::kBFloat16: return 2 * kBlock * width * 2;
    case KvType::kInt8: return 2 * kBlock * (width + sizeof(float));
  }
  return 0;
}

// Attention on one type of cache.
struct AttentionKernels {
  void (*attention)(const AttentionTask& task) noexcept;
  // Write K or V of one head at one position into its block; positions come in order.
  void (*append_key)(std::byte* block, const float* key, size_t position,
                     size_t head_size) noexcept;
  void (*append_value)(std::byte* block, const float* value, size_t position,
                       size_t head_size) noexcept;
};

struct KernelTable {
  const char* name;

  MatmulKernels matmul[kPrecisions];
  AttentionKernels attention[kKvTypes];

  const MatmulKernels& operator[](Precision p) const { return matmul[static_cast<size_t>(p)]; }
  const AttentionKernels& operator[](KvType t) const { return attention[static_cast<size_t>(t)]; }

  // out = (x - mean) / sqrt(variance + epsilon) * gain + bias over the n columns of one row.
  void (*layer_norm)(float* out, const float* x, const float* gain, const float* bias, size_t n,
                     float epsilon) noexcept;

  // y[i] = f(x[i]); exp_f32 is e^x on [-87, 88].
  void (*activate_f32)(float* y, const float* x, size_t n, Activation activation) noexcept;
  void (*exp_f32)(float* y, const float* x, size_t n) noexcept;
  // The sum of exp(x[i] - shift), differences from -87 to 88; below them e^-87 stands for what is next to nothing.
  double (*sum_exp)(const float* x, size_t n, float shift) noexcept;

  // The yardstick of memory: one read of n floats, a multiple of 64.
  float (*probe_read)(const float* data, size_t n) noexcept;
};

}  // namespace gptx::cpu
