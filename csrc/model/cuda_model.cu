// Gpt<CudaBackend> behind the C interface of libgptx_cuda.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/error.h"
#include "cuda/abi.h"
#include "cuda/cuda_backend.h"
#include "cuda/probe.h"
#include "model/gpt.h"
#include "model/load_weights.h"

using namespace gptx;
using gptx::cuda::CudaBackend;

static_assert(Backend<CudaBackend>);

namespace {

// Recorded steps that are kept.
constexpr size_t kRecordings = 512;

GptConfig config_of(const gptx_cuda_model_options& o) {
  return {.vocab_size = o.vocab_size,
          .block_size = o.block_size,
          .n_layer = o.n_layer,
          .n_head = o.n_head,
          .n_embd = o.n_embd,
          .n_inner = o.n_inner,
          .activation = o.activation,
          .layer_norm_epsilon = o.layer_norm_epsilon,
          .scale_attn_weights = o.scale_attn_weights != 0,
          .scale_attn_by_inverse_layer_idx = o.scale_attn_by_inverse_layer_idx != 0,
          .tie_word_embeddings = o.tie_word_embeddings != 0};
}

WeightSource source_of(const gptx_cuda_model_options& o) {
  WeightSource source;
  source.dtype = static_cast<DType>(o.dtype);
  for (uint64_t i = 0; i < o.n_tensors; ++i) {
    const gptx_cuda_tensor& t = o.tensors[i];
    source.tensors[t.name] = {static_cast<const std::byte*>(t.data), t.bytes};
  }
  return source;
}

}  // namespace

struct gptx_cuda_model {
 public:
  explicit gptx_cuda_model(const gptx_cuda_model_options& o)
      : config_(config_of(o)),
        precision_(static_cast<Precision>(o.precision)),
        logit_rows_(o.logit_rows),
        steps_ahead_(o.steps_ahead),
        device_(o.device),
        backend_(device_with_room(o), config_, precision_, static_cast<KvType>(o.kv_type), o.kv_blocks,
                 {.rows = o.rows,
                  .logit_rows = o.logit_rows,
                  .context_blocks = (o.block_size + kBlockTokens - 1) / kBlockTokens,
                  .length = o.steps_ahead}),
        gpt_(config_, load_weights<CudaBackend, cuda::Activation>(config_, Loader{*this, source_of(o)}),
             {.x = backend_.make_rows(o.rows, config_.n_embd),
              .qkv = backend_.make_rows(o.rows, qkv_width(config_)),
              .y = backend_.make_operand_rows(o.rows, config_.n_embd),
              .mlp = backend_.make_operand_rows(o.rows, config_.n_inner),
              .logits = backend_.make_logits(o.logit_rows, config_.vocab_size)}),
        final_gain_(config_.n_embd),
        final_bias_(config_.n_embd) {
    device_.download(final_gain_.data(), gpt_.final_norm().gain, config_.n_embd * sizeof(float));
    device_.download(final_bias_.data(), gpt_.final_norm().bias, config_.n_embd * sizeof(float));
    device_.staging(0);
  }

  void run(const gptx_cuda_step& step, int32_t* tokens) {
    Batch batch;
    for (uint64_t i = 0; i < step.n_parts; ++i) {
      const gptx_cuda_part& p = step.parts[i];
      batch.add({p.tokens, p.n_tokens}, p.position, {p.blocks, p.n_blocks}, p.n_kept, p.wants_logits != 0);
    }
    batch.keeps_states = step.keeps_states != 0;
    // Whether every sequence has one row, and it wants logits. Such a step is recorded, with a token for each row in
    // order. Where the device is to choose none, it chooses a greedy one that nobody reads: that leaves the logits as
    // they are, and costs less than to run without a recording.
    const bool decode = batch.size() == step.n_parts && batch.n_logits == step.n_parts;
    if (step.length > 1 && !(decode && step.n_samples == step.n_parts)) {
      throw std::invalid_argument("a step of several tokens that is not all decode");
    }
    SamplingParams greedy;
    greedy.temperature = 0.0;
    std::vector<SamplingParams> params(step.n_samples);
    std::vector<SampleTask> samples(decode ? step.n_parts : step.n_samples);
    for (size_t row = 0; decode && row < samples.size(); ++row) {
      samples[row].logit_row = row;
      samples[row].params = &greedy;
    }
    const auto slot = [&](uint64_t i) { return decode ? step.samples[i].logit_row : i; };
    for (uint64_t i = 0; i < step.n_samples; ++i) {
      const gptx_cuda_sample& s = step.samples[i];
      SamplingParams& p = params[i];
      p.repetition_penalty = s.repetition_penalty;
      p.temperature = s.temperature;
      p.top_k = s.top_k;
      p.top_p = s.top_p;
      p.min_p = s.min_p;
      p.seed = s.seed;
      samples[slot(i)] = {.logit_row = s.logit_row,
                          .position = s.position,
                          .prompt = 0,
                          .sequence = {s.sequence, s.n_sequence},
                          .banned = {s.banned, s.n_banned},
                          .allowed = {},
                          .params = &p};
    }
    backend_.tables().upload(batch, samples, decode, step.length);
    if (decode) {
      // The usual lengths are recorded whole; what is left at the end of a text goes token by token.
      const uint64_t at_once = step.length == steps_ahead_ ? step.length : 1;
      for (uint64_t i = 0; i < step.length; i += at_once) device_.run(*recorded(batch, at_once));
    } else {
      enqueue(batch);
    }
    backend_.tables().download_chosen(step.length);
    device_.synchronize();
    const std::span<const int32_t> chosen = backend_.tables().chosen();
    for (uint64_t t = 0; t < step.length; ++t) {
      for (uint64_t i = 0; i < step.n_samples; ++i) *tokens++ = chosen[t * samples.size() + slot(i)];
    }
  }

  float* logits(std::span<const uint64_t> rows) {
    const size_t v = config_.vocab_size;
    if (rows.size() > logit_rows_) throw std::invalid_argument("more rows of logits than a step has");
    if (host_logits_ == nullptr) {
      host_logits_ = static_cast<float*>(device_.allocate_host(logit_rows_ * v * sizeof(float)));
    }
    for (size_t i = 0; i < rows.size(); ++i) {
      device_.download(host_logits_ + i * v, gpt_.logits().row(static_cast<int>(rows[i])), v * sizeof(float));
    }
    device_.synchronize();
    return host_logits_;
  }

  void hidden(uint64_t row, float* out) {
    device_.download(out, gpt_.hidden().row(static_cast<int>(row)), config_.n_embd * sizeof(float));
    device_.synchronize();
    normalize(out);
  }

  void state(uint64_t layer, uint64_t row, float* out) {
    std::copy_n(backend_.state(layer, row), config_.n_embd, out);
    if (layer == config_.n_layer) normalize(out);
  }

  const char* multiplier() const { return backend_.uses_warpgroups() ? "wgmma" : "mma"; }

  void copy_block(int32_t from, int32_t to) { backend_.copy_block(from, to); }
  void poison_block(int32_t block) { backend_.fill_block(block, 0xFF); }
  void read_block(int32_t block, void* out) {
    backend_.download_block(static_cast<std::byte*>(out), block);
    device_.synchronize();
  }
  void write_block(int32_t block, const void* in) {
    backend_.upload_block(block, static_cast<const std::byte*>(in));
    device_.synchronize();
  }

  std::mutex mutex;  // held through every call

 private:
  // The final norm of a row again: on the device it is part of the product that makes the logits.
  void normalize(float* out) const {
    const size_t n = config_.n_embd;
    const auto count = static_cast<double>(n);
    const double mean = std::accumulate(out, out + n, 0.0) / count;
    double squares = 0.0;
    for (size_t i = 0; i < n; ++i) squares += (out[i] - mean) * (out[i] - mean);
    const double inverse = 1.0 / std::sqrt(squares / count + double{config_.layer_norm_epsilon});
    for (size_t i = 0; i < n; ++i) {
      out[i] = static_cast<float>((out[i] - mean) * inverse * double{final_gain_[i]} + double{final_bias_[i]});
    }
  }

  // Every sequence of a decode step has one row; its kernels differ by the number of rows and of KV
  // blocks, and by whether something is drawn.
  std::shared_ptr<cuda::Device::Recording> recorded(const Batch& batch, uint64_t length) {
    const cuda::StepTables& tables = backend_.tables();
    const auto key = std::array{batch.size(), tables.queries().few_blocks, size_t{length}, size_t{tables.all_greedy()}};
    const auto found = recordings_.find(key);
    if (found != recordings_.end()) return found->second;
    if (recordings_.size() == kRecordings) recordings_.erase(recordings_.begin());
    return recordings_[key] = device_.record([&] {
      for (uint64_t i = 0; i < length; ++i) enqueue(batch);
    });
  }

  void enqueue(const Batch& batch) {
    gpt_.forward(backend_, batch);
    backend_.sample(gpt_.logits());
  }

  // The device, once it is certain that it can hold the model: what that takes is known before the first byte is taken.
  cuda::Device& device_with_room(const gptx_cuda_model_options& o) {
    const size_t shared = device_.properties().shared_bytes;
    if (cuda::sample_shared_bytes(static_cast<int>(config_.vocab_size)) > shared) {
      throw ParameterError("vocab_size", std::to_string(config_.vocab_size),
                           "a vocabulary that " + device_.properties().name + " can sample from");
    }
    uint64_t need = o.kv_blocks * CudaBackend::kv_block_bytes(config_, static_cast<KvType>(o.kv_type));
    const bool expand = precision_ == Precision::kFloat32 && o.dtype != 0;
    const uint64_t widened = expand ? (o.dtype == 1 ? 2 : 4) : 1;
    uint64_t largest = 0;
    for (uint64_t i = 0; i < o.n_tensors; ++i) {
      need += o.tensors[i].bytes * widened;
      largest = std::max<uint64_t>(largest, o.tensors[i].bytes);
    }
    need += largest + sizeof(float) * (o.rows * (2 * config_.n_embd + qkv_width(config_) + 3 * config_.n_inner) +
                                       3 * o.logit_rows * config_.vocab_size);
    const uint64_t have = device_.free_bytes();
    if (need > have) throw OutOfMemoryError("weights, KV cache and activations on the device", need, have);
    return device_;
  }

  // Copies weights to the device (load_weights.h).
  struct Loader {
    const float* vector(const std::string& name, size_t n) const {
      const auto* host = reinterpret_cast<const float*>(source.get(name, n * sizeof(float)));
      return cuda::copy_to(model.device_, host, n, "weights");
    }
    static size_t padded(size_t n) { return (n + cuda::kPanel - 1) / cuda::kPanel * cuda::kPanel; }
    cuda::Norm norm(const std::string& base) const {
      const size_t n = padded(model.config_.n_embd);
      return {vector(base + ".weight", n), vector(base + ".bias", n), model.config_.layer_norm_epsilon};
    }
    // In a deque, so that pointers to it stay valid.
    const cuda::Matrix& matrix(const std::string& base, size_t n, size_t depth) const {
      return model.matrices_.emplace_back(
          cuda::Matrix::from(model.device_, source, base, n, depth, model.precision_));
    }
    cuda::LinearView linear(const std::string& base, size_t n, size_t depth, cuda::Activation activation) const {
      return {&matrix(base, n, depth), vector(base + ".bias", padded(n)), activation};
    }
    cuda::PositionView positions() const {
      const size_t stride = padded(model.config_.n_embd);
      return {vector("wpe.weight", model.config_.block_size * stride), static_cast<int>(stride)};
    }
    cuda::LinearView without_bias(const cuda::Matrix& weight) const {
      return {&weight, nullptr, cuda::Activation::kNone};
    }

    gptx_cuda_model& model;
    WeightSource source;
  };

  GptConfig config_;
  Precision precision_;
  uint64_t logit_rows_;
  uint64_t steps_ahead_;
  cuda::Device device_;
  std::deque<cuda::Matrix> matrices_;
  CudaBackend backend_;
  Gpt<CudaBackend> gpt_;
  float* host_logits_ = nullptr;                // [logit_rows, V], once somebody asks for them
  std::vector<float> final_gain_, final_bias_;  // of the norm in front of the logits, on the host
  std::map<std::array<size_t, 4>, std::shared_ptr<cuda::Device::Recording>> recordings_;
};

namespace {

void set(char* to, size_t size, const std::string& text) { std::snprintf(to, size, "%s", text.c_str()); }

// Nothing thrown crosses the interface.
template <class F>
gptx_cuda_status guarded(gptx_cuda_error* error, F f) noexcept {
  try {
    f();
    return GPTX_CUDA_OK;
  } catch (const ParameterError& e) {
    set(error->param, sizeof error->param, e.param);
    set(error->value, sizeof error->value, e.value);
    set(error->message, sizeof error->message, e.allowed);
    return GPTX_CUDA_PARAMETER;
  } catch (const OutOfMemoryError& e) {
    set(error->message, sizeof error->message, e.what_text);
    error->need = e.need;
    error->have = e.have;
    return GPTX_CUDA_OUT_OF_MEMORY;
  } catch (const DeviceError& e) {
    set(error->message, sizeof error->message, e.what());
    return GPTX_CUDA_DEVICE;
  } catch (const std::exception& e) {
    set(error->message, sizeof error->message, e.what());
    return GPTX_CUDA_INTERNAL;
  }
}

// The same for a function of a model, one at a time: a queue is not to be filled by two, least while it is recorded.
template <class F>
gptx_cuda_status locked(gptx_cuda_model* model, gptx_cuda_error* error, F f) noexcept {
  return guarded(error, [&] {
    const std::lock_guard lock(model->mutex);
    f();
  });
}

constexpr gptx_cuda_api kApi = {
    .abi = GPTX_CUDA_ABI,
    .size = sizeof(gptx_cuda_api),
    .version = GPTX_VERSION,
    .architectures = GPTX_CUDA_ARCHITECTURES,
    .probe = [](gptx_cuda_probe* out) { cuda::probe(*out); },
    .device = [](int32_t index, gptx_cuda_device* out, gptx_cuda_error* error) -> gptx_cuda_status {
      return guarded(error, [&] { cuda::describe_device(index, *out); });
    },
    .kv_block_bytes = [](const gptx_cuda_model_options* o) -> uint64_t {
      return CudaBackend::kv_block_bytes(config_of(*o), static_cast<KvType>(o->kv_type));
    },
    .open = [](const gptx_cuda_model_options* o, gptx_cuda_model** out, gptx_cuda_error* error) -> gptx_cuda_status {
      return guarded(error, [&] { *out = new gptx_cuda_model(*o); });
    },
    .close = [](gptx_cuda_model* model) { delete model; },
    .multiplier = [](const gptx_cuda_model* model) { return model->multiplier(); },
    .run = [](gptx_cuda_model* model, const gptx_cuda_step* step, int32_t* tokens,
              gptx_cuda_error* error) -> gptx_cuda_status {
      return locked(model, error, [&] { model->run(*step, tokens); });
    },
    .logits = [](gptx_cuda_model* model, const uint64_t* rows, uint64_t n, float** out,
                 gptx_cuda_error* error) -> gptx_cuda_status {
      return locked(model, error, [&] { *out = model->logits({rows, n}); });
    },
    .hidden = [](gptx_cuda_model* model, uint64_t row, float* out, gptx_cuda_error* error) -> gptx_cuda_status {
      return locked(model, error, [&] { model->hidden(row, out); });
    },
    .state = [](gptx_cuda_model* model, uint64_t layer, uint64_t row, float* out,
                gptx_cuda_error* error) -> gptx_cuda_status {
      return locked(model, error, [&] { model->state(layer, row, out); });
    },
    .copy_block = [](gptx_cuda_model* model, int32_t from, int32_t to, gptx_cuda_error* error) -> gptx_cuda_status {
      return locked(model, error, [&] { model->copy_block(from, to); });
    },
    .poison_block = [](gptx_cuda_model* model, int32_t block, gptx_cuda_error* error) -> gptx_cuda_status {
      return locked(model, error, [&] { model->poison_block(block); });
    },
    .read_block = [](gptx_cuda_model* model, int32_t block, void* out, gptx_cuda_error* error) -> gptx_cuda_status {
      return locked(model, error, [&] { model->read_block(block, out); });
    },
    .write_block = [](gptx_cuda_model* model, int32_t block, const void* in,
                      gptx_cuda_error* error) -> gptx_cuda_status {
      return locked(model, error, [&] { model->write_block(block, in); });
    },
};

}  // namespace

extern "C" __attribute__((visibility("default"))) const gptx_cuda_api* gptx_cuda_get_api(uint32_t abi) {
  return abi == GPTX_CUDA_ABI ? &kApi : nullptr;
}
