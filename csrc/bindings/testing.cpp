// Single kernels on numpy arrays: what the tests and kernel benchmarks iterate.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <cstring>

#include "bindings/module.h"
#include "bindings/names.h"
#include "bindings/params.h"
#include "core/aligned_buffer.h"
#include "core/error.h"
#include "core/philox.h"
#include "core/thread_team.h"
#include "cpu/isa.h"
#include "cpu/logprobs.h"
#include "cpu/sampler.h"

namespace py = pybind11;

namespace gptx {
namespace {

using Array = py::array_t<float, py::array::c_style | py::array::forcecast>;
using cpu::kBlock;
using cpu::kPanel;
using cpu::round_up;

cpu::Activation activation_named(const std::string& name) {
  if (name == "none") return cpu::Activation::kNone;
  if (name == "gelu_new") return cpu::Activation::kGeluNew;
  if (name == "gelu") return cpu::Activation::kGelu;
  if (name == "relu") return cpu::Activation::kRelu;
  throw ParameterError("activation", "'" + name + "'", "one of none, gelu_new, gelu, relu");
}

const cpu::KernelTable& kernels(const std::string& isa) { return cpu::kernels_named(isa); }

size_t dim(const Array& a, int axis) { return static_cast<size_t>(a.shape(axis)); }

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// An array of rows of the operands that the matmul of a precision wants.
struct Operands {
  Operands(const cpu::MatmulKernels& matmul, const Array& act)
      : stride(round_up(dim(act, 1), kPanel) * cpu::kOperandBytes),
        bytes(dim(act, 0) * stride),
        scales(dim(act, 0)) {
    for (size_t i = 0; i < dim(act, 0); ++i) {
      scales[i] = matmul.operand(bytes.data() + i * stride, act.data() + i * dim(act, 1),
                                 dim(act, 1));
    }
  }

  size_t stride;
  AlignedBuffer<std::byte> bytes;
  std::vector<cpu::RowScale> scales;
};

// A linear layer of n outputs on arrays, as a task of its kernel.
class Linear {
 public:
  Linear(const std::string& isa, const std::string& precision, const Array& act, const Array& scale,
         const py::array_t<int32_t, py::array::c_style>& colsum, const Array& bias)
      : precision_(precision_named(precision)),
        matmul_(kernels(isa)[precision_]),
        operands_(matmul_, act),
        n_(dim(bias, 0)),
        task_{.out = nullptr,
              .out_stride = n_,
              .act = operands_.bytes.data(),
              .act_stride = operands_.stride,
              .act_scale = operands_.scales.data(),
              .panels = nullptr,
              .scale = scale.data(),
              .colsum = colsum.data(),
              .bias = bias.data(),
              .rows = dim(act, 0),
              .depth = dim(act, 1),
              .activation = cpu::Activation::kNone,
              .add = false} {}

  cpu::LinearTask& task() { return task_; }

  // The bytes of a packed matrix, which must be those that the shapes demand.
  const std::byte* panels_of(const py::array& packed) const {
    const size_t inputs = cpu::inputs_per_line(precision_);
    const size_t bytes =
        n_ / kPanel * (round_up(task_.depth, inputs) / inputs) * cpu::kLineBytes;
    if (static_cast<size_t>(packed.nbytes()) != bytes || n_ % kPanel != 0) {
      throw ParameterError("panels", std::to_string(packed.nbytes()) + " bytes",
                           std::to_string(bytes) + " bytes");
    }
    return static_cast<const std::byte*>(packed.data());
  }

  void run(float* out, const std::byte* panels) {
    task_.out = out;
    task_.panels = panels;
    matmul_.linear(task_, 0, n_ / kPanel);
  }

 private:
  Precision precision_;
  const cpu::MatmulKernels& matmul_;
  Operands operands_;
  size_t n_;
  cpu::LinearTask task_;
};

// act [M, K], panels of N outputs (docs/model-file.md), scale and colsum [N] of int8, bias [N]
// -> [M, N]; with `residual` [M, N] added where given.
Array linear(const std::string& isa, const std::string& precision, const Array& act,
             const py::array& panels, const Array& scale,
             const py::array_t<int32_t, py::array::c_style>& colsum, const Array& bias,
             const std::string& activation, const py::object& residual) {
  Linear layer(isa, precision, act, scale, colsum, bias);
  layer.task().activation = activation_named(activation);
  layer.task().add = !residual.is_none();
  Array out({dim(act, 0), dim(bias, 0)});
  if (!residual.is_none()) {
    const auto bytes = static_cast<size_t>(out.nbytes());
    std::memcpy(out.mutable_data(), residual.cast<Array>().data(), bytes);
  }
  layer.run(out.mutable_data(), layer.panels_of(panels));
  return out;
}

// Seconds of one call of the kernel behind `linear`, the mean of `calls`, which take the matrices in turns.
double time_linear(const std::string& isa, const std::string& precision, const Array& act,
                   const std::vector<py::array>& matrices, const Array& scale,
                   const py::array_t<int32_t, py::array::c_style>& colsum, const Array& bias,
                   size_t calls) {
  Linear layer(isa, precision, act, scale, colsum, bias);
  std::vector<const std::byte*> panels;
  for (const py::array& packed : matrices) panels.push_back(layer.panels_of(packed));
  AlignedBuffer<float> out(dim(act, 0) * dim(bias, 0));
  const py::gil_scoped_release released;
  const auto start = std::chrono::steady_clock::now();
  for (size_t i = 0; i < calls; ++i) layer.run(out.data(), panels[i % panels.size()]);
  return seconds_since(start) / static_cast<double>(calls);
}

// gain and bias are padded to 16.
Array layer_norm(const std::string& isa, const Array& x, const Array& gain, const Array& bias,
                 float epsilon) {
  Array out({dim(x, 0), dim(x, 1)});
  for (size_t i = 0; i < dim(x, 0); ++i) {
    const size_t row = i * dim(x, 1);
    kernels(isa).layer_norm(out.mutable_data() + row, x.data() + row, gain.data(), bias.data(),
                            dim(x, 1), epsilon);
  }
  return out;
}

// One head: query, key, value [T, D] -> [T, D], causal, through the paged cache. Hidden positions of
// the last block hold `poison`, a byte; rows are asked for `step` at a time.
Array attention(const std::string& isa, const std::string& kv_cache_dtype, const Array& query,
                const Array& key, const Array& value, float scale, int poison, size_t step) {
  const KvType type = kv_type_named(kv_cache_dtype);
  const cpu::AttentionKernels& head = kernels(isa)[type];
  const size_t rows = dim(query, 0), size = dim(query, 1), width = round_up(size, kPanel);
  const size_t block_bytes = cpu::kv_head_bytes(type, width);
  std::vector<AlignedBuffer<std::byte>> storage;
  std::vector<const std::byte*> blocks;
  AlignedBuffer<float> padded(3 * rows * width);
  float* const q = padded.data();
  float* const k = q + rows * width;
  float* const v = k + rows * width;
  for (size_t i = 0; i < rows; ++i) {
    std::memcpy(q + i * width, query.data() + i * size, size * sizeof(float));
    std::memcpy(k + i * width, key.data() + i * size, size * sizeof(float));
    std::memcpy(v + i * width, value.data() + i * size, size * sizeof(float));
  }
  Array out({rows, size});
  AlignedBuffer<float> scratch(cpu::attention_scratch(width));
  for (size_t first = 0; first < rows;) {
    const size_t n = std::min({step, rows - first, kBlock - first % kBlock});
    if (first % kBlock == 0) {
      storage.emplace_back(block_bytes);
      std::memset(storage.back().data(), poison, block_bytes);
      blocks.push_back(storage.back().data());
    }
    for (size_t i = first; i < first + n; ++i) {
      head.append_key(storage.back().data(), k + i * width, i, size);
      head.append_value(storage.back().data(), v + i * width, i, size);
    }
    head.attention({.out = out.mutable_data() + first * size,
                    .out_stride = size,
                    .query = q + first * width,
                    .query_stride = width,
                    .blocks = blocks.data(),
                    .next = blocks[0],
                    .position = first,
                    .rows = n,
                    .head_size = size,
                    .scale = scale,
                    .scratch = scratch.data()});
    first += n;
  }
  return out;
}

Array activate(const std::string& isa, const Array& x, const std::string& activation) {
  Array out(x.shape(0));
  kernels(isa).activate_f32(out.mutable_data(), x.data(), dim(x, 0), activation_named(activation));
  return out;
}

Array exp(const std::string& isa, const Array& x) {
  Array out(x.shape(0));
  kernels(isa).exp_f32(out.mutable_data(), x.data(), dim(x, 0));
  return out;
}

double sum_exp(const std::string& isa, const Array& x, float shift) {
  return kernels(isa).sum_exp(x.data(), dim(x, 0), shift);
}

// `count` choices from the same logits, at consecutive positions: (token, logprob, [(token, logprob)]).
py::list sample(const Array& logits, const py::dict& params, const std::vector<int32_t>& sequence, size_t prompt,
                const std::vector<int32_t>& banned, const std::vector<uint32_t>& allowed, int32_t forced,
                uint64_t first_position, size_t count) {
  const size_t words = (dim(logits, 0) + 31) / 32;
  if (!allowed.empty() && allowed.size() != words) {
    throw ParameterError("allowed", std::to_string(allowed.size()) + " words", std::to_string(words) + " or none");
  }
  cpu::Sampler sampler(dim(logits, 0), kernels(""));
  const SamplingParams parsed = sampling_params_from(params);
  SampleTask task{.logit_row = 0,
                  .position = first_position,
                  .prompt = std::min(prompt, sequence.size()),
                  .sequence = sequence,
                  .banned = banned,
                  .allowed = allowed,
                  .forced = forced,
                  .params = &parsed};
  py::list choices;
  for (; choices.size() < count; ++task.position) {
    std::vector<float> copy(logits.data(), logits.data() + dim(logits, 0));
    Choice choice;
    choice.top.reserve(static_cast<size_t>(std::max(parsed.logprobs, 0)));
    sampler.sample(copy, task, choice);
    choices.append(py::make_tuple(choice.token, choice.logprob, logprob_pairs(choice.top)));
  }
  return choices;
}

// (logprob, rank, [(token, logprob)]) of one token.
py::tuple score(const std::string& isa, const Array& logits, int32_t token, size_t top) {
  Score out;
  out.top.reserve(top);
  cpu::score(kernels(isa), {logits.data(), dim(logits, 0)}, {.logit_row = 0, .token = token, .top = top}, out);
  return py::make_tuple(out.logprob, out.rank, logprob_pairs(out.top));
}

// How often a team called each of n pieces in `rounds` rounds, as a check of its barriers.
std::vector<int64_t> team_counts(int threads, size_t n, int rounds) {
  ThreadTeam team(threads);
  std::vector<int64_t> counts(n, 0);
  const py::gil_scoped_release released;
  for (int r = 0; r < rounds; ++r) {
    team.run([&](int rank) {
      // Two phases: the second one reads what the first wrote, so a missing barrier shows.
      team.for_each(rank, n, [&](size_t i) { counts[i] += 1; });
      team.for_each(rank, n, [&](size_t i) { counts[n - 1 - i] += 1; });
    });
  }
  return counts;
}

// Operations/s, a multiply-add being two, of the products of a precision on all threads together.
double probe_peak(const std::string& isa, const std::string& precision, int threads, size_t steps) {
  const Precision chosen = precision_named(precision);
  const cpu::MatmulKernels& matmul = kernels(isa)[chosen];
  ThreadTeam team(threads);
  std::vector<float> sink(static_cast<size_t>(threads));
  const py::gil_scoped_release released;
  const auto run = [&](size_t n) {
    team.run([&](int rank) { sink[static_cast<size_t>(rank)] = matmul.probe(n); });
  };
  run(steps / 8);  // until the new threads have processors of their own
  const auto start = std::chrono::steady_clock::now();
  run(steps);
  const double per_step =
      2.0 * kPanel * static_cast<double>(cpu::inputs_per_line(chosen)) * cpu::kProbeLines;
  return per_step * static_cast<double>(steps) * team.size() / seconds_since(start);
}

// Bytes/s of reading the array `times` times, each thread its own part.
double probe_read(const std::string& isa, int threads, const Array& data, int times) {
  const cpu::KernelTable& table = kernels(isa);
  ThreadTeam team(threads);
  const size_t part = static_cast<size_t>(data.size()) / static_cast<size_t>(threads) / 64 * 64;
  const float* const begin = data.data();
  std::vector<float> sink(static_cast<size_t>(threads));
  const py::gil_scoped_release released;
  const auto read = [&](size_t n) {
    team.run([&](int rank) {
      const auto r = static_cast<size_t>(rank);
      sink[r] = table.probe_read(begin + r * part, n);
    });
  };
  read(part / 256 * 64);  // until the new threads have processors of their own
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < times; ++i) read(part);
  return static_cast<double>(part * sizeof(float)) * team.size() * times / seconds_since(start);
}

}  // namespace

void init_testing(py::module_& m) {
  m.def("linear", &linear, py::arg("isa"), py::arg("precision"), py::arg("act"), py::arg("panels"),
        py::arg("scale"), py::arg("colsum"), py::arg("bias"), py::arg("activation") = "none",
        py::arg("residual") = py::none());
  m.def("time_linear", &time_linear, py::arg("isa"), py::arg("precision"), py::arg("act"),
        py::arg("matrices"), py::arg("scale"), py::arg("colsum"), py::arg("bias"),
        py::arg("calls"));
  m.def("layer_norm", &layer_norm, py::arg("isa"), py::arg("x"), py::arg("gain"), py::arg("bias"),
        py::arg("epsilon"));
  m.def("attention", &attention, py::arg("isa"), py::arg("kv_cache_dtype"), py::arg("query"),
        py::arg("key"), py::arg("value"), py::arg("scale"), py::arg("poison") = 0,
        py::arg("step") = kBlock);
  m.def("activate", &activate, py::arg("isa"), py::arg("x"), py::arg("activation"));
  m.def("exp", &exp, py::arg("isa"), py::arg("x"));
  m.def("sum_exp", &sum_exp, py::arg("isa"), py::arg("x"), py::arg("shift"));
  m.def("sample", &sample, py::arg("logits"), py::arg("params"), py::kw_only(),
        py::arg("sequence") = std::vector<int32_t>(), py::arg("prompt") = 0,
        py::arg("banned") = std::vector<int32_t>(), py::arg("allowed") = std::vector<uint32_t>(),
        py::arg("forced") = kNoToken, py::arg("first_position") = 0, py::arg("count") = 1);
  m.def("score", &score, py::arg("isa"), py::arg("logits"), py::arg("token"), py::arg("top") = 0);
  m.def("philox", &philox4x32, py::arg("counter"), py::arg("key"));
  m.def("probe_peak", &probe_peak, py::arg("isa"), py::arg("precision"), py::arg("threads"),
        py::arg("steps"));
  m.def("probe_read", &probe_read, py::arg("isa"), py::arg("threads"), py::arg("data"),
        py::arg("times") = 1);
  m.def("team_counts", &team_counts, py::arg("threads"), py::arg("n"), py::arg("rounds"));
}

}  // namespace gptx
