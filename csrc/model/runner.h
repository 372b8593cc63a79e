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

// One step: the rows to compute and the tokens to choose from their logits.
struct Step {
  Batch batch;
  std::vector<SampleTask> samples;
  // More than 1: each token is fed back as the next row of its sequence. Every sequence of the batch then has
  // one row and one sample, in the same order, without penalty or banned tokens.
  size_t length = 1;
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

  // Runs the step and chooses its tokens [length, samples]. `interrupted` is polled; false is returned
  // when it stopped the step, whose results are then void.
  virtual bool run(const Step& step, std::span<int32_t> tokens,
                   const std::function<bool()>& interrupted) = 0;

  // The logits [V] of the i-th row that wanted them, until the next step.
  virtual std::span<const float> logits(size_t i) = 0;

  // The longest step that saves time.
  virtual size_t steps_ahead() const { return 1; }

  virtual size_t kv_block_bytes() const = 0;
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
