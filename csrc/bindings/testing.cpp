// Single kernels on numpy arrays: what the tests and kernel benchmarks iterate.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <cstring>

#include "bindings/module.h"
#include "core/aligned_buffer.h"
#include "core/error.h"
#include "core/philox.h"
#include "core/thread_team.h"
#include "cpu/isa.h"
#include "engine/sampler.h"

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

size_t dim(const Array& a, int axis) { return static_cast<size_t>(a.shape(axis)); }

// act [M, K], panels [N/16, K, 16], bias [N] -> [M, N]; with `residual` [M, N] added where given.
Array linear_f32(const std::string& isa, const Array& act, const Array& panels, const Array& bias,
                 const std::string& activation, const py::object& residual) {
  const size_t rows = dim(act, 0), depth = dim(act, 1), n = dim(panels, 0) * kPanel;
  if (dim(panels, 1) != depth || dim(bias, 0) != n) throw ParameterError("panels", "", "[N/16, K, 16]");
  Array out({rows, n});
  const bool add = !residual.is_none();
  if (add) std::memcpy(out.mutable_data(), residual.cast<Array>().data(), rows * n * sizeof(float));
  const cpu::LinearF32 task{.out = out.mutable_data(),
                            .out_stride = n,
                            .act = act.data(),
                            .act_stride = depth,
                            .panels = panels.data(),
                            .bias = bias.data(),
                            .rows = rows,
                            .depth = depth,
                            .activation = activation_named(activation),
                            .add = add};
  const py::gil_scoped_release released;
  cpu::kernels_named(isa).linear_f32(task, 0, n / kPanel);
  return out;
}

// gain and bias are padded to 16.
Array layer_norm(const std::string& isa, const Array& x, const Array& gain, const Array& bias,
                 float epsilon) {
  Array out({dim(x, 0), dim(x, 1)});
  for (size_t i = 0; i < dim(x, 0); ++i) {
    const size_t row = i * dim(x, 1);
    cpu::kernels_named(isa).layer_norm(out.mutable_data() + row, x.data() + row, gain.data(),
                                       bias.data(), dim(x, 1), epsilon);
  }
  return out;
}

// One head: query, key, value [T, D] -> [T, D], causal, through the paged cache. Hidden positions of
// the last block hold `poison`.
Array attention_f32(const std::string& isa, const Array& query, const Array& key,
                    const Array& value, float scale, float poison) {
  const cpu::KernelTable& kernels = cpu::kernels_named(isa);
  const size_t rows = dim(query, 0), size = dim(query, 1), width = round_up(size, kPanel);
  std::vector<AlignedBuffer<float>> storage;
  std::vector<const float*> blocks;
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
  for (size_t i = 0; i < rows; ++i) {
    if (i % kBlock == 0) {
      storage.emplace_back(2 * kBlock * width);
      std::fill_n(storage.back().data(), 2 * kBlock * width, poison);
      blocks.push_back(storage.back().data());
    }
    kernels.append_kv_f32(storage.back().data(), k + i * width, v + i * width, i, size);
  }
  for (size_t first = 0; first < rows; first += kBlock) {
    kernels.attention_f32({.out = out.mutable_data() + first * size,
                           .out_stride = size,
                           .query = q + first * width,
                           .query_stride = width,
                           .blocks = blocks.data(),
                           .position = first,
                           .rows = std::min(kBlock, rows - first),
                           .head_size = size,
                           .scale = scale,
                           .scratch = scratch.data()});
  }
  return out;
}

Array activate(const std::string& isa, const Array& x, const std::string& activation) {
  Array out(x.shape(0));
  cpu::kernels_named(isa).activate_f32(out.mutable_data(), x.data(), dim(x, 0),
                                       activation_named(activation));
  return out;
}

Array exp(const std::string& isa, const Array& x) {
  Array out(x.shape(0));
  cpu::kernels_named(isa).exp_f32(out.mutable_data(), x.data(), dim(x, 0));
  return out;
}

std::vector<int32_t> sample(const Array& logits, const std::vector<int32_t>& sequence,
                            const std::vector<int32_t>& banned, double temperature, int64_t top_k,
                            double top_p, double min_p, double repetition_penalty, uint64_t seed,
                            uint64_t first_position, size_t count) {
  Sampler sampler(dim(logits, 0));
  std::vector<int32_t> tokens;
  for (size_t i = 0; i < count; ++i) {
    std::vector<float> copy(logits.data(), logits.data() + dim(logits, 0));
    tokens.push_back(sampler.sample(copy, sequence, banned,
                                    {.repetition_penalty = repetition_penalty,
                                     .temperature = temperature,
                                     .top_k = top_k,
                                     .top_p = top_p,
                                     .min_p = min_p,
                                     .seed = seed},
                                    first_position + i));
  }
  return tokens;
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

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// FLOP/s of fused multiply-adds on all threads together.
double probe_fma(const std::string& isa, int threads, size_t steps) {
  const cpu::KernelTable& kernels = cpu::kernels_named(isa);
  ThreadTeam team(threads);
  std::vector<float> sink(static_cast<size_t>(threads));
  const py::gil_scoped_release released;
  const auto start = std::chrono::steady_clock::now();
  team.run([&](int rank) { sink[static_cast<size_t>(rank)] = kernels.probe_fma(steps); });
  const double flops = 2.0 * kPanel * cpu::kProbeChains * static_cast<double>(steps);
  return flops * team.size() / seconds_since(start);
}

// Bytes/s of reading the array once, each thread its own part.
double probe_read(const std::string& isa, int threads, const Array& data) {
  const cpu::KernelTable& kernels = cpu::kernels_named(isa);
  ThreadTeam team(threads);
  const size_t part = static_cast<size_t>(data.size()) / static_cast<size_t>(threads) / 64 * 64;
  const float* const begin = data.data();
  std::vector<float> sink(static_cast<size_t>(threads));
  const py::gil_scoped_release released;
  const auto start = std::chrono::steady_clock::now();
  team.run([&](int rank) {
    const auto r = static_cast<size_t>(rank);
    sink[r] = kernels.probe_read(begin + r * part, part);
  });
  return static_cast<double>(part * sizeof(float)) * team.size() / seconds_since(start);
}

}  // namespace

void init_testing(py::module_& m) {
  m.def("linear_f32", &linear_f32, py::arg("isa"), py::arg("act"), py::arg("panels"),
        py::arg("bias"), py::arg("activation") = "none", py::arg("residual") = py::none());
  m.def("layer_norm", &layer_norm, py::arg("isa"), py::arg("x"), py::arg("gain"), py::arg("bias"),
        py::arg("epsilon"));
  m.def("attention_f32", &attention_f32, py::arg("isa"), py::arg("query"), py::arg("key"),
        py::arg("value"), py::arg("scale"), py::arg("poison") = 0.0f);
  m.def("activate", &activate, py::arg("isa"), py::arg("x"), py::arg("activation"));
  m.def("exp", &exp, py::arg("isa"), py::arg("x"));
  m.def("sample", &sample, py::arg("logits"), py::arg("sequence"), py::arg("banned"),
        py::arg("temperature"), py::arg("top_k"), py::arg("top_p"), py::arg("min_p"),
        py::arg("repetition_penalty"), py::arg("seed"), py::arg("first_position"),
        py::arg("count"));
  m.def("philox", &philox4x32, py::arg("counter"), py::arg("key"));
  m.def("probe_fma", &probe_fma, py::arg("isa"), py::arg("threads"), py::arg("steps"));
  m.def("probe_read", &probe_read, py::arg("isa"), py::arg("threads"), py::arg("data"));
  m.def("team_counts", &team_counts, py::arg("threads"), py::arg("n"), py::arg("rounds"));
}

}  // namespace gptx
