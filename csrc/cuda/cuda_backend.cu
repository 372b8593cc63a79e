#include "cuda/cuda_backend.h"

#include <algorithm>
#include <string>

#include "core/error.h"
#include "cuda/kernels/append_int8.h"
#include "cuda/kernels/embed.h"
#include "cuda/kernels/sample.h"
#include "cuda/warpgroups_agree.h"
#include "cuda/launch.h"

namespace gptx::cuda {
namespace {

// Few queries whose parts are in memory at once.
constexpr size_t kPartialQueries = 64;

}  // namespace

const MatmulKernels& matmul_kernels(Precision precision) {
  switch (precision) {
    case Precision::kFloat32: return k_float32_matmul;
    case Precision::kBFloat16: return k_bfloat16_matmul;
    case Precision::kInt8: return k_int8_matmul;
    case Precision::kInt8Fast: return k_int8_fast_matmul;
  }
  return k_float32_matmul;
}

const AttentionKernels& attention_kernels(KvType type) {
  switch (type) {
    case KvType::kFloat32: return k_float32_attention;
    case KvType::kBFloat16: return k_bfloat16_attention;
    case KvType::kInt8: return k_int8_attention;
  }
  return k_float32_attention;
}

KvLayout CudaBackend::kv_layout(const GptConfig& config, KvType kv_type) {
  const auto size = static_cast<int>(config.head_size());
  return {.head_size = size,
          .head_width = round_up(size, kPanel),
          .inputs = attention_kernels(kv_type).inputs,
          .scaled = kv_type == KvType::kInt8};
}

size_t CudaBackend::kv_block_bytes(const GptConfig& config, KvType kv_type) {
  return config.n_layer * config.n_head * kv_layout(config, kv_type).bytes();
}

CudaBackend::CudaBackend(Device& device, const GptConfig& config, Precision precision, KvType kv_type,
                         size_t kv_blocks, const TableLimits& limits)
    : device_(device),
      n_embd_(static_cast<int>(config.n_embd)),
      vocab_size_(static_cast<int>(config.vocab_size)),
      heads_(static_cast<int>(config.n_head)),
      matmul_(matmul_kernels(precision)),
      warpgroups_(warpgroups_agree(device, matmul_)),
      attention_(attention_kernels(kv_type)),
      kv_layout_(kv_layout(config, kv_type)),
      layers_(config.n_layer),
      kv_blocks_(kv_blocks),
      tables_(device, limits, !attention_.has_many(device, kv_layout_)) {
  kv_cache_ = static_cast<std::byte*>(device.allocate(kv_blocks * kv_block_bytes(config, kv_type), "KV cache"));
  const auto widest = static_cast<int>(std::max(config.n_embd, config.n_inner));
  const auto groups = static_cast<size_t>(ceil_div(static_cast<int>(limits.rows), kRows));
  operands_ = static_cast<std::byte*>(
      device.allocate(groups * static_cast<size_t>(tiles_for(widest, matmul_.inputs)) * matmul_.operand_tile_bytes,
                      "activations"));
  scales_ = static_cast<RowScale*>(device.allocate(groups * kRows * sizeof(RowScale), "activations"));
  const size_t pairs = kPartialQueries * config.n_head;
  tickets_capacity_ = limits.rows * config.n_head;
  tickets_ = static_cast<uint32_t*>(device.allocate(tickets_capacity_ * sizeof(uint32_t), "activations"));
  partials_capacity_ = pairs * limits.context_blocks * static_cast<size_t>(kv_layout_.head_width + 2);
  partials_ = static_cast<float*>(device.allocate(partials_capacity_ * sizeof(float), "activations"));
}

BackendRows CudaBackend::make_rows(size_t rows, size_t columns) {
  const int stride = round_up(static_cast<int>(columns), 32);
  const size_t bytes = rows * static_cast<size_t>(stride) * sizeof(float);
  return {{static_cast<float*>(device_.allocate(bytes, "activations")), stride}, {}, {}};
}

// What is in a tile behind the last column stays zero: nobody writes there, and each order has memory of its own.
BackendRows CudaBackend::make_operand_rows(size_t rows, size_t columns) {
  if (matmul_.scales_rows) return make_rows(rows, columns);
  const int tiles = tiles_for(static_cast<int>(columns), matmul_.inputs);
  const auto rounded = [&](size_t n, Order order) -> RoundedRows {
    const auto groups = static_cast<size_t>(ceil_div(static_cast<int>(n), kRows));
    const size_t bytes = groups * static_cast<size_t>(tiles) * matmul_.operand_tile_bytes;
    return {static_cast<std::byte*>(device_.allocate(bytes, "activations")), tiles, matmul_.inputs, order};
  };
  BackendRows out = make_rows(std::min<size_t>(rows, kRows), columns);
  out.few = rounded(std::min<size_t>(rows, kFewRows), Order::kFragments);
  out.many = rounded(rows, warpgroups_ ? Order::kCores : Order::kFragments);
  return out;
}

BackendRows CudaBackend::make_logits(size_t rows, size_t vocab_size) {
  BackendRows view = make_rows(rows, vocab_size);
  const auto panels = static_cast<size_t>(ceil_div(static_cast<int>(vocab_size), kPanel));
  weights_ = static_cast<double*>(device_.allocate(rows * vocab_size * sizeof(double), "activations"));
  view.maxima = static_cast<uint64_t*>(device_.allocate(rows * panels * sizeof(uint64_t), "activations"));
  return view;
}

CacheView CudaBackend::cache(size_t layer) const {
  return {.blocks = part(layer, 0),
          .layout = kv_layout_,
          .heads = heads_,
          .positions = tables_.positions(),
          .block_tables = tables_.block_tables(),
          .row_tables = tables_.row_tables()};
}

void CudaBackend::embed(Rows& x, const TokenTable& wte, const PositionTable& wpe, const Batch& batch) {
  launch(device_, {.x = batch.size(), .threads = 256}, cuda::embed, x, wte.view(), wpe.data, wpe.stride,
         tables_.tokens(), tables_.positions(), n_embd_);
}

void CudaBackend::run(const Rows& in, const Norm& norm, const Linear& linear, size_t rows, const Output& out) {
  const Matrix& w = *linear.weight;
  LinearTask task{.weights = reinterpret_cast<const uint4*>(w.tiles),
                  .columns = {linear.bias, w.scale, w.colsum},
                  .panels = w.panels,
                  .tiles = w.depth_tiles,
                  .depth = w.depth,
                  .rows = static_cast<int>(rows),
                  .in = in,
                  .norm = norm,
                  .operands = nullptr,
                  .scales = nullptr,
                  .out = out,
                  .panels_per_block = 1};
  const RoundedRows rounded = in.rounded(rows);
  const bool made = rounded.operands != nullptr;
  const bool alone = !made && matmul_.makes_operands(device_, task);
  const bool few = alone || (task.rows <= kFewRows && matmul_.fits_few(device_, task));
  if (!few && out.rows.maxima != nullptr) {
    throw DeviceError("rows of " + std::to_string(task.depth) + " inputs are too wide for this device");
  }
  const bool by_warpgroups = warpgroups_ && task.rows > kFewRows;
  if (!made && !alone) {
    const Order order = by_warpgroups ? Order::kCores : Order::kFragments;
    matmul_.make_operands(device_, order, operands_, scales_, in, norm, task.rows, task.depth, task.tiles);
  }
  if (!alone) {
    task.operands = made ? rounded.operands : operands_;
    task.scales = scales_;
    task.norm = {};
  }
  if (!few) return by_warpgroups ? matmul_.linear_warpgroup(device_, task) : matmul_.linear_many(device_, task);
  const size_t blocks = matmul_.linear_few(device_, task);
  if (out.rows.maxima != nullptr) maxima_ = static_cast<int>(blocks);
}

void CudaBackend::norm_linear(Rows& out, const Rows& x, const Norm& norm, const Linear& linear, size_t rows) {
  const RoundedRows rounded = out.rounded(rows);
  run(x, norm, linear, rows,
      {.kind = rounded.operands == nullptr ? Output::kStore : Output::kRound,
       .activation = linear.activation,
       .rows = out,
       .columns = linear.weight->outputs,
       .cache = {},
       .rounded = rounded});
}

void CudaBackend::add_linear(Rows& x, const Rows& act, const Linear& linear, size_t rows) {
  run(act, {}, linear, rows,
      {.kind = Output::kAdd,
       .activation = Activation::kNone,
       .rows = x,
       .columns = linear.weight->outputs,
       .cache = {},
       .rounded = {}});
}

void CudaBackend::self_attention(Rows& y, Rows& qkv, const Rows& x, const Norm& norm, const Linear& c_attn,
                                 size_t layer, float scale, const Batch& batch, std::span<const Query> queries) {
  const CacheView cache = this->cache(layer);
  run(x, norm, c_attn, batch.size(),
      {.kind = Output::kQkv,
       .activation = Activation::kNone,
       .rows = qkv,
       .columns = 3 * heads_ * kv_layout_.head_width,
       .cache = cache,
       .rounded = {}});
  if (kv_layout_.scaled) {
    launch(device_, {.x = batch.size(), .y = static_cast<size_t>(heads_), .threads = 2 * kWarp}, append_int8, qkv,
           cache);
  }
  const bool all = queries.data() == batch.queries.data();
  const QueryList& list = all ? tables_.queries() : tables_.kept_queries();
  AttentionTask task{.qkv = qkv,
                     .out = y,
                     .rounded = y.rounded(all ? batch.size() : batch.kept_rows.size()),
                     .cache = cache,
                     .queries = list.many,
                     .scale = scale,
                     .few_rows = list.few_rows,
                     .partials = partials_,
                     .tickets = tickets_};
  if (list.many_count > 0) attention_.many(device_, task, list.many_count);
  if (list.few_count > 0) attend_few(task, list);
}

// As many at a time as their parts have room.
void CudaBackend::attend_few(AttentionTask task, const QueryList& list) {
  const size_t floats = static_cast<size_t>(heads_) * list.few_blocks * static_cast<size_t>(list.few_rows) *
                        static_cast<size_t>(kv_layout_.head_width + 2);
  const size_t at_once = std::max<size_t>(1, partials_capacity_ / floats);
  for (size_t i = 0; i < list.few_count; i += at_once) {
    task.queries = list.few + i;
    attention_.few(device_, task, std::min(at_once, list.few_count - i), list.few_blocks);
  }
}

// Straight to the host: who asks for all of them has no other use for the memory of the device.
void CudaBackend::keep_states(const Rows& x, size_t layer, const Batch& batch) {
  if (!batch.keeps_states) return;
  if (layer == 0) {
    state_rows_ = batch.size();
    state_stride_ = static_cast<size_t>(x.stride);
    states_.resize((layers_ + 1) * state_rows_ * state_stride_);
  }
  const size_t n = state_rows_ * state_stride_;
  device_.download(states_.data() + layer * n, x.data, n * sizeof(float));
}

void CudaBackend::keep_rows(Rows& x, const Batch& batch) {
  const int threads = 128;
  launch(device_, {.x = static_cast<size_t>(ceil_div(n_embd_, threads)), .threads = threads}, cuda::keep_rows, x,
         tables_.kept_rows(), static_cast<int>(batch.kept_rows.size()), n_embd_);
}

void CudaBackend::copy_block(int32_t from, int32_t to) {
  for (size_t i = 0; i < layers_; ++i) device_.copy(part(i, to), part(i, from), part_bytes());
}

void CudaBackend::fill_block(int32_t block, int byte) {
  for (size_t i = 0; i < layers_; ++i) device_.fill(part(i, block), byte, part_bytes());
}

void CudaBackend::download_block(std::byte* out, int32_t block) {
  for (size_t i = 0; i < layers_; ++i) device_.download(out + i * part_bytes(), part(i, block), part_bytes());
}

void CudaBackend::upload_block(int32_t block, const std::byte* in) {
  for (size_t i = 0; i < layers_; ++i) device_.upload(part(i, block), in + i * part_bytes(), part_bytes());
}

void CudaBackend::sample(const Rows& logits) {
  const size_t n = tables_.samples();
  if (n == 0) return;
  const SampleStep step = tables_.sample_step(logits, maxima_, vocab_size_, weights_);
  const LaunchShape one_each{.x = n, .threads = kSampleThreads, .shared_bytes = sample_shared_bytes(vocab_size_)};
  launch(device_, one_each, choose_largest, step);
  if (tables_.all_greedy()) return;
  launch(device_, {.x = static_cast<size_t>(ceil_div(vocab_size_, kWeighThreads)), .y = n, .threads = kWeighThreads},
         weigh, step);
  launch(device_, one_each, cuda::sample, step);
}

}  // namespace gptx::cuda
