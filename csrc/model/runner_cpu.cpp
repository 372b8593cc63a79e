// Gpt<CpuBackend> behind the Runner seam: names of tensors, sizes of buffers, one fork per step.
#include <algorithm>
#include <cstring>
#include <deque>

#include "core/cpu_count.h"
#include "cpu/cpu_backend.h"
#include "cpu/isa.h"
#include "cpu/logprobs.h"
#include "cpu/sampler.h"
#include "model/gpt.h"
#include "model/load_weights.h"
#include "model/runner.h"

namespace gptx {
namespace {

using cpu::CpuBackend;
using cpu::CpuDevice;
using cpu::kPanel;
using cpu::PackedMatrix;
using cpu::round_up;

static_assert(Backend<CpuBackend>);

class CpuRunner final : public Runner {
 public:
  CpuRunner(const GptConfig& config, const WeightSource& source, const StepLimits& limits,
            size_t kv_blocks, const CpuOptions& options)
      : config_(config),
        options_(options),
        device_(config, options.kv_type, kv_blocks, limits.rows,
                options.threads > 0 ? options.threads : usable_cpus(), options.isa),
        samplers_(static_cast<size_t>(device_.team.size()), cpu::Sampler(config.vocab_size, device_.kernels)),
        chooser_(config.vocab_size, device_.kernels),
        gpt_(config, load_weights<CpuBackend, cpu::Activation>(config, Loader{*this, source}),
             make_activations(limits)) {}

  bool run(const Step& step, StepResult& result, const std::function<bool()>& interrupted) override {
    device_.begin_step(step.batch);
    return device_.team.run(
        [&](int rank) {
          CpuBackend worker(device_, rank);
          gpt_.forward(worker, step.batch);
          cpu::Sampler& sampler = samplers_[static_cast<size_t>(rank)];
          device_.team.for_each(rank, step.scores.size(), [&](size_t i) {
            const ScoreTask& task = step.scores[i];
            cpu::score(device_.kernels, row(task.logit_row), task, result.scores[i]);
          });
          device_.team.for_each(rank, step.samples.size(), [&](size_t i) {
            sampler.sample(row(step.samples[i].logit_row), step.samples[i], result.chosen[i]);
          });
        },
        interrupted);
  }

  std::span<const float> logits(size_t i) override { return row(i); }

  void hidden(size_t i, std::span<float> out) override { normalize(gpt_.hidden().row(i), out); }

  void state(size_t layer, size_t row, std::span<float> out) override {
    const std::span<const float> state = device_.state(layer, row);
    if (layer == config_.n_layer) return normalize(state.data(), out);
    std::copy(state.begin(), state.end(), out.begin());
  }

  void choose(std::span<float> logits, const SampleTask& task, Choice& out) override {
    chooser_.sample(logits, task, out);
  }

  void candidates(std::span<const float> logits, std::span<float> given, const SampleTask& task, size_t n,
                  Candidates& out) override {
    chooser_.candidates(logits, given, task, n, out);
  }

  void copy_block(int32_t from, int32_t to) override {
    const std::span<std::byte> source = device_.kv_block(from);
    std::memcpy(device_.kv_block(to).data(), source.data(), source.size());
  }
  void poison_block(int32_t block) override {
    const std::span<std::byte> bytes = device_.kv_block(block);
    std::memset(bytes.data(), 0xFF, bytes.size());
  }
  void read_block(int32_t block, std::span<std::byte> out) override {
    std::memcpy(out.data(), device_.kv_block(block).data(), out.size());
  }
  void write_block(int32_t block, std::span<const std::byte> in) override {
    std::memcpy(device_.kv_block(block).data(), in.data(), in.size());
  }

  size_t kv_block_bytes() const override { return cpu_kv_block_bytes(config_, options_.kv_type); }
  size_t workspace_bytes() const override {
    const Activations<CpuBackend>& a = gpt_.activations();
    size_t bytes = device_.workspace_bytes() + no_bias_.bytes();
    for (const cpu::RowBuffer* rows : {&a.x, &a.qkv, &a.y, &a.mlp, &a.logits}) bytes += rows->buffer.bytes();
    return bytes + (samplers_.size() + 1) * chooser_.bytes();
  }
  int threads() const override { return device_.team.size(); }
  std::string isa() const override { return device_.kernels.name; }

 private:
  void normalize(const float* x, std::span<float> out) const {
    const cpu::NormView& norm = gpt_.final_norm();
    device_.kernels.layer_norm(out.data(), x, norm.gain, norm.bias, config_.n_embd, norm.epsilon);
  }

  std::span<float> row(size_t i) { return {gpt_.logits().row(i), config_.vocab_size}; }

  // Weights stay where they lie (load_weights.h).
  struct Loader {
    const float* vector(const std::string& name, size_t n) const {
      return reinterpret_cast<const float*>(source.get(name, n * sizeof(float)));
    }
    cpu::NormView norm(const std::string& base) const {
      const size_t n = round_up(runner.config_.n_embd, kPanel);
      return {vector(base + ".weight", n), vector(base + ".bias", n), runner.config_.layer_norm_epsilon};
    }
    // In a deque, so that views of it stay valid.
    const PackedMatrix& matrix(const std::string& base, size_t n, size_t depth) const {
      return runner.matrices_.emplace_back(PackedMatrix::from(
          source, base, n, depth, runner.options_.precision, runner.device_.team));
    }
    cpu::LinearView linear(const std::string& base, size_t n, size_t depth,
                           cpu::Activation activation) const {
      return {&matrix(base, n, depth), vector(base + ".bias", round_up(n, kPanel)), activation};
    }
    cpu::PositionView positions() const {
      const size_t stride = round_up(runner.config_.n_embd, kPanel);
      return {vector("wpe.weight", runner.config_.block_size * stride), stride};
    }
    cpu::LinearView without_bias(const PackedMatrix& weight) const {
      runner.no_bias_ = AlignedBuffer<float>(weight.n);
      return {&weight, runner.no_bias_.data(), cpu::Activation::kNone};
    }

    CpuRunner& runner;
    const WeightSource& source;
  };

  Activations<CpuBackend> make_activations(const StepLimits& limits) const {
    return {.x = {limits.rows, config_.n_embd},
            .qkv = {limits.rows, qkv_width(config_)},
            .y = {limits.rows, config_.n_embd},
            .mlp = {limits.rows, config_.n_inner},
            .logits = {limits.logit_rows, config_.vocab_size}};
  }

  GptConfig config_;
  CpuOptions options_;
  CpuDevice device_;
  std::deque<PackedMatrix> matrices_;
  AlignedBuffer<float> no_bias_;
  std::vector<cpu::Sampler> samplers_;  // one for each member of the team
  cpu::Sampler chooser_;
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
