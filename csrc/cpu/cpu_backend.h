// The CPU backend: operations are kernels of the chosen ISA, spread over a thread team. No SIMD here.
#pragma once

#include <cstddef>
#include <span>
#include <string_view>
#include <vector>

#include "core/aligned_buffer.h"
#include "core/batch.h"
#include "core/config.h"
#include "core/thread_team.h"
#include "cpu/kernel_table.h"
#include "cpu/packed_matrix.h"

namespace gptx::cpu {

static_assert(kBlock == kBlockTokens);

// Activations [rows, columns]. The stride is an odd number of cache lines: rows a multiple of 4096 bytes
// apart would share one set of the L1 cache.
struct RowBuffer {
  RowBuffer() = default;
  RowBuffer(size_t rows, size_t columns)
      : stride(round_up(columns, kPanel) | kPanel), buffer(rows * stride) {}
  float* row(size_t i) const noexcept { return buffer.data() + i * stride; }

  size_t stride = 0;  // in floats
  AlignedBuffer<float> buffer;
};

struct LinearView {
  const float* panels;  // [n / 16, depth, 16]
  const float* bias;    // [n]
  size_t n;
  size_t depth;
  Activation activation;
};

// wpe, row by row.
struct PositionView {
  const float* row(size_t i) const noexcept { return data + i * stride; }

  const float* data;  // [block_size, stride]
  size_t stride;
};

struct NormView {
  const float* gain;  // [C], padded with zeros to 16
  const float* bias;
  float epsilon;
};

// What the workers share: the team, the kernels and the KV cache.
class CpuDevice {
 public:
  CpuDevice(const GptConfig& config, size_t kv_blocks, int threads, std::string_view isa);

  // Gives memory to the KV blocks that the batch names and looks up their addresses.
  void begin_step(const Batch& batch);

  // Floats of one KV block: [L, H, K [64/16, D, 16] and V [Dp/16, 64, 16]].
  static size_t kv_block_floats(const GptConfig& config);

  ThreadTeam team;
  const KernelTable& kernels;

 private:
  friend class CpuBackend;

  size_t n_embd_, n_head_, head_size_, head_width_;  // head_width is head_size padded to 16
  size_t kv_head_floats_, kv_block_floats_;
  std::vector<AlignedBuffer<float>> kv_blocks_;
  std::vector<std::vector<const float*>> addresses_;  // [sequence][block], of this step
  std::vector<std::vector<const float*>> heads_;      // per worker: the blocks of one head
  std::vector<AlignedBuffer<float>> scratch_;         // per worker, for attention
};

// One worker's hands on the device. Each operation is called by all workers and ends in a barrier.
class CpuBackend {
 public:
  using Rows = RowBuffer;
  using TokenTable = LinearView;  // wte, packed like any weight
  using PositionTable = PositionView;
  using Norm = NormView;
  using Linear = LinearView;

  CpuBackend(CpuDevice& device, int rank) : device_(device), rank_(rank) {}

  void embed(Rows& x, const TokenTable& wte, const PositionTable& wpe, const Batch& batch);
  void layer_norm(Rows& out, const Rows& x, const Norm& norm, size_t rows);
  void linear(Rows& out, const Rows& act, const Linear& weight, size_t rows);
  void add_linear(Rows& out, const Rows& act, const Linear& weight, size_t rows);
  void append_kv(size_t layer, const Rows& qkv, const Batch& batch);
  void attention(Rows& out, size_t layer, const Rows& qkv, std::span<const Query> queries,
                 const Batch& batch, float scale);
  void keep_logit_rows(Rows& x, const Batch& batch);

 private:
  void matmul(Rows& out, const Rows& act, const Linear& weight, size_t rows, bool add);
  template <class F>
  void for_each_row(size_t rows, F f);
  size_t kv_offset(size_t layer, size_t head) const;

  CpuDevice& device_;
  int rank_;
};

}  // namespace gptx::cpu
