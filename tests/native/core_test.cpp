// The core without Python, for the sanitizers: a tiny random model driven by several threads at
// once, whose results must be those of one thread alone. Arguments are the ISAs to run; without
// any, all usable ones.
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "core/checksum.h"
#include "core/thread_team.h"
#include "cpu/isa.h"
#include "cpu/kernel_table.h"
#include "engine/engine.h"

namespace {

using namespace gptx;

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

size_t padded(size_t n, size_t multiple = cpu::kPanel) { return cpu::round_up(n, multiple); }

// Random tensors of a model file of one type.
struct Weights {
  std::vector<std::unique_ptr<std::vector<float>>> floats;
  std::vector<std::unique_ptr<std::vector<uint16_t>>> bfloats;
  std::vector<std::unique_ptr<std::vector<int8_t>>> bytes;
  WeightSource source;
  std::mt19937 random{0};

  float value() { return std::uniform_real_distribution<float>(-0.2f, 0.2f)(random); }

  void add(const std::string& name, size_t n) {
    auto& tensor = *floats.emplace_back(std::make_unique<std::vector<float>>(n));
    for (float& x : tensor) x = value();
    source.tensors[name] = std::as_bytes(std::span<const float>(tensor));
  }

  void add_matrix(const std::string& base, size_t n, size_t k) {
    const std::string name = base + ".weight";
    if (source.dtype == DType::kFloat32) return add(name, padded(n) * k);
    if (source.dtype == DType::kBFloat16) {
      auto& tensor =
          *bfloats.emplace_back(std::make_unique<std::vector<uint16_t>>(padded(n) * padded(k, 2)));
      for (uint16_t& x : tensor) {
        x = static_cast<uint16_t>(std::bit_cast<uint32_t>(value()) >> 16);
      }
      source.tensors[name] = std::as_bytes(std::span<const uint16_t>(tensor));
      return;
    }
    auto& tensor =
        *bytes.emplace_back(std::make_unique<std::vector<int8_t>>(padded(n) * padded(k, 4)));
    auto& scales = *floats.emplace_back(std::make_unique<std::vector<float>>(padded(n), 0.002f));
    auto& colsum = *floats.emplace_back(std::make_unique<std::vector<float>>(padded(n)));
    std::vector<int32_t> sums(padded(n));
    for (size_t i = 0; i < tensor.size(); ++i) {
      const size_t panel_bytes = padded(k, 4) * cpu::kPanel;
      tensor[i] = static_cast<int8_t>(500 * value());
      sums[i / panel_bytes * cpu::kPanel + i / 4 % cpu::kPanel] += tensor[i];
    }
    std::memcpy(colsum.data(), sums.data(), sums.size() * sizeof(int32_t));
    source.tensors[name] = std::as_bytes(std::span<const int8_t>(tensor));
    source.tensors[base + ".scale"] = std::as_bytes(std::span<const float>(scales));
    source.tensors[base + ".colsum"] = std::as_bytes(std::span<const float>(colsum));
  }
};

GptConfig tiny_config() {
  GptConfig c;
  c.vocab_size = 50;
  c.block_size = 160;
  c.n_layer = 2;
  c.n_head = 3;
  c.n_embd = 60;
  c.n_inner = 90;
  return c;
}

void fill(Weights& w, const GptConfig& c) {
  const auto linear = [&](const std::string& base, size_t n, size_t k) {
    w.add_matrix(base, n, k);
    w.add(base + ".bias", padded(n));
  };
  const auto norm = [&](const std::string& base) {
    w.add(base + ".weight", padded(c.n_embd));
    w.add(base + ".bias", padded(c.n_embd));
  };
  w.add("wpe.weight", c.block_size * padded(c.n_embd));
  for (size_t i = 0; i < c.n_layer; ++i) {
    const std::string h = "h." + std::to_string(i) + ".";
    norm(h + "ln_1");
    linear(h + "attn.c_attn", 3 * c.n_head * padded(c.head_size()), c.n_embd);
    linear(h + "attn.c_proj", c.n_embd, c.n_embd);
    norm(h + "ln_2");
    linear(h + "mlp.c_fc", c.n_inner, c.n_embd);
    linear(h + "mlp.c_proj", c.n_embd, c.n_inner);
  }
  norm("ln_f");
  w.add_matrix("wte", c.vocab_size, c.n_embd);
}

size_t free_blocks(const Engine& engine) { return engine.stats().free_blocks + engine.stats().cached_blocks; }

std::vector<int32_t> generate(Engine& engine, const std::vector<int32_t>& prompt, uint64_t seed) {
  RequestParams params;
  params.sampling.seed = seed;
  params.sampling.top_k = 10;
  params.max_new_tokens = 30;
  const int64_t id = engine.submit(prompt, params);
  const int64_t ids[] = {id};
  std::vector<int32_t> tokens;
  for (bool finished = false; !finished;) {
    for (const Event& event : engine.advance(ids, {})) {
      tokens.push_back(event.choice.token);
      finished = event.finish != Finish::kNone;
    }
  }
  engine.release(id);
  return tokens;
}

struct Mode {
  DType dtype;
  Precision precision;
  KvType kv_type;
};

void engine_gives_every_thread_its_own_result(const Mode& mode, const std::string& isa, int team) {
  const GptConfig config = tiny_config();
  Weights weights;
  weights.source.dtype = mode.dtype;
  fill(weights, config);
  const StepLimits limits{.rows = 64, .logit_rows = 8};
  const CpuOptions options{
      .precision = mode.precision, .kv_type = mode.kv_type, .threads = team, .isa = isa};
  Engine engine(make_cpu_runner(config, weights.source, limits, 9, options), config, limits,
                {.kv_blocks = 9, .cached_blocks = 4, .poison = true});

  std::vector<std::vector<int32_t>> prompts, expected;
  for (size_t i = 0; i < 5; ++i) {
    prompts.emplace_back(1 + 23 * i, static_cast<int32_t>(i));
    expected.push_back(generate(engine, prompts[i], i));
  }
  std::vector<std::vector<int32_t>> results(prompts.size());
  {
    std::vector<std::jthread> threads;
    for (size_t i = 0; i < prompts.size(); ++i) {
      threads.emplace_back([&, i] { results[i] = generate(engine, prompts[i], i); });
    }
    threads.emplace_back([&] {
      std::vector<float> logits(prompts[4].size() * config.vocab_size);
      require(engine.logits(prompts[4], logits.data(), {}), "logits finish");
    });
  }
  require(results == expected, "threads get what they get alone");
  require(free_blocks(engine) == 9, "every block returns");
}

void interrupted_steps_leave_the_engine_usable() {
  const GptConfig config = tiny_config();
  Weights weights;
  fill(weights, config);
  const StepLimits limits{.rows = 64, .logit_rows = 8};
  CpuOptions options;
  options.threads = 2;
  Engine engine(make_cpu_runner(config, weights.source, limits, 9, options), config, limits,
                {.kv_blocks = 9, .cached_blocks = 4, .poison = true});
  const std::vector<int32_t> prompt(100, 7);
  const std::vector<int32_t> expected = generate(engine, prompt, 1);
  std::vector<float> logits(prompt.size() * config.vocab_size);
  for (int i = 0; i < 20; ++i) {
    static_cast<void>(engine.logits(prompt, logits.data(), [] { return true; }));
  }
  require(generate(engine, prompt, 1) == expected, "the same after interruptions");
  require(free_blocks(engine) == 9, "every block returns after interruptions");
}

void lookups_propose_what_followed_before() {
  using Tokens = std::vector<int32_t>;
  require(lookup_draft(Tokens{1, 2, 3, 4, 9, 1, 2}, 3) == Tokens({3, 4, 9}), "what followed");
  require(lookup_draft(Tokens{1, 2, 5, 1, 2, 6, 1, 2}, 2) == Tokens({6, 1}), "the last time");
  require(lookup_draft(Tokens{7, 1, 2, 5, 1, 2, 6, 7, 1, 2}, 1) == Tokens({5}), "the longest ending");
  require(lookup_draft(Tokens{3, 8, 8, 8}, 4) == Tokens({8, 8, 8, 8}), "a loop goes on");
  require(lookup_draft(Tokens{1, 2, 1, 2, 1, 2}, 5) == Tokens({1, 2, 1, 2, 1}), "so does a longer one");
  require(lookup_draft(Tokens{1, 2, 3}, 4).empty() && lookup_draft(Tokens{1}, 4).empty(), "nothing came before");
  require(lookup_draft(Tokens{1, 2, 1, 2}, 0).empty(), "nothing is asked");
}

void checksums_do_not_depend_on_the_number_of_threads() {
  std::vector<std::byte> data(5 * kChecksumChunk + 77, std::byte{3});
  const Bytes buffers[] = {Bytes(data), Bytes(data).first(100), Bytes()};
  uint64_t one[3], many[3];
  tree_checksums(one, buffers, 1);
  tree_checksums(many, buffers, 4);
  require(std::equal(one, one + 3, many), "checksums are equal");
}

}  // namespace

int main(int count, char** names) {
  std::vector<std::string> isas(names + 1, names + count);
  if (isas.empty()) {
    for (const cpu::KernelTable* table : cpu::usable_kernels()) isas.emplace_back(table->name);
  }
  const Mode modes[] = {{DType::kFloat32, Precision::kFloat32, KvType::kFloat32},
                        {DType::kBFloat16, Precision::kBFloat16, KvType::kBFloat16},
                        {DType::kInt8, Precision::kInt8, KvType::kBFloat16},
                        {DType::kInt8, Precision::kInt8Fast, KvType::kInt8},
                        {DType::kInt8, Precision::kFloat32, KvType::kFloat32}};
  for (const Mode& mode : modes) {
    for (const std::string& isa : isas) {
      for (const int team : {1, 2, 5}) engine_gives_every_thread_its_own_result(mode, isa, team);
    }
  }
  interrupted_steps_leave_the_engine_usable();
  lookups_propose_what_followed_before();
  checksums_do_not_depend_on_the_number_of_threads();
  std::puts("ok");
}
