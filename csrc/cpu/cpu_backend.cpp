#include "cpu/cpu_backend.h"

#include <algorithm>
#include <cstring>

#include "cpu/isa.h"

namespace gptx::cpu {
namespace {

constexpr size_t kRowsPerPiece = 8;    // of row-wise operations
constexpr size_t kPanelsPerPiece = 4;  // of matmuls: 64 columns, a tile of every ISA

// The parts of a head's columns in c_attn.
constexpr size_t kQuery = 0, kKey = 1, kValue = 2, kParts = 3;

}  // namespace

CpuDevice::CpuDevice(const GptConfig& config, KvType kv_type, size_t kv_blocks, size_t max_rows,
                     int threads, std::string_view isa)
    : team(threads),
      kernels(kernels_named(isa)),
      n_layer_(config.n_layer),
      n_embd_(config.n_embd),
      n_head_(config.n_head),
      head_size_(config.head_size()),
      head_width_(round_up(head_size_, kPanel)),
      kv_type_(kv_type),
      kv_head_bytes_(kv_head_bytes(kv_type, head_width_)),
      kv_block_bytes_(kv_block_bytes(config, kv_type)),
      kv_blocks_(kv_blocks) {
  const size_t columns = round_up(std::max(config.n_embd, config.n_inner), kPanel);
  operands_ = OperandBuffer(max_rows, columns);
  for (int i = 0; i < team.size(); ++i) {
    workers_.push_back({.blocks = std::vector<const std::byte*>(config.block_size / kBlock + 1),
                        .attention = AlignedBuffer<float>(attention_scratch(head_width_)),
                        .normal = AlignedBuffer<float>(columns),
                        .operands = OperandBuffer(kFewRows, columns)});
  }
}

size_t CpuDevice::kv_block_bytes(const GptConfig& config, KvType kv_type) {
  return config.n_layer * config.n_head *
         kv_head_bytes(kv_type, round_up(config.head_size(), kPanel));
}

void CpuDevice::begin_step(const Batch& batch) {
  state_rows_ = batch.keeps_states ? batch.size() : 0;
  states_.resize((n_layer_ + 1) * state_rows_ * n_embd_);
  addresses_.resize(batch.blocks.size());
  for (size_t s = 0; s < batch.blocks.size(); ++s) {
    addresses_[s].clear();
    for (const int32_t id : batch.blocks[s]) addresses_[s].push_back(kv_block(id).data());
  }
}

std::span<const float> CpuDevice::state(size_t layer, size_t row) const {
  return std::span(states_).subspan((layer * state_rows_ + row) * n_embd_, n_embd_);
}

size_t CpuDevice::workspace_bytes() const {
  const auto bytes_of = [](const OperandBuffer& b) { return b.bytes.bytes() + b.scales.bytes(); };
  size_t bytes = bytes_of(operands_);
  for (const Worker& w : workers_) bytes += w.attention.bytes() + w.normal.bytes() + bytes_of(w.operands);
  return bytes;
}

std::span<std::byte> CpuDevice::kv_block(int32_t id) {
  AlignedBuffer<std::byte>& block = kv_blocks_[static_cast<size_t>(id)];
  if (block.data() == nullptr) block = AlignedBuffer<std::byte>(kv_block_bytes_);
  return {block.data(), kv_block_bytes_};
}

template <class F>
void CpuBackend::for_each_row(size_t rows, F f) {
  const size_t pieces = (rows + kRowsPerPiece - 1) / kRowsPerPiece;
  device_.team.for_each(rank_, pieces, [&](size_t piece) {
    const size_t end = std::min(rows, (piece + 1) * kRowsPerPiece);
    for (size_t row = piece * kRowsPerPiece; row < end; ++row) f(row);
  });
}

void CpuBackend::embed(Rows& x, const TokenTable& wte, const PositionTable& wpe,
                       const Batch& batch) {
  for_each_row(batch.size(), [&](size_t row) {
    float* const out = x.row(row);
    wte.copy_row(out, 1, static_cast<size_t>(batch.tokens[row]));
    const float* const position = wpe.row(batch.positions[row]);
    for (size_t c = 0; c < wte.depth; ++c) out[c] += position[c];
  });
}

// The first `rows` rows of `in`, normalized if there is a norm, as the matmul of `linear` wants them.
const OperandBuffer& CpuBackend::operands(const Rows& in, const Norm* norm, const Linear& linear,
                                          size_t rows) {
  const bool few = rows <= kFewRows;
  const OperandBuffer& buffer = few ? worker_.operands : device_.operands_;
  const PackedMatrix& weight = *linear.weight;
  const auto write = [&](size_t row) {
    const float* source = in.row(row);
    if (row + 1 < rows) {  // it lies where another worker wrote it
      for (size_t c = 0; c < weight.depth; c += kPanel) __builtin_prefetch(in.row(row + 1) + c);
    }
    if (norm != nullptr) {
      device_.kernels.layer_norm(worker_.normal.data(), source, norm->gain, norm->bias,
                                 weight.depth, norm->epsilon);
      source = worker_.normal.data();
    }
    buffer.scales.data()[row] =
        device_.kernels[weight.precision].operand(buffer.row(row), source, weight.depth);
  };
  if (few) {
    for (size_t row = 0; row < rows; ++row) write(row);
  } else {
    for_each_row(rows, write);
  }
  return buffer;
}

LinearTask CpuBackend::task(Rows& out, const OperandBuffer& act, const Linear& linear, size_t rows,
                            bool add) {
  return {.out = out.row(0),
          .out_stride = out.stride,
          .act = act.row(0),
          .act_stride = act.stride,
          .act_scale = act.scales.data(),
          .panels = linear.weight->panels,
          .scale = linear.weight->scale,
          .colsum = linear.weight->colsum,
          .bias = linear.bias,
          .rows = rows,
          .depth = linear.weight->depth,
          .activation = linear.activation,
          .add = add};
}

void CpuBackend::run(const LinearTask& task, const Linear& linear) {
  const MatmulKernels& kernels = device_.kernels[linear.weight->precision];
  const size_t panels = task.rows == 0 ? 0 : linear.weight->n / kPanel;
  const size_t pieces = (panels + kPanelsPerPiece - 1) / kPanelsPerPiece;
  device_.team.for_each(rank_, pieces, [&](size_t piece) {
    kernels.linear(task, piece * kPanelsPerPiece, std::min(panels, (piece + 1) * kPanelsPerPiece));
  });
}

void CpuBackend::norm_linear(Rows& out, const Rows& x, const Norm& norm, const Linear& linear,
                             size_t rows) {
  run(task(out, operands(x, &norm, linear, rows), linear, rows, /*add=*/false), linear);
}

void CpuBackend::add_linear(Rows& x, const Rows& act, const Linear& linear, size_t rows) {
  run(task(x, operands(act, nullptr, linear, rows), linear, rows, /*add=*/true), linear);
}

std::byte* CpuBackend::kv_address(const Query& query, size_t layer, size_t head,
                                  size_t block) const {
  return device_.addresses_[query.sequence][block] +
         (layer * device_.n_head_ + head) * device_.kv_head_bytes_;
}

// One part of one head: its columns of qkv for the rows of the task and, of K and V, its place in the cache.
void CpuBackend::project_head(const LinearTask& task, const Linear& c_attn, size_t layer,
                              size_t head, size_t part, const Rows& qkv, const Batch& batch) {
  const size_t panels = device_.head_width_ / kPanel;
  const size_t begin = (head * kParts + part) * panels;
  device_.kernels[c_attn.weight->precision].linear(task, begin, begin + panels);
  if (part == kQuery) return;
  const AttentionKernels& kernels = device_.kernels[device_.kv_type_];
  const auto append = part == kKey ? kernels.append_key : kernels.append_value;
  for (const Query& q : batch.queries) {
    std::byte* const block = kv_address(q, layer, head, q.position / kBlock);
    for (size_t i = 0; i < q.rows; ++i) {
      append(block, qkv.row(q.row + i) + begin * kPanel, q.position + i, device_.head_size_);
    }
  }
}

void CpuBackend::attend(Rows& y, const Rows& qkv, size_t layer, float scale, const Query& query,
                        size_t head, const std::byte* next) {
  for (size_t b = 0; b <= query.position / kBlock; ++b) {
    worker_.blocks[b] = kv_address(query, layer, head, b);
  }
  device_.kernels[device_.kv_type_].attention(
      {.out = y.row(query.out_row) + head * device_.head_size_,
       .out_stride = y.stride,
       .query = qkv.row(query.row) + kParts * head * device_.head_width_,
       .query_stride = qkv.stride,
       .blocks = worker_.blocks.data(),
       .next = next,
       .position = query.position,
       .rows = query.rows,
       .head_size = device_.head_size_,
       .scale = scale,
       .scratch = worker_.attention.data()});
}

void CpuBackend::self_attention(Rows& y, Rows& qkv, const Rows& x, const Norm& norm,
                                const Linear& c_attn, size_t layer, float scale, const Batch& batch,
                                std::span<const Query> queries) {
  const size_t rows = batch.size();
  const size_t heads = device_.n_head_;
  const LinearTask all = task(qkv, operands(x, &norm, c_attn, rows), c_attn, rows, /*add=*/false);
  if (rows <= kFewRows) {
    // A head needs nothing of the others: one worker takes it all the way, without a barrier.
    device_.team.for_each(rank_, heads, [&](size_t head) {
      for (const size_t part : {kQuery, kKey, kValue}) {
        project_head(all, c_attn, layer, head, part, qkv, batch);
      }
      for (size_t i = 0; i < queries.size(); ++i) {
        const bool last = i + 1 == queries.size();
        attend(y, qkv, layer, scale, queries[i], head,
               last ? kv_address(queries[0], layer, (head + 1) % heads, 0)
                    : kv_address(queries[i + 1], layer, head, 0));
      }
    });
    return;
  }
  device_.team.for_each(rank_, heads * kParts, [&](size_t item) {
    const size_t head = item / kParts, part = item % kParts;
    if (part != kQuery || queries.data() == batch.queries.data()) {
      return project_head(all, c_attn, layer, head, part, qkv, batch);
    }
    for (const Query& query : queries) {  // the few rows that something is asked of
      LinearTask some = all;
      some.out += query.row * all.out_stride;
      some.act += query.row * all.act_stride;
      some.act_scale += query.row;
      some.rows = query.rows;
      project_head(some, c_attn, layer, head, part, qkv, batch);
    }
  });
  // A head's queries, keys and values are in the caches of the worker that made them.
  device_.team.for_each(rank_, queries.size() * heads, [&](size_t item) {
    // Late positions see the most: they go first, so that no long piece is left for the end.
    const Query& query = queries[queries.size() - 1 - item % queries.size()];
    const size_t head = item / queries.size();
    attend(y, qkv, layer, scale, query, head, kv_address(query, layer, head, 0));
  });
}

void CpuBackend::keep_states(const Rows& x, size_t layer, const Batch& batch) {
  if (!batch.keeps_states) return;
  for_each_row(batch.size(), [&](size_t row) {
    float* const out = device_.states_.data() + (layer * batch.size() + row) * device_.n_embd_;
    std::memcpy(out, x.row(row), device_.n_embd_ * sizeof(float));
  });
}

void CpuBackend::keep_rows(Rows& x, const Batch& batch) {
  // Rows move to lower indices in ascending order, so one worker does it in place.
  device_.team.for_each(rank_, 1, [&](size_t) {
    for (size_t i = 0; i < batch.kept_rows.size(); ++i) {
      if (batch.kept_rows[i] == i) continue;
      std::memcpy(x.row(i), x.row(batch.kept_rows[i]), device_.n_embd_ * sizeof(float));
    }
  });
}

}  // namespace gptx::cpu
