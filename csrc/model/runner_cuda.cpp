// A model behind libgptx_cuda as a Runner.
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

#include "core/cpu_count.h"
#include "core/error.h"
#include "core/thread_team.h"
#include "cpu/isa.h"
#include "cpu/logprobs.h"
#include "cpu/sampler.h"
#include "model/cuda_library.h"
#include "model/runner.h"

namespace gptx {
namespace {

// Tokens of one call where nothing else is to be computed: what is lost to a stop string is little.
constexpr size_t kStepsAhead = 8;
// The most threads that choose tokens on the host.
constexpr int kHostThreads = 8;

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

// Whether the device can choose a token; all others are chosen on the host, from the logits of the device.
bool is_for_device(const SampleTask& task) {
  return task.params->is_simple() && task.allowed.empty() && task.bias.empty() && task.forced == kNoToken;
}

class CudaRunner final : public Runner {
 public:
  CudaRunner(const GptConfig& config, const WeightSource& weights, const StepLimits& limits, size_t kv_blocks,
             const CudaOptions& options)
      : api_(usable_cuda_library(options.library)),
        vocab_size_(config.vocab_size),
        chooser_(config.vocab_size, cpu::kernels_named("")) {
    gptx_cuda_device device;
    call(api_.device, options.ordinal, &device);
    if (device.usable == 0) {
      throw DeviceError("device 'cuda': " + std::string(device.name) + " has compute capability " +
                        capability_text(device.capability) + ", and this build has code for " + api_.architectures +
                        "; build it with GPTX_CUDA_ARCHS=" + std::to_string(device.capability));
    }
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
    name_ = "sm_" + std::to_string(device.capability) + " " + api_.multiplier(model_);
    kv_block_bytes_ = api_.kv_block_bytes(&o);
    // As in cuda_model.cu: activations in float32, qkv and the MLP in tiles beside them, logits with their weights.
    const size_t columns = 2 * config.n_embd + 3 * config.n_embd + 3 * config.n_inner;
    workspace_bytes_ = sizeof(float) * (limits.rows * columns + 3 * limits.logit_rows * config.vocab_size);
  }
  ~CudaRunner() override { api_.close(model_); }

  bool run(const Step& step, StepResult& result, const std::function<bool()>& interrupted) override {
    check_process();
    const Batch& batch = step.batch;
    n_logits_ = batch.n_logits;
    fetched_ = 0;
    parts_.clear();
    size_t row = 0, kept = 0;
    for (size_t s = 0; s < batch.blocks.size(); ++s) {
      const size_t n = batch.lengths[s];
      kept += batch.kept_counts[s];
      parts_.push_back({.tokens = batch.tokens.data() + row,
                        .n_tokens = n,
                        .position = batch.positions[row],
                        .blocks = batch.blocks[s].data(),
                        .n_blocks = batch.blocks[s].size(),
                        .n_kept = batch.kept_counts[s],
                        .wants_logits = kept <= batch.n_logits});
      row += n;
    }
    // A step of several tokens has none for the host: their parameters are stateless.
    samples_.clear();
    for_device_.clear();
    for_host_.clear();
    for (size_t i = 0; i < step.samples.size(); ++i) {
      const SampleTask& task = step.samples[i];
      (is_for_device(task) ? for_device_ : for_host_).push_back(i);
      if (!is_for_device(task)) continue;
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
                             .length = step.length,
                             .keeps_states = batch.keeps_states};
    std::vector<int32_t> tokens(step.length * samples_.size());
    call(api_.run, model_, &out, tokens.data());
    for (size_t i = 0; i < tokens.size(); ++i) {
      const size_t t = i / samples_.size(), sample = for_device_[i % samples_.size()];
      result.chosen[t * step.samples.size() + sample].token = tokens[i];
    }
    if (!for_host_.empty() || !step.scores.empty()) run_on_host(step, result);
    return !interrupted || !interrupted();
  }

  // Who asks for one row after another gets ever more of them in a call.
  std::span<const float> logits(size_t i) override {
    check_process();
    if (i < first_fetched_ || i >= first_fetched_ + fetched_) {
      const bool next = fetched_ > 0 && i == first_fetched_ + fetched_;
      std::vector<uint64_t> wanted(std::min(next ? 2 * fetched_ : 1, n_logits_ - i));
      std::iota(wanted.begin(), wanted.end(), i);
      fetched_ = 0;
      call(api_.logits, model_, wanted.data(), wanted.size(), &rows_);
      first_fetched_ = i;
      fetched_ = wanted.size();
    }
    return {rows_ + (i - first_fetched_) * vocab_size_, vocab_size_};
  }

  void hidden(size_t i, std::span<float> out) override {
    check_process();
    call(api_.hidden, model_, i, out.data());
  }

  void state(size_t layer, size_t row, std::span<float> out) override {
    check_process();
    call(api_.state, model_, layer, row, out.data());
  }

  void choose(std::span<float> logits, const SampleTask& task, Choice& out) override {
    chooser_.sample(logits, task, out);
  }
  void candidates(std::span<const float> logits, std::span<float> given, const SampleTask& task, size_t n,
                  Candidates& out) override {
    chooser_.candidates(logits, given, task, n, out);
  }

  void copy_block(int32_t from, int32_t to) override {
    check_process();
    call(api_.copy_block, model_, from, to);
  }
  // Called where blocks are given back, which cannot fail: what is wrong with the device, its next step says.
  void poison_block(int32_t block) override {
    if (getpid() != process_) return;
    gptx_cuda_error error = {};
    static_cast<void>(api_.poison_block(model_, block, &error));
  }
  void read_block(int32_t block, std::span<std::byte> out) override {
    check_process();
    call(api_.read_block, model_, block, static_cast<void*>(out.data()));
  }
  void write_block(int32_t block, std::span<const std::byte> in) override {
    check_process();
    call(api_.write_block, model_, block, static_cast<const void*>(in.data()));
  }

  size_t steps_ahead() const override { return kStepsAhead; }
  size_t kv_block_bytes() const override { return kv_block_bytes_; }
  size_t workspace_bytes() const override { return workspace_bytes_; }
  int threads() const override { return 1; }
  std::string isa() const override { return name_; }

 private:
  // Threads that choose tokens from logits of the device, with what each of them needs.
  struct Host {
    explicit Host(size_t vocab_size)
        : team(std::min(usable_cpus(), kHostThreads)),
          samplers(static_cast<size_t>(team.size()), cpu::Sampler(vocab_size, kernels)) {}
    const cpu::KernelTable& kernels = cpu::kernels_named("");
    ThreadTeam team;
    std::vector<cpu::Sampler> samplers;
  };

  // The scores of a step, and the tokens that the device does not choose. Every row comes to the host once.
  void run_on_host(const Step& step, StepResult& result) {
    if (!host_) host_ = std::make_unique<Host>(vocab_size_);
    places_.assign(step.batch.n_logits, kNowhere);
    size_t n = 0;
    const auto want = [&](size_t row) {
      if (places_[row] == kNowhere) places_[row] = n++;
    };
    for (const ScoreTask& task : step.scores) want(task.logit_row);
    for (const size_t i : for_host_) want(step.samples[i].logit_row);
    std::vector<uint64_t> wanted(n);
    for (size_t row = 0; row < places_.size(); ++row) {
      if (places_[row] != kNowhere) wanted[places_[row]] = row;
    }
    call(api_.logits, model_, wanted.data(), n, &rows_);
    const auto row_of = [&](size_t row) { return std::span(rows_ + places_[row] * vocab_size_, vocab_size_); };
    host_->team.run([&](int rank) {
      host_->team.for_each(rank, step.scores.size(), [&](size_t i) {
        cpu::score(host_->kernels, row_of(step.scores[i].logit_row), step.scores[i], result.scores[i]);
      });
      host_->team.for_each(rank, for_host_.size(), [&](size_t i) {
        const SampleTask& task = step.samples[for_host_[i]];
        host_->samplers[static_cast<size_t>(rank)].sample(row_of(task.logit_row), task, result.chosen[for_host_[i]]);
      });
    });
  }

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
  std::vector<size_t> for_device_, for_host_;  // which samples of the step are whose
  size_t n_logits_ = 0;                        // rows of the last step that have logits
  float* rows_ = nullptr;                      // of the library: those that were asked for last [rows, V]
  size_t first_fetched_ = 0, fetched_ = 0;     // of these, by `logits`
  cpu::Sampler chooser_;

  static constexpr size_t kNowhere = ~size_t{0};
  std::unique_ptr<Host> host_;   // once it is needed
  std::vector<size_t> places_;   // of the step's logits, in rows_
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
