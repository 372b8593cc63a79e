// The one virtual seam: what the engine sees of a model on a device. Crossed once per step.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "core/batch.h"
#include "core/config.h"
#include "core/precision.h"
#include "core/sampling.h"
#include "core/weights.h"

namespace gptx {

// The most rows a step may have, and the most that may want logits.
struct StepLimits {
  size_t rows = 512;
  size_t logit_rows = 64;
};

// One step: the rows to compute, the tokens to choose from their logits and those to look up there.
struct Step {
  Batch batch;
  std::vector<SampleTask> samples;
  std::vector<ScoreTask> scores;
  // More than 1: each token is fed back as the next row of its sequence. Every sequence of the batch then has
  // one row and one sample, in the same order, and its parameters are stateless.
  size_t length = 1;
};

struct StepResult {
  // Made for a step, with room for all that it asks.
  explicit StepResult(const Step& step) : chosen(step.length * step.samples.size()), scores(step.scores.size()) {
    for (size_t i = 0; i < chosen.size(); ++i) {
      const int n = step.samples[i % step.samples.size()].params->logprobs;
      chosen[i].top.reserve(n > 0 ? static_cast<size_t>(n) : 0);
    }
    for (size_t i = 0; i < scores.size(); ++i) scores[i].top.reserve(step.scores[i].top);
  }

  std::vector<Choice> chosen;  // [length, samples]
  std::vector<Score> scores;
};

// How a CPU runner computes.
struct CpuOptions {
  Precision precision = Precision::kFloat32;
  KvType kv_type = KvType::kFloat32;
  int threads = 0;  // 0: all usable CPUs
  std::string isa;  // empty: the best one
};

// How a CUDA runner computes.
struct CudaOptions {
  Precision precision = Precision::kFloat32;
  KvType kv_type = KvType::kFloat32;
  int ordinal = 0;      // of the device
  std::string library;  // the path of libgptx_cuda
};

class Runner {
 public:
  virtual ~Runner() = default;

  // Runs the step. `interrupted` is polled; false is returned when it stopped the step, whose results are
  // then void.
  virtual bool run(const Step& step, StepResult& result, const std::function<bool()>& interrupted) = 0;

  // Of the i-th row that the batch kept, until the next step: its logits [V], where it wanted them and no token was
  // chosen from them, and its hidden state [C], the residual stream after the final norm.
  virtual std::span<const float> logits(size_t i) = 0;
  virtual void hidden(size_t i, std::span<float> out) = 0;

  // Of a row of a step whose batch kept states: the state [C] before layer n, behind the final norm for n = L.
  virtual void state(size_t layer, size_t row, std::span<float> out) = 0;

  // Chooses from logits [V] of the host, beside a step that runs; they may be changed. One call at a time.
  virtual void choose(std::span<float> logits, const SampleTask& task, Choice& out) = 0;
  // The n best tokens in its place, by scores that may be given instead of log softmax(logits): see cpu::Sampler.
  virtual void candidates(std::span<const float> logits, std::span<float> given, const SampleTask& task, size_t n,
                          Candidates& out) = 0;

  // The KV cache, block by block. A poisoned block is NaN all over, so that whoever reads it shows.
  virtual void copy_block(int32_t from, int32_t to) = 0;
  virtual void poison_block(int32_t block) = 0;
  virtual void read_block(int32_t block, std::span<std::byte> out) = 0;
  virtual void write_block(int32_t block, std::span<const std::byte> in) = 0;

  // The longest step that saves time.
  virtual size_t steps_ahead() const { return 1; }

  virtual size_t kv_block_bytes() const = 0;
  // Bytes that it takes besides the weights and the KV blocks.
  virtual size_t workspace_bytes() const = 0;
  virtual int threads() const = 0;
  virtual std::string isa() const = 0;
};

// Weights are used in place and must outlive the runner.
std::unique_ptr<Runner> make_cpu_runner(const GptConfig& config, const WeightSource& weights,
                                        const StepLimits& limits, size_t kv_blocks,
                                        const CpuOptions& options);

// Weights are copied to the device. Throws DeviceError, OutOfMemoryError.
std::unique_ptr<Runner> make_cuda_runner(const GptConfig& config, const WeightSource& weights,
                                         const StepLimits& limits, size_t kv_blocks, const CudaOptions& options);

// Bytes of one KV block, before there is a runner.
size_t cpu_kv_block_bytes(const GptConfig& config, KvType kv_type);
size_t cuda_kv_block_bytes(const GptConfig& config, const CudaOptions& options);

// What the device has free now.
uint64_t cuda_free_bytes(const CudaOptions& options);

}  // namespace gptx
