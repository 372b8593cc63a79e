// The engine: requests as Python sees them, with the GIL released while it computes.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>

#include "bindings/buffers.h"
#include "bindings/module.h"
#include "bindings/names.h"
#include "bindings/params.h"
#include "core/cpu_count.h"
#include "cpu/isa.h"
#include "engine/engine.h"

namespace py = pybind11;

namespace gptx {
namespace {

using Ids = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;

// True once a signal handler has raised; the exception is then pending. Called without the GIL.
bool signal_raised() {
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
    case Finish::kNonFinite: return "non_finite";
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
           std::optional<uint64_t> kv_cache_bytes, int ordinal, const std::string& cuda_library)
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
    const py::gil_scoped_release released;
    const StepLimits limits;
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
    engine_ = std::make_unique<Engine>(std::move(runner), config_, limits, blocks);
  }

  int64_t submit(const Ids& ids, const py::dict& sampling, size_t max_new_tokens, size_t min_new_tokens,
                 std::vector<int32_t> end_tokens) {
    const std::span<const int32_t> tokens = checked(ids, config_.block_size - 1);
    return engine_->submit(tokens, {.sampling = sampling_params_from(sampling),
                                    .max_new_tokens = max_new_tokens,
                                    .min_new_tokens = min_new_tokens,
                                    .end_tokens = std::move(end_tokens)});
  }

  py::list advance(const std::vector<int64_t>& requests) {
    std::vector<Event> events;
    {
      const py::gil_scoped_release released;
      events = engine_->advance(requests, signal_raised);
    }
    if (PyErr_Occurred() != nullptr) throw py::error_already_set();
    py::list out;
    for (const Event& e : events) {
      out.append(py::make_tuple(e.request, e.token, finish_name(e.finish)));
    }
    return out;
  }

  py::array_t<float> logits(const Ids& ids) {
    const std::span<const int32_t> tokens = checked(ids, config_.block_size);
    py::array_t<float> out({tokens.size(), config_.vocab_size});
    bool finished = false;
    {
      const py::gil_scoped_release released;
      finished = engine_->logits(tokens, out.mutable_data(), signal_raised);
    }
    if (!finished) throw py::error_already_set();
    return out;
  }

  void release(int64_t request) {
    const py::gil_scoped_release released;
    engine_->release(request);
  }

  Engine& engine() { return *engine_; }
  const std::string& precision() const { return precision_; }
  const std::string& kv_cache_dtype() const { return kv_cache_dtype_; }

 private:
  // The last line of defence: memory is safe whatever Python checked before.
  std::span<const int32_t> checked(const Ids& ids, size_t limit) const {
    const std::span<const int32_t> tokens(ids.data(), static_cast<size_t>(ids.size()));
    if (ids.ndim() != 1 || tokens.empty() || tokens.size() > limit) {
      throw ParameterError("ids", std::to_string(ids.size()) + " tokens",
                           "1 to " + std::to_string(limit) + " tokens in one dimension");
    }
    for (const int32_t id : tokens) {
      if (id < 0 || static_cast<size_t>(id) >= config_.vocab_size) {
        throw ParameterError("ids", std::to_string(id),
                             "ids from 0 to " + std::to_string(config_.vocab_size - 1));
      }
    }
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
                    std::optional<uint64_t>, int, const std::string&>(),
           py::arg("config"), py::arg("dtype"), py::arg("tensors"), py::kw_only(),
           py::arg("device") = "cpu", py::arg("threads") = 0, py::arg("isa") = "",
           py::arg("precision") = "", py::arg("kv_cache_dtype") = "",
           py::arg("kv_cache_bytes") = 0, py::arg("ordinal") = 0, py::arg("cuda_library") = "")
      .def("submit", &PyEngine::submit, py::arg("ids"), py::kw_only(), py::arg("sampling"),
           py::arg("max_new_tokens"), py::arg("min_new_tokens") = 0,
           py::arg("end_tokens") = std::vector<int32_t>())
      .def("advance", &PyEngine::advance, py::arg("requests"))
      .def("release", &PyEngine::release, py::arg("request"))
      .def("logits", &PyEngine::logits, py::arg("ids"))
      .def("reset_after_fork", [](PyEngine& e) { e.engine().reset_after_fork(); })
      .def_property_readonly("free_blocks", [](PyEngine& e) { return e.engine().free_blocks(); })
      .def_property_readonly("kv_block_bytes",
                             [](PyEngine& e) { return e.engine().runner().kv_block_bytes(); })
      .def_property_readonly("threads", [](PyEngine& e) { return e.engine().runner().threads(); })
      .def_property_readonly("precision", &PyEngine::precision)
      .def_property_readonly("kv_cache_dtype", &PyEngine::kv_cache_dtype)
      .def_property_readonly("isa", [](PyEngine& e) { return e.engine().runner().isa(); });
}

}  // namespace gptx
