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

// Rows whose operands every worker makes for itself, which costs less than a barrier.
inline constexpr size_t kFewRows = 8;

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

// Rows as a matmul wants them (MatmulKernels::operand).
struct OperandBuffer {
  OperandBuffer() = default;
  OperandBuffer(size_t rows, size_t columns)
      : stride(round_up(columns * kOperandBytes, kLineBytes) | kLineBytes),
        bytes(rows * stride),
        scales(rows) {}
  std::byte* row(size_t i) const noexcept { return bytes.data() + i * stride; }

  size_t stride = 0;  // in bytes
  AlignedBuffer<std::byte> bytes;
  AlignedBuffer<RowScale> scales;
};

struct LinearView {
  const PackedMatrix* weight;
  const float* bias;  // [n]
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
  // `max_rows` is the most rows that a step may have.
  CpuDevice(const GptConfig& config, KvType kv_type, size_t kv_blocks, size_t max_rows, int threads,
            std::string_view isa);

  // Gives memory to the KV blocks that the batch names and looks up their addresses.
  void begin_step(const Batch& batch);

  // Bytes that a step works in, KV blocks and activations not counted.
  size_t workspace_bytes() const;

  // The state of a row before a layer, or behind the last one, of the last step whose batch kept them [C].
  std::span<const float> state(size_t layer, size_t row) const;

  // The memory of a KV block, which gets it with its first use.
  std::span<std::byte> kv_block(int32_t id);

  // Bytes of one KV block: [L, H, K and V of a head].
  static size_t kv_block_bytes(const GptConfig& config, KvType kv_type);

  ThreadTeam team;
  const KernelTable& kernels;

 private:
  friend class CpuBackend;

  struct Worker {
    std::vector<const std::byte*> blocks;  // of one head
    AlignedBuffer<float> attention;        // scratch
    AlignedBuffer<float> normal;           // one row after its layer norm
    OperandBuffer operands;                // of few rows
  };

  size_t n_layer_, n_embd_, n_head_, head_size_, head_width_;  // head_width is head_size padded to 16
  KvType kv_type_;
  size_t kv_head_bytes_, kv_block_bytes_;
  std::vector<AlignedBuffer<std::byte>> kv_blocks_;
  std::vector<float> states_;                       // [L + 1, T, C], where the batch keeps them
  size_t state_rows_ = 0;                           // T
  std::vector<std::vector<std::byte*>> addresses_;  // [sequence][block], of this step
  OperandBuffer operands_;                          // of many rows
  std::vector<Worker> workers_;
};

// One worker's hands on the device. Each operation is called by all workers and ends in a barrier.
class CpuBackend {
 public:
  using Rows = RowBuffer;
  using TokenTable = PackedMatrix;  // wte, packed like any weight
  using PositionTable = PositionView;
  using Norm = NormView;
  using Linear = LinearView;

  CpuBackend(CpuDevice& device, int rank)
      : device_(device), worker_(device.workers_[static_cast<size_t>(rank)]), rank_(rank) {}

  void embed(Rows& x, const TokenTable& wte, const PositionTable& wpe, const Batch& batch);
  void self_attention(Rows& y, Rows& qkv, const Rows& x, const Norm& norm, const Linear& c_attn,
                      size_t layer, float scale, const Batch& batch,
                      std::span<const Query> queries);
  void norm_linear(Rows& out, const Rows& x, const Norm& norm, const Linear& linear, size_t rows);
  void add_linear(Rows& x, const Rows& act, const Linear& linear, size_t rows);
  void keep_states(const Rows& x, size_t layer, const Batch& batch);
  void keep_rows(Rows& x, const Batch& batch);

 private:
  const OperandBuffer& operands(const Rows& in, const Norm* norm, const Linear& linear,
                                size_t rows);
  LinearTask task(Rows& out, const OperandBuffer& act, const Linear& linear, size_t rows, bool add);
  void run(const LinearTask& task, const Linear& linear);
  void project_head(const LinearTask& task, const Linear& c_attn, size_t layer, size_t head,
                    size_t part, const Rows& qkv, const Batch& batch);
  void attend(Rows& y, const Rows& qkv, size_t layer, float scale, const Query& query,
              size_t head, const std::byte* next);
  std::byte* kv_address(const Query& query, size_t layer, size_t head, size_t block) const;
  template <class F>
  void for_each_row(size_t rows, F f);

  CpuDevice& device_;
  CpuDevice::Worker& worker_;
  int rank_;
};

}  // namespace gptx::cpu
