// The CUDA backend: the operations of the model, put into the queue of a device.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "core/config.h"
#include "cuda/device.h"
#include "cuda/kernel_table.h"
#include "cuda/matrix.h"
#include "cuda/step_tables.h"

namespace gptx::cuda {

struct LinearView {
  const Matrix* weight;
  const float* bias;  // [N], or null
  Activation activation;
};

struct PositionView {
  const float* data;  // [block_size, stride]
  int stride;
};

// Rows of floats; those that only another product reads are its operands instead, unless they are so few that it makes
// them itself.
struct BackendRows : RowsView {
  RoundedRows few, many;  // of up to kFewRows rows, and of more

  RoundedRows rounded(size_t rows) const {
    if (rows <= kRows) return {};
    return rows <= kFewRows ? few : many;
  }
};

class CudaBackend {
 public:
  using Rows = BackendRows;
  using TokenTable = Matrix;
  using PositionTable = PositionView;
  using Norm = cuda::Norm;
  using Linear = LinearView;

  CudaBackend(Device& device, const GptConfig& config, Precision precision, KvType kv_type, size_t kv_blocks,
              const TableLimits& limits);

  static KvLayout kv_layout(const GptConfig& config, KvType kv_type);
  static size_t kv_block_bytes(const GptConfig& config, KvType kv_type);

  // Float rows of this backend's memory.
  Rows make_rows(size_t rows, size_t columns);
  // The same for rows that only the input of `add_linear` is made of.
  Rows make_operand_rows(size_t rows, size_t columns);
  // Rows whose largest values are kept when they are computed; at most `kFewRows`.
  Rows make_logits(size_t rows, size_t vocab_size);

  void embed(Rows& x, const TokenTable& wte, const PositionTable& wpe, const Batch& batch);
  void self_attention(Rows& y, Rows& qkv, const Rows& x, const Norm& norm, const Linear& c_attn, size_t layer,
                      float scale, const Batch& batch, std::span<const Query> queries);
  void norm_linear(Rows& out, const Rows& x, const Norm& norm, const Linear& linear, size_t rows);
  void add_linear(Rows& x, const Rows& act, const Linear& linear, size_t rows);
  void keep_states(const Rows& x, size_t layer, const Batch& batch);
  void keep_rows(Rows& x, const Batch& batch);
  // One token for each sample of the tables; logits may change.
  void sample(const Rows& logits);

  // Of a step that kept states, once it is done: row `row` before layer `layer`, on the host.
  const float* state(size_t layer, size_t row) const { return states_.data() + (layer * state_rows_ + row) * state_stride_; }

  // The KV cache block by block, `kv_block_bytes` each: the parts of the layers, in order.
  void copy_block(int32_t from, int32_t to);
  void fill_block(int32_t block, int byte);
  void download_block(std::byte* out, int32_t block);
  void upload_block(int32_t block, const std::byte* in);

  StepTables& tables() { return tables_; }
  bool uses_warpgroups() const { return warpgroups_; }

 private:
  size_t part_bytes() const { return static_cast<size_t>(heads_) * kv_layout_.bytes(); }
  std::byte* part(size_t layer, int32_t block) const {
    return kv_cache_ + (layer * kv_blocks_ + static_cast<size_t>(block)) * part_bytes();
  }
  CacheView cache(size_t layer) const;
  void run(const Rows& in, const Norm& norm, const Linear& linear, size_t rows, const Output& out);
  void attend_few(AttentionTask task, const QueryList& list);

  Device& device_;
  int n_embd_, vocab_size_, heads_;
  const MatmulKernels& matmul_;
  bool warpgroups_;          // whether they multiply many rows
  const AttentionKernels& attention_;
  KvLayout kv_layout_;
  size_t layers_;
  size_t kv_blocks_;
  std::byte* kv_cache_;      // [L, blocks, heads, KvLayout]
  std::byte* operands_;      // of the rows of a step
  RowScale* scales_;
  float* partials_;          // of attention
  size_t partials_capacity_;  // in floats
  uint32_t* tickets_;
  size_t tickets_capacity_;
  int maxima_ = 0;            // of each row of the logits
  double* weights_ = nullptr;  // of the logits, to sample by
  StepTables tables_;
  std::vector<float> states_;  // [L + 1, T, stride]
  size_t state_rows_ = 0, state_stride_ = 0;
};

}  // namespace gptx::cuda
