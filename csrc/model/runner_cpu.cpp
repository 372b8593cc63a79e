// Gpt<CpuBackend> behind the Runner seam: names of tensors, sizes of buffers, one fork per step.
#include <deque>

#include "core/cpu_count.h"
#include "cpu/cpu_backend.h"
#include "cpu/isa.h"
#include "cpu/sampler.h"
#include "model/gpt.h"
#include "model/runner.h"

namespace gptx {
namespace {

using cpu::CpuBackend;
using cpu::CpuDevice;
using cpu::kPanel;
using cpu::PackedMatrix;
using cpu::round_up;

static_assert(Backend<CpuBackend>);

cpu::Activation activation_named(const std::string& name) {
  if (name == "gelu_new") return cpu::Activation::kGeluNew;
  if (name == "gelu") return cpu::Activation::kGelu;
  if (name == "relu") return cpu::Activation::kRelu;
  throw ParameterError("activation", "'" + name + "'", "one of gelu_new, gelu, relu");
}

class CpuRunner final : public Runner {
 public:
  CpuRunner(const GptConfig& config, const WeightSource& source, const StepLimits& limits,
            size_t kv_blocks, const CpuOptions& options)
      : config_(config),
        options_(options),
        device_(config, options.kv_type, kv_blocks, limits.rows,
                options.threads > 0 ? options.threads : usable_cpus(), options.isa),
        sampler_(config.vocab_size),
        gpt_(config, load_weights(source), make_activations(limits)) {}

  bool run(const Step& step, std::span<int32_t> tokens,
           const std::function<bool()>& interrupted) override {
    device_.begin_step(step.batch);
    const bool completed = device_.team.run(
        [&](int rank) {
          CpuBackend worker(device_, rank);
          gpt_.forward(worker, step.batch);
        },
        interrupted);
    if (!completed) return false;
    for (size_t i = 0; i < step.samples.size(); ++i) {
      const SampleTask& task = step.samples[i];
      tokens[i] = sampler_.sample(row(task.logit_row), task);
    }
    return true;
  }

  std::span<const float> logits(size_t i) override { return row(i); }

  size_t kv_block_bytes() const override { return cpu_kv_block_bytes(config_, options_.kv_type); }
  int threads() const override { return device_.team.size(); }
  std::string isa() const override { return device_.kernels.name; }

 private:
  std::span<float> row(size_t i) { return {gpt_.logits().row(i), config_.vocab_size}; }

  static const float* vector(const WeightSource& source, const std::string& name, size_t n) {
    return reinterpret_cast<const float*>(source.get(name, round_up(n, kPanel) * sizeof(float)));
  }

  cpu::NormView norm(const WeightSource& source, const std::string& base) const {
    return {vector(source, base + ".weight", config_.n_embd),
            vector(source, base + ".bias", config_.n_embd), config_.layer_norm_epsilon};
  }

  // In a deque, so that views of it stay valid.
  const PackedMatrix& matrix(const WeightSource& source, const std::string& base, size_t n,
                             size_t depth) {
    return matrices_.emplace_back(
        PackedMatrix::from(source, base, n, depth, options_.precision, device_.team));
  }

  cpu::LinearView linear(const WeightSource& source, const std::string& base, size_t n,
                         size_t depth, cpu::Activation activation = cpu::Activation::kNone) {
    return {&matrix(source, base, n, depth), vector(source, base + ".bias", n), activation};
  }

  GptWeights<CpuBackend> load_weights(const WeightSource& source) {
    const size_t c = config_.n_embd;
    const size_t qkv = 3 * config_.n_head * round_up(config_.head_size(), kPanel);
    const cpu::Activation activation = activation_named(config_.activation);
    GptWeights<CpuBackend> w;
    w.wpe = positions(source);
    for (size_t i = 0; i < config_.n_layer; ++i) {
      const std::string h = "h." + std::to_string(i) + ".";
      w.blocks.push_back({.ln_1 = norm(source, h + "ln_1"),
                          .attn_c_attn = linear(source, h + "attn.c_attn", qkv, c),
                          .attn_c_proj = linear(source, h + "attn.c_proj", c, c),
                          .ln_2 = norm(source, h + "ln_2"),
                          .mlp_c_fc = linear(source, h + "mlp.c_fc", config_.n_inner, c, activation),
                          .mlp_c_proj = linear(source, h + "mlp.c_proj", c, config_.n_inner)});
    }
    w.ln_f = norm(source, "ln_f");
    w.wte = &matrix(source, "wte", config_.vocab_size, c);
    const PackedMatrix& lm_head =
        config_.tie_word_embeddings ? *w.wte : matrix(source, "lm_head", config_.vocab_size, c);
    no_bias_ = AlignedBuffer<float>(lm_head.n);
    w.lm_head = {&lm_head, no_bias_.data(), cpu::Activation::kNone};
    return w;
  }

  cpu::PositionView positions(const WeightSource& source) const {
    const size_t stride = round_up(config_.n_embd, kPanel);
    return {reinterpret_cast<const float*>(
                source.get("wpe.weight", config_.block_size * stride * sizeof(float))),
            stride};
  }

  Activations<CpuBackend> make_activations(const StepLimits& limits) const {
    const size_t width = round_up(config_.head_size(), kPanel);
    return {.x = {limits.rows, config_.n_embd},
            .qkv = {limits.rows, 3 * config_.n_head * width},
            .y = {limits.rows, config_.n_embd},
            .mlp = {limits.rows, config_.n_inner},
            .logits = {limits.logit_rows, config_.vocab_size}};
  }

  GptConfig config_;
  CpuOptions options_;
  CpuDevice device_;
  std::deque<PackedMatrix> matrices_;
  AlignedBuffer<float> no_bias_;
  cpu::Sampler sampler_;
  Gpt<CpuBackend> gpt_;
};

}  // namespace

size_t cpu_kv_block_bytes(const GptConfig& config, KvType kv_type) {
  return CpuDevice::kv_block_bytes(config, kv_type);
}

std::unique_ptr<Runner> make_cpu_runner(const GptConfig& config, const WeightSource& weights,
                                        const StepLimits& limits, size_t kv_blocks,
                                        const CpuOptions& options) {
  return std::make_unique<CpuRunner>(config, weights, limits, kv_blocks, options);
}

}  // namespace gptx
