// A model behind libgptx_cuda as a Runner.
#include <unistd.h>

#include <vector>

#include "core/error.h"
#include "model/cuda_library.h"
#include "model/runner.h"

namespace gptx {
namespace {

// Tokens of one call where nothing else is to be computed: what is lost to a stop string is little.
constexpr size_t kStepsAhead = 8;

void raise(gptx_cuda_status status, const gptx_cuda_error& error) {
  switch (status) {
    case GPTX_CUDA_OK: return;
    case GPTX_CUDA_PARAMETER: throw ParameterError(error.param, error.value, error.message);
    case GPTX_CUDA_OUT_OF_MEMORY: throw OutOfMemoryError(error.message, error.need, error.have);
    case GPTX_CUDA_DEVICE: throw DeviceError(error.message);
    case GPTX_CUDA_INTERNAL: break;
  }
  throw DeviceError(std::string("CUDA backend: ") + error.message);
}

// Calls a function of the library whose last argument is the error.
template <class F, class... A>
void call(F function, const A&... arguments) {
  gptx_cuda_error error = {};
  const gptx_cuda_status status = function(arguments..., &error);
  raise(status, error);
}

gptx_cuda_model_options options_of(const GptConfig& config, const CudaOptions& options) {
  return {.vocab_size = config.vocab_size,
          .block_size = config.block_size,
          .n_layer = config.n_layer,
          .n_head = config.n_head,
          .n_embd = config.n_embd,
          .n_inner = config.n_inner,
          .activation = config.activation.c_str(),
          .layer_norm_epsilon = config.layer_norm_epsilon,
          .scale_attn_weights = config.scale_attn_weights,
          .scale_attn_by_inverse_layer_idx = config.scale_attn_by_inverse_layer_idx,
          .tie_word_embeddings = config.tie_word_embeddings,
          .dtype = 0,
          .tensors = nullptr,
          .n_tensors = 0,
          .precision = static_cast<int32_t>(options.precision),
          .kv_type = static_cast<int32_t>(options.kv_type),
          .device = options.ordinal,
          .kv_blocks = 0,
          .rows = 0,
          .logit_rows = 0,
          .steps_ahead = kStepsAhead};
}

class CudaRunner final : public Runner {
 public:
  CudaRunner(const GptConfig& config, const WeightSource& weights, const StepLimits& limits, size_t kv_blocks,
             const CudaOptions& options)
      : api_(usable_cuda_library(options.library)), vocab_size_(config.vocab_size) {
    gptx_cuda_device device;
    call(api_.device, options.ordinal, &device);
    if (device.usable == 0) {
      throw DeviceError("device 'cuda': " + std::string(device.name) + " has compute capability " +
                        capability_text(device.capability) + ", and this build has code for " + api_.architectures +
                        "; build it with GPTX_CUDA_ARCHS=" + std::to_string(device.capability));
    }
    name_ = "sm_" + std::to_string(device.capability);
    gptx_cuda_model_options o = options_of(config, options);
    std::vector<gptx_cuda_tensor> tensors;
    for (const auto& [name, bytes] : weights.tensors) tensors.push_back({name.c_str(), bytes.data(), bytes.size()});
    o.dtype = static_cast<int32_t>(weights.dtype);
    o.tensors = tensors.data();
    o.n_tensors = tensors.size();
    o.kv_blocks = kv_blocks;
    o.rows = limits.rows;
    o.logit_rows = limits.logit_rows;
    o.steps_ahead = kStepsAhead;
    call(api_.open, &o, &model_);
    kv_block_bytes_ = api_.kv_block_bytes(&o);
    // As in cuda_model.cu: activations in float32, qkv and the MLP in tiles beside them, logits with their weights.
    const size_t columns = 2 * config.n_embd + 3 * config.n_embd + 3 * config.n_inner;
    workspace_bytes_ = sizeof(float) * (limits.rows * columns + 3 * limits.logit_rows * config.vocab_size);
  }
  ~CudaRunner() override { api_.close(model_); }

  bool run(const Step& step, StepResult& result, const std::function<bool()>& interrupted) override {
    check_process();
    const Batch& batch = step.batch;
    parts_.clear();
    size_t row = 0;
    for (size_t s = 0; s < batch.blocks.size(); ++s) {
      const size_t n = batch.lengths[s];
      parts_.push_back({.tokens = batch.tokens.data() + row,
                        .n_tokens = n,
                        .position = batch.positions[row],
                        .blocks = batch.blocks[s].data(),
                        .n_blocks = batch.blocks[s].size(),
                        .n_logits = batch.logit_counts[s]});
      row += n;
    }
    samples_.clear();
    for (const SampleTask& task : step.samples) {
      samples_.push_back({.logit_row = task.logit_row,
                          .position = task.position,
                          .seed = task.params->seed,
                          .repetition_penalty = task.params->repetition_penalty,
                          .temperature = task.params->temperature,
                          .top_p = task.params->top_p,
                          .min_p = task.params->min_p,
                          .top_k = task.params->top_k,
                          .sequence = task.sequence.data(),
                          .n_sequence = task.sequence.size(),
                          .banned = task.banned.data(),
                          .n_banned = task.banned.size()});
    }
    const gptx_cuda_step out{.parts = parts_.data(),
                             .n_parts = parts_.size(),
                             .samples = samples_.data(),
                             .n_samples = samples_.size(),
                             .length = step.length};
    std::vector<int32_t> tokens(step.length * step.samples.size());
    call(api_.run, model_, &out, tokens.data());
    for (size_t i = 0; i < tokens.size(); ++i) result.chosen[i].token = tokens[i];
    rows_.clear();
    return !interrupted || !interrupted();
  }

  std::span<const float> logits(size_t i) override {
    check_process();
    rows_.resize(vocab_size_);
    call(api_.logits, model_, i, rows_.data());
    return rows_;
  }

  void hidden(size_t, std::span<float>) override {}
  void state(size_t, size_t, std::span<float>) override {}
  bool keeps_states() const override { return false; }
  void choose(std::span<float>, const SampleTask&, Choice&) override {}
  void candidates(std::span<const float>, std::span<float>, const SampleTask&, size_t, Candidates&) override {}
  void copy_block(int32_t, int32_t) override {}
  void poison_block(int32_t) override {}
  void read_block(int32_t, std::span<std::byte>) override {}
  void write_block(int32_t, std::span<const std::byte>) override {}

  size_t steps_ahead() const override { return kStepsAhead; }
  size_t kv_block_bytes() const override { return kv_block_bytes_; }
  size_t workspace_bytes() const override { return workspace_bytes_; }
  int threads() const override { return 1; }
  std::string isa() const override { return name_; }

 private:
  static std::string capability_text(int32_t capability) {
    return std::to_string(capability / 10) + "." + std::to_string(capability % 10);
  }

  void check_process() const {
    if (getpid() != process_) {
      throw DeviceError(
          "device 'cuda': this model was loaded before the process was forked, which CUDA does not survive; start "
          "processes with the method \"spawn\", or load the model in the child");
    }
  }

  const gptx_cuda_api& api_;
  gptx_cuda_model* model_ = nullptr;
  pid_t process_ = getpid();
  size_t vocab_size_;
  size_t kv_block_bytes_ = 0, workspace_bytes_ = 0;
  std::string name_;
  std::vector<gptx_cuda_part> parts_;
  std::vector<gptx_cuda_sample> samples_;
  std::vector<float> rows_;
};

}  // namespace

size_t cuda_kv_block_bytes(const GptConfig& config, const CudaOptions& options) {
  const gptx_cuda_model_options o = options_of(config, options);
  return usable_cuda_library(options.library).kv_block_bytes(&o);
}

uint64_t cuda_free_bytes(const CudaOptions& options) {
  gptx_cuda_device device;
  call(usable_cuda_library(options.library).device, options.ordinal, &device);
  return device.free_bytes;
}

std::unique_ptr<Runner> make_cuda_runner(const GptConfig& config, const WeightSource& weights,
                                         const StepLimits& limits, size_t kv_blocks, const CudaOptions& options) {
  return std::make_unique<CudaRunner>(config, weights, limits, kv_blocks, options);
}

}  // namespace gptx
