// The engine: requests as Python sees them, with the GIL released while it computes.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <limits>
#include <optional>

#include "bindings/buffers.h"
#include "bindings/module.h"
#include "bindings/names.h"
#include "bindings/params.h"
#include "bindings/without_gil.h"
#include "core/cpu_count.h"
#include "cpu/isa.h"
#include "engine/engine.h"

namespace py = pybind11;

namespace gptx {
namespace {

// Rows of a step that may want logits.
constexpr size_t kLogitRows = StepLimits().logit_rows;

// Seconds from which on a deadline is none.
constexpr double kLongest = 1e9;

using Ids = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;
using Words = py::array_t<uint32_t, py::array::c_style | py::array::forcecast>;
using Row = py::array_t<float, py::array::c_style | py::array::forcecast>;

// True once a signal handler has raised, whose exception is then pending, or the interpreter ends. Called without the
// GIL.
bool signal_raised() {
  if (at_exit()) return true;
  const py::gil_scoped_acquire acquired;
  return PyErr_CheckSignals() != 0;
}

GptConfig config_from(const py::dict& d) {
  GptConfig c;
  c.vocab_size = d["vocab_size"].cast<size_t>();
  c.block_size = d["block_size"].cast<size_t>();
  c.n_layer = d["n_layer"].cast<size_t>();
  c.n_head = d["n_head"].cast<size_t>();
  c.n_embd = d["n_embd"].cast<size_t>();
  c.n_inner = d["n_inner"].cast<size_t>();
  c.activation = d["activation"].cast<std::string>();
  c.layer_norm_epsilon = d["layer_norm_epsilon"].cast<float>();
  c.scale_attn_weights = d["scale_attn_weights"].cast<bool>();
  c.scale_attn_by_inverse_layer_idx = d["scale_attn_by_inverse_layer_idx"].cast<bool>();
  c.tie_word_embeddings = d["tie_word_embeddings"].cast<bool>();
  return c;
}

DType dtype_named(const std::string& name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "int8") return DType::kInt8;
  throw ParameterError("dtype", "'" + name + "'", "one of float32, bfloat16, int8");
}

// What weights of this type can be multiplied as; float32 is always possible, by expanding them.
void check_precision(const std::string& name, const std::string& dtype) {
  if (name == "float32" || name == dtype || (name == "int8-fast" && dtype == "int8")) return;
  const std::string allowed = dtype == "int8" ? "int8, int8-fast or float32" : dtype + " or float32";
  throw ParameterError("precision", name,
                       (dtype == "float32" ? dtype : allowed) + " for " + dtype + " weights");
}

const char* finish_name(Finish finish) {
  switch (finish) {
    case Finish::kStop: return "stop";
    case Finish::kLength: return "length";
    case Finish::kTime: return "time";
    case Finish::kNonFinite: return "non_finite";
    case Finish::kDone: return "done";
    case Finish::kNone: break;
  }
  return "";
}

// The engine and what it reads: the tensors belong to Python objects that must outlive it.
class PyEngine {
 public:
  PyEngine(const py::dict& config, const std::string& dtype, py::dict tensors,
           const std::string& device, int threads, const std::string& isa,
           const std::string& precision, const std::string& kv_cache_dtype,
           std::optional<uint64_t> kv_cache_bytes, uint64_t prefix_cache_bytes, size_t step_tokens, int ordinal,
           const std::string& cuda_library, bool poison)
      : config_(config_from(config)), tensors_(std::move(tensors)), precision_(precision) {
    WeightSource source;
    source.dtype = dtype_named(dtype);
    if (precision_.empty()) precision_ = dtype;
    const Precision computed = precision_named(precision_);
    check_precision(precision_, dtype);
    kv_cache_dtype_ = kv_cache_dtype;
    if (kv_cache_dtype_.empty()) {
      kv_cache_dtype_ = computed == Precision::kFloat32 ? "float32" : "bfloat16";
    }
    const KvType kv_type = kv_type_named(kv_cache_dtype_);
    for (const auto& [name, buffer] : tensors_) {
      source.tensors[name.cast<std::string>()] = bytes_of(buffer);
    }
    const WithoutGil released;
    const StepLimits limits{.rows = step_tokens, .logit_rows = kLogitRows};
    const auto blocks_in = [&](uint64_t bytes, uint64_t block_bytes) {
      const uint64_t context_blocks = (config_.block_size + kBlockTokens - 1) / kBlockTokens;
      return std::max(context_blocks, bytes / block_bytes);
    };
    std::unique_ptr<Runner> runner;
    size_t blocks = 0;
    if (device == "cuda") {
      const CudaOptions options{computed, kv_type, ordinal, cuda_library};
      const uint64_t bytes = kv_cache_bytes ? *kv_cache_bytes : cuda_free_bytes(options) / 4;
      blocks = blocks_in(bytes, cuda_kv_block_bytes(config_, options));
      runner = make_cuda_runner(config_, source, limits, blocks, options);
    } else {
      const CpuOptions options{computed, kv_type, threads, isa};
      blocks = blocks_in(kv_cache_bytes.value_or(0), cpu_kv_block_bytes(config_, kv_type));
      runner = make_cpu_runner(config_, source, limits, blocks, options);
    }
    const size_t cached = prefix_cache_bytes / runner->kv_block_bytes();
    engine_ = std::make_unique<Engine>(
        std::move(runner), config_, limits,
        EngineOptions{.kv_blocks = blocks, .cached_blocks = cached, .poison = poison});
  }

  int64_t submit(const Ids& ids, const py::dict& sampling, size_t max_new_tokens, size_t min_new_tokens,
                 std::vector<int32_t> end_tokens, std::vector<int32_t> forced_tokens, int32_t forced_end, size_t slide,
                 size_t lookup, std::optional<double> seconds, bool held, bool hidden,
                 size_t wanted, std::optional<size_t> logits, int64_t parent) {
    const size_t limit = slide > 0 ? std::numeric_limits<size_t>::max() : config_.block_size - (held ? 0 : 1);
    RequestParams params{.sampling = sampling_params_from(sampling),
                         .max_new_tokens = max_new_tokens,
                         .min_new_tokens = min_new_tokens,
                         .end_tokens = std::move(end_tokens),
                         .forced_tokens = std::move(forced_tokens),
                         .forced_end = forced_end,
                         .slide = std::min(slide, config_.block_size),
                         .lookup = lookup,
                         .deadline = std::nullopt,
                         .held = held,
                         .hidden = hidden,
                         .wanted = wanted,
                         .logits = logits.value_or(std::numeric_limits<size_t>::max())};
    check_ids("forced_tokens", params.forced_tokens);
    check_ids("sampling", params.sampling.dry_breakers);
    for (const std::vector<int32_t>& word : params.sampling.bad_words) check_ids("sampling", word);
    for (const TokenBias& bias : params.sampling.logit_bias) check_ids("sampling", std::span(&bias.token, 1));
    if (forced_end != kNoToken) check_ids("forced_end", std::span(&forced_end, 1));
    check_ids("end_tokens", params.end_tokens);
    if (seconds && *seconds < kLongest) {
      params.deadline = Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(*seconds));
    }
    const std::span<const int32_t> tokens = checked(ids, limit);
    params.wanted = std::min(std::max<size_t>(wanted, 1), tokens.size());
    return engine_->submit(tokens, params, parent);
  }

  int64_t submit_score(const Ids& ids, size_t first, size_t top, int64_t parent) {
    const std::span<const int32_t> tokens = checked(ids, config_.block_size + 1);
    if (first < 1 || first >= tokens.size()) {
      throw ParameterError("first", std::to_string(first), "1 to " + std::to_string(tokens.size() - 1));
    }
    return engine_->submit_score(tokens, first, std::min(top, config_.vocab_size), parent);
  }

  // [(request, token, finish, logprob, top)]
  py::list advance(const std::vector<int64_t>& requests) {
    std::vector<Event> events;
    {
      const WithoutGil released;
      events = engine_->advance(requests, signal_raised);
    }
    raise_interruption();
    py::list out;
    for (const Event& e : events) out.append(event_tuple(e));
    return out;
  }

  void feed(int64_t request, const Ids& ids, size_t wanted) {
    const size_t have = tokens(request).size();
    const std::span<const int32_t> tokens = checked(ids, config_.block_size - std::min(have, config_.block_size));
    const WithoutGil released;
    engine_->feed(request, tokens, std::min(std::max<size_t>(wanted, 1), tokens.size()));
  }

  void truncate(int64_t request, size_t n) {
    const size_t have = tokens(request).size();
    if (n < 1 || n > have) throw ParameterError("n", std::to_string(n), "1 to " + std::to_string(have));
    const WithoutGil released;
    engine_->truncate(request, n);
  }

  int64_t fork(int64_t request) {
    const WithoutGil released;
    return engine_->fork(request);
  }

  // As an event of `advance`. `logits` [V] are copied; None: those of the request. `allowed` is a bit mask of the
  // vocabulary or empty.
  py::tuple choose(int64_t request, const std::optional<Row>& logits, const Words& allowed) {
    std::vector<float> copy;
    if (logits) copy = row_from("logits", *logits);
    const std::span<const uint32_t> mask = mask_from(allowed);
    Event event;
    {
      const WithoutGil released;
      event = engine_->choose(request, copy, mask);
    }
    return event_tuple(event);
  }

  // (ids [n], scores [n], log-probabilities [n], most likely tokens, log of the sum of exp(score)), or None where a
  // logit is not finite.
  py::object candidates(int64_t request, size_t n, const std::optional<Row>& scores,
                        const std::vector<std::pair<int32_t, float>>& bias, const Words& allowed) {
    std::vector<float> given;
    if (scores) given = row_from("scores", *scores);
    const std::span<const uint32_t> mask = mask_from(allowed);
    std::vector<TokenBias> biases;
    for (const auto& [token, amount] : bias) {
      check_ids("bias", std::span(&token, 1));
      biases.push_back({token, amount});
    }
    n = std::min(std::max<size_t>(n, 1), config_.vocab_size);
    Candidates found;
    {
      const WithoutGil released;
      found = engine_->candidates(request, n, given, biases, mask);
    }
    if (!found.finite) return py::none();
    const size_t count = found.best.size();
    py::array_t<int32_t> ids(count);
    py::array_t<float> best(count), logprobs(count);
    for (size_t i = 0; i < count; ++i) {
      ids.mutable_data()[i] = found.best[i].token;
      best.mutable_data()[i] = found.best[i].score;
      logprobs.mutable_data()[i] = found.best[i].logprob;
    }
    return py::make_tuple(ids, best, logprobs, logprob_pairs(found.top), found.log_sum);
  }

  py::array_t<float> held_logits(int64_t request) { return rows_of(engine_->held_logits(request), config_.vocab_size); }
  py::array_t<float> held_hidden(int64_t request) { return rows_of(engine_->held_hidden(request), config_.n_embd); }

  py::bytes save(int64_t request) {
    std::vector<std::byte> blocks;
    {
      const WithoutGil released;
      blocks = engine_->save(request);
    }
    return py::bytes(reinterpret_cast<const char*>(blocks.data()), blocks.size());
  }

  int64_t restore(const Ids& ids, const py::bytes& blocks) {
    const std::span<const int32_t> tokens = checked(ids, config_.block_size);
    const auto bytes = bytes_of(blocks);
    const WithoutGil released;
    return engine_->restore(tokens, bytes);
  }

  void propose(int64_t request, size_t position, const Ids& ids) {
    if (ids.size() == 0) return;
    const std::span<const int32_t> tokens = checked(ids, config_.block_size);
    const WithoutGil released;
    engine_->propose(request, position, tokens);
  }

  size_t draft_length(int64_t request) {
    const WithoutGil released;
    return engine_->draft_length(request);
  }

  // Of a finished score: logprobs [n], ranks [n], and of the most likely tokens ids [n, top], logprobs [n, top].
  py::tuple scores(int64_t request) {
    const std::vector<Score> scores = engine_->scores(request);
    const size_t top = scores.empty() ? 0 : scores.front().top.size();
    py::array_t<float> logprobs(scores.size()), top_logprobs({scores.size(), top});
    py::array_t<int32_t> ranks(scores.size()), top_ids({scores.size(), top});
    for (size_t i = 0; i < scores.size(); ++i) {
      logprobs.mutable_data()[i] = scores[i].logprob;
      ranks.mutable_data()[i] = scores[i].rank;
      for (size_t j = 0; j < std::min(top, scores[i].top.size()); ++j) {
        top_ids.mutable_data()[i * top + j] = scores[i].top[j].token;
        top_logprobs.mutable_data()[i * top + j] = scores[i].top[j].logprob;
      }
    }
    return py::make_tuple(logprobs, ranks, top_ids, top_logprobs);
  }

  // All that may wait for a step waits without the GIL, which the step wants to look for signals.
  std::vector<int32_t> tokens(int64_t request) {
    const WithoutGil released;
    return engine_->tokens(request);
  }

  py::dict usage(int64_t request) {
    const Usage u = engine_->usage(request);
    py::dict out;
    out["cached"] = u.cached;
    out["drafted"] = u.drafted;
    out["accepted"] = u.accepted;
    return out;
  }

  py::dict stats() {
    const EngineStats s = engine_->stats();
    py::dict out;
    out["steps"] = s.steps;
    out["rows"] = s.rows;
    out["preemptions"] = s.preemptions;
    out["requests"] = s.requests;
    out["blocks"] = s.blocks;
    out["free_blocks"] = s.free_blocks;
    out["cached_blocks"] = s.cached_blocks;
    return out;
  }

  py::array_t<float> logits(const Ids& ids) {
    const std::span<const int32_t> tokens = checked(ids, config_.block_size);
    py::array_t<float> out({tokens.size(), config_.vocab_size});
    bool finished = false;
    {
      const WithoutGil released;
      finished = engine_->logits(tokens, out.mutable_data(), signal_raised);
    }
    if (!finished) {
      raise_interruption();
      throw std::runtime_error("the step was interrupted");
    }
    return out;
  }

  // [L + 1, T, C]
  py::array_t<float> states(const Ids& ids) {
    const std::span<const int32_t> tokens = checked(ids, config_.block_size);
    py::array_t<float> out({config_.n_layer + 1, tokens.size(), config_.n_embd});
    bool finished = false;
    {
      const WithoutGil released;
      finished = engine_->states(tokens, out.mutable_data(), signal_raised);
    }
    if (!finished) {
      raise_interruption();
      throw std::runtime_error("the step was interrupted");
    }
    return out;
  }

  void release(int64_t request) {
    if (at_exit()) return;
    const WithoutGil released;
    engine_->release(request);
  }

  Engine& engine() { return *engine_; }
  const std::string& precision() const { return precision_; }
  const std::string& kv_cache_dtype() const { return kv_cache_dtype_; }

 private:
  // What signal_raised told of, if anything.
  static void raise_interruption() {
    if (PyErr_Occurred() == nullptr && at_exit()) PyErr_SetNone(PyExc_SystemExit);
    if (PyErr_Occurred() != nullptr) throw py::error_already_set();
  }

  static py::tuple event_tuple(const Event& e) {
    return py::make_tuple(e.request, e.choice.token, finish_name(e.finish), e.choice.logprob, logprob_pairs(e.choice.top));
  }

  static py::array_t<float> rows_of(const std::vector<float>& values, size_t columns) {
    py::array_t<float> out({values.size() / columns, columns});
    std::copy(values.begin(), values.end(), out.mutable_data());
    return out;
  }

  std::vector<float> row_from(const char* name, const Row& row) const {
    if (row.ndim() != 1 || static_cast<size_t>(row.size()) != config_.vocab_size) {
      throw ParameterError(name, std::to_string(row.size()) + " numbers",
                           std::to_string(config_.vocab_size) + " in one dimension");
    }
    return {row.data(), row.data() + row.size()};
  }

  // A bit for each id of the vocabulary, or nothing.
  std::span<const uint32_t> mask_from(const Words& allowed) const {
    const size_t words = (config_.vocab_size + 31) / 32;
    const std::span<const uint32_t> mask(allowed.data(), static_cast<size_t>(allowed.size()));
    if (!mask.empty() && mask.size() < words) {
      throw ParameterError("allowed", std::to_string(mask.size()) + " words", std::to_string(words));
    }
    return mask;
  }

  void check_ids(const char* name, std::span<const int32_t> tokens) const {
    for (const int32_t id : tokens) {
      if (id < 0 || static_cast<size_t>(id) >= config_.vocab_size) {
        throw ParameterError(name, std::to_string(id), "ids from 0 to " + std::to_string(config_.vocab_size - 1));
      }
    }
  }

  // The last line of defence: memory is safe whatever Python checked before.
  std::span<const int32_t> checked(const Ids& ids, size_t limit) const {
    const std::span<const int32_t> tokens(ids.data(), static_cast<size_t>(ids.size()));
    if (ids.ndim() != 1 || tokens.empty() || tokens.size() > limit) {
      throw ParameterError("ids", std::to_string(ids.size()) + " tokens",
                           "1 to " + std::to_string(limit) + " tokens in one dimension");
    }
    check_ids("ids", tokens);
    return tokens;
  }

  GptConfig config_;
  py::dict tensors_;
  std::string precision_;
  std::string kv_cache_dtype_;
  std::unique_ptr<Engine> engine_;
};

}  // namespace

void init_engine(py::module_& m) {
  m.def("usable_cpus", &usable_cpus,
        "Threads to use: least of affinity, cgroup quota rounded down, and physical cores.");
  m.def(
      "usable_isas",
      [] {
        std::vector<std::string> names;
        for (const cpu::KernelTable* table : cpu::usable_kernels()) names.emplace_back(table->name);
        return names;
      },
      "Instruction sets that this build has kernels for and this CPU can run, best first.");
  py::class_<PyEngine>(m, "Engine")
      .def(py::init<const py::dict&, const std::string&, py::dict, const std::string&, int,
                    const std::string&, const std::string&, const std::string&,
                    std::optional<uint64_t>, uint64_t, size_t, int, const std::string&, bool>(),
           py::arg("config"), py::arg("dtype"), py::arg("tensors"), py::kw_only(),
           py::arg("device") = "cpu", py::arg("threads") = 0, py::arg("isa") = "",
           py::arg("precision") = "", py::arg("kv_cache_dtype") = "",
           py::arg("kv_cache_bytes") = 0, py::arg("prefix_cache_bytes") = 0,
           py::arg("step_tokens") = StepLimits().rows, py::arg("ordinal") = 0,
           py::arg("cuda_library") = "", py::arg("poison") = false)
      .def("submit", &PyEngine::submit, py::arg("ids"), py::kw_only(), py::arg("sampling"),
           py::arg("max_new_tokens"), py::arg("min_new_tokens") = 0,
           py::arg("end_tokens") = std::vector<int32_t>(),
           py::arg("forced_tokens") = std::vector<int32_t>(), py::arg("forced_end") = kNoToken,
           py::arg("slide") = 0, py::arg("lookup") = 0, py::arg("seconds") = py::none(),
           py::arg("held") = false, py::arg("hidden") = false, py::arg("wanted") = 1,
           py::arg("logits") = py::none(), py::arg("parent") = 0)
      .def("submit_score", &PyEngine::submit_score, py::arg("ids"), py::kw_only(), py::arg("first") = 1,
           py::arg("top") = 0, py::arg("parent") = 0)
      .def("advance", &PyEngine::advance, py::arg("requests"))
      .def("feed", &PyEngine::feed, py::arg("request"), py::arg("ids"), py::arg("wanted") = 1)
      .def("truncate", &PyEngine::truncate, py::arg("request"), py::arg("n"))
      .def("fork", &PyEngine::fork, py::arg("request"))
      .def("choose", &PyEngine::choose, py::arg("request"), py::arg("logits") = py::none(),
           py::arg("allowed") = Words())
      .def("candidates", &PyEngine::candidates, py::arg("request"), py::arg("n"), py::kw_only(),
           py::arg("scores") = py::none(), py::arg("bias") = std::vector<std::pair<int32_t, float>>(),
           py::arg("allowed") = Words())
      .def("held_logits", &PyEngine::held_logits, py::arg("request"))
      .def("held_hidden", &PyEngine::held_hidden, py::arg("request"))
      .def("save", &PyEngine::save, py::arg("request"))
      .def("restore", &PyEngine::restore, py::arg("ids"), py::arg("blocks"))
      .def("propose", &PyEngine::propose, py::arg("request"), py::arg("position"), py::arg("ids"))
      .def("draft_length", &PyEngine::draft_length, py::arg("request"))
      .def("scores", &PyEngine::scores, py::arg("request"))
      .def("tokens", &PyEngine::tokens, py::arg("request"))
      .def("usage", &PyEngine::usage, py::arg("request"))
      .def("stats", &PyEngine::stats)
      .def("release", &PyEngine::release, py::arg("request"))
      .def("logits", &PyEngine::logits, py::arg("ids"))
      .def("states", &PyEngine::states, py::arg("ids"))
      .def("reset_after_fork", [](PyEngine& e) { e.engine().reset_after_fork(); })
      .def_property_readonly("free_blocks",
                             [](PyEngine& e) {
                               const EngineStats s = e.engine().stats();
                               return s.free_blocks + s.cached_blocks;
                             })
      .def_property_readonly("kv_block_bytes",
                             [](PyEngine& e) { return e.engine().runner().kv_block_bytes(); })
      .def_property_readonly("workspace_bytes",
                             [](PyEngine& e) { return e.engine().runner().workspace_bytes(); })
      .def_property_readonly("threads", [](PyEngine& e) { return e.engine().runner().threads(); })
      .def_property_readonly("precision", &PyEngine::precision)
      .def_property_readonly("kv_cache_dtype", &PyEngine::kv_cache_dtype)
      .def_property_readonly("isa", [](PyEngine& e) { return e.engine().runner().isa(); });
}

}  // namespace gptx
