// What an ISA supplies: plain functions on plain pointers. Dispatch, tests and benchmarks go through
// this table, so a kernel that is not in it does not exist. Every entry gives the same bits on
// every ISA: sixteen virtual lanes, explicit fused multiply-adds, fixed orders of summation.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gptx::cpu {

// Output columns of a packed panel, positions per K panel.
inline constexpr size_t kPanel = 16;
// Positions of a KV block; attention works block by block, counted from position 0.
inline constexpr size_t kBlock = 64;

constexpr size_t round_up(size_t n, size_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

enum class Activation : uint8_t { kNone, kGeluNew, kGelu, kRelu };

// out = f(act * weight^T + bias), or out += act * weight^T + bias where `add` is set.
// Each output is summed in one order, k ascending, for any number of rows (matmul_f32.h).
struct LinearF32 {
  float* out;           // [rows, out_stride], whole panels are written
  size_t out_stride;
  const float* act;     // [rows, act_stride], the first `depth` columns are read
  size_t act_stride;
  const float* panels;  // [N/16, depth, 16]
  const float* bias;    // [N]
  size_t rows;
  size_t depth;
  Activation activation;
  bool add;
};

// Chains of 16 lanes in probe_fma.
inline constexpr int kProbeChains = 6;

// Rows that attention takes through a block together, at most.
inline constexpr size_t kMaxAttentionRows = 8;

// Floats of scratch that attention wants for heads of `width` columns, a multiple of 16.
constexpr size_t attention_scratch(size_t width) {
  return kMaxAttentionRows * (2 * width + kBlock);
}

// Causal attention of one head for `rows` consecutive positions inside one KV block.
struct AttentionF32 {
  float* out;                  // [rows, out_stride], the first head_size columns are written
  size_t out_stride;
  const float* query;          // [rows, query_stride]
  size_t query_stride;
  const float* const* blocks;  // for each KV block: K [64/16, head_size, 16], V [Dp/16, 64, 16]
  size_t position;             // of the first row
  size_t rows;
  size_t head_size;
  float scale;
  float* scratch;  // attention_scratch floats, aligned to 64 bytes
};

struct KernelTable {
  const char* name;

  // The columns of panels [panel_begin, panel_end).
  void (*linear_f32)(const LinearF32& task, size_t panel_begin, size_t panel_end) noexcept;

  // out = (x - mean) / sqrt(variance + epsilon) * gain + bias over the n columns of one row.
  void (*layer_norm)(float* out, const float* x, const float* gain, const float* bias, size_t n,
                     float epsilon) noexcept;

  void (*attention_f32)(const AttentionF32& task) noexcept;

  // Writes K and V of one head at one position into its block.
  void (*append_kv_f32)(float* block, const float* key, const float* value, size_t position,
                        size_t head_size) noexcept;

  // y[i] = f(x[i]); exp_f32 is e^x on [-87, 88].
  void (*activate_f32)(float* y, const float* x, size_t n, Activation activation) noexcept;
  void (*exp_f32)(float* y, const float* x, size_t n) noexcept;

  // Yardsticks: `steps` fused multiply-adds of 16 lanes in each of kProbeChains chains; one read of
  // n floats, a multiple of 64.
  float (*probe_fma)(size_t steps) noexcept;
  float (*probe_read)(const float* data, size_t n) noexcept;
};

}  // namespace gptx::cpu
