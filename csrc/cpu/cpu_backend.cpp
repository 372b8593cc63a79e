#include "cpu/cpu_backend.h"

#include <algorithm>
#include <cstring>

#include "cpu/isa.h"

namespace gptx::cpu {
namespace {

constexpr size_t kRowsPerPiece = 8;    // of row-wise operations
constexpr size_t kPanelsPerPiece = 4;  // of matmuls: 64 columns, a tile of every ISA

}  // namespace

CpuDevice::CpuDevice(const GptConfig& config, size_t kv_blocks, int threads, std::string_view isa)
    : team(threads),
      kernels(kernels_named(isa)),
      n_embd_(config.n_embd),
      n_head_(config.n_head),
      head_size_(config.head_size()),
      head_width_(round_up(head_size_, kPanel)),
      kv_head_floats_(2 * kBlock * head_width_),
      kv_block_floats_(kv_block_floats(config)),
      kv_blocks_(kv_blocks) {
  for (int i = 0; i < team.size(); ++i) {
    heads_.emplace_back(config.block_size / kBlock + 1);
    scratch_.emplace_back(attention_scratch(head_width_));
  }
}

size_t CpuDevice::kv_block_floats(const GptConfig& config) {
  return config.n_layer * config.n_head * 2 * kBlock * round_up(config.head_size(), kPanel);
}

void CpuDevice::begin_step(const Batch& batch) {
  addresses_.resize(batch.blocks.size());
  for (size_t s = 0; s < batch.blocks.size(); ++s) {
    addresses_[s].clear();
    for (const int32_t id : batch.blocks[s]) {
      AlignedBuffer<float>& block = kv_blocks_[static_cast<size_t>(id)];
      if (block.data() == nullptr) block = AlignedBuffer<float>(kv_block_floats_);
      addresses_[s].push_back(block.data());
    }
  }
}

template <class F>
void CpuBackend::for_each_row(size_t rows, F f) {
  const size_t pieces = (rows + kRowsPerPiece - 1) / kRowsPerPiece;
  device_.team.for_each(rank_, pieces, [&](size_t piece) {
    const size_t end = std::min(rows, (piece + 1) * kRowsPerPiece);
    for (size_t row = piece * kRowsPerPiece; row < end; ++row) f(row);
  });
}

size_t CpuBackend::kv_offset(size_t layer, size_t head) const {
  return (layer * device_.n_head_ + head) * device_.kv_head_floats_;
}

void CpuBackend::embed(Rows& x, const TokenTable& wte, const PositionTable& wpe,
                       const Batch& batch) {
  for_each_row(batch.size(), [&](size_t row) {
    const auto token = static_cast<size_t>(batch.tokens[row]);
    const float* const column = wte.panels + token / kPanel * wte.depth * kPanel + token % kPanel;
    const float* const position = wpe.row(batch.positions[row]);
    float* const out = x.row(row);
    for (size_t c = 0; c < wte.depth; ++c) out[c] = column[c * kPanel] + position[c];
  });
}

void CpuBackend::layer_norm(Rows& out, const Rows& x, const Norm& norm, size_t rows) {
  for_each_row(rows, [&](size_t row) {
    device_.kernels.layer_norm(out.row(row), x.row(row), norm.gain, norm.bias, device_.n_embd_,
                               norm.epsilon);
  });
}

void CpuBackend::linear(Rows& out, const Rows& act, const Linear& weight, size_t rows) {
  matmul(out, act, weight, rows, /*add=*/false);
}

void CpuBackend::add_linear(Rows& out, const Rows& act, const Linear& weight, size_t rows) {
  matmul(out, act, weight, rows, /*add=*/true);
}

void CpuBackend::matmul(Rows& out, const Rows& act, const Linear& weight, size_t rows, bool add) {
  const LinearF32 task{.out = out.row(0),
                       .out_stride = out.stride,
                       .act = act.row(0),
                       .act_stride = act.stride,
                       .panels = weight.panels,
                       .bias = weight.bias,
                       .rows = rows,
                       .depth = weight.depth,
                       .activation = weight.activation,
                       .add = add};
  const size_t panels = rows == 0 ? 0 : weight.n / kPanel;
  const size_t pieces = (panels + kPanelsPerPiece - 1) / kPanelsPerPiece;
  device_.team.for_each(rank_, pieces, [&](size_t piece) {
    device_.kernels.linear_f32(task, piece * kPanelsPerPiece,
                               std::min(panels, (piece + 1) * kPanelsPerPiece));
  });
}

void CpuBackend::append_kv(size_t layer, const Rows& qkv, const Batch& batch) {
  const size_t heads = device_.n_head_;
  const size_t width = device_.head_width_;
  device_.team.for_each(rank_, batch.queries.size() * heads, [&](size_t item) {
    const Query& q = batch.queries[item / heads];
    const size_t head = item % heads;
    const auto id = batch.blocks[q.sequence][q.position / kBlock];
    float* const block = device_.kv_blocks_[static_cast<size_t>(id)].data() + kv_offset(layer, head);
    for (size_t i = 0; i < q.rows; ++i) {
      const float* const key = qkv.row(q.row + i) + (3 * head + 1) * width;
      device_.kernels.append_kv_f32(block, key, key + width, q.position + i, device_.head_size_);
    }
  });
}

void CpuBackend::attention(Rows& out, size_t layer, const Rows& qkv, std::span<const Query> queries,
                           const Batch& /*batch*/, float scale) {
  const size_t heads = device_.n_head_;
  std::vector<const float*>& blocks = device_.heads_[static_cast<size_t>(rank_)];
  device_.team.for_each(rank_, queries.size() * heads, [&](size_t item) {
    // Late positions see the most: they go first, so that no long piece is left for the end.
    const Query& q = queries[queries.size() - 1 - item / heads];
    const size_t head = item % heads;
    const std::vector<const float*>& addresses = device_.addresses_[q.sequence];
    for (size_t b = 0; b <= q.position / kBlock; ++b) {
      blocks[b] = addresses[b] + kv_offset(layer, head);
    }
    device_.kernels.attention_f32(
        {.out = out.row(q.out_row) + head * device_.head_size_,
         .out_stride = out.stride,
         .query = qkv.row(q.row) + 3 * head * device_.head_width_,
         .query_stride = qkv.stride,
         .blocks = blocks.data(),
         .position = q.position,
         .rows = q.rows,
         .head_size = device_.head_size_,
         .scale = scale,
         .scratch = device_.scratch_[static_cast<size_t>(rank_)].data()});
  });
}

void CpuBackend::keep_logit_rows(Rows& x, const Batch& batch) {
  // Rows move to lower indices in ascending order, so one worker does it in place.
  device_.team.for_each(rank_, 1, [&](size_t) {
    for (size_t i = 0; i < batch.logit_rows.size(); ++i) {
      if (batch.logit_rows[i] == i) continue;
      std::memcpy(x.row(i), x.row(batch.logit_rows[i]), device_.n_embd_ * sizeof(float));
    }
  });
}

}  // namespace gptx::cpu
