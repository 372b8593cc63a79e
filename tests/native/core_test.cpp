// The core without Python, for the sanitizers: a tiny random model driven by several threads at
// once, whose results must be those of one thread alone. Arguments are the ISAs to run; without
// any, all usable ones.
#include <array>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
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

// A runner whose blocks hold, for each position, a number made of all tokens up to it.
class CountingRunner final : public Runner {
 public:
  explicit CountingRunner(size_t blocks) : content(blocks) {}
  void copy_block(int32_t from, int32_t to) override { at(to) = at(from); }
  void poison_block(int32_t block) override { at(block).fill(kPoison); }
  bool run(const Step&, StepResult&, const std::function<bool()>&) override { return true; }
  std::span<const float> logits(size_t) override { return {}; }
  void hidden(size_t, std::span<float>) override {}
  void state(size_t, size_t, std::span<float>) override {}
  void choose(std::span<float>, const SampleTask&, Choice&) override {}
  void candidates(std::span<const float>, std::span<float>, const SampleTask&, size_t, Candidates&) override {}
  void read_block(int32_t, std::span<std::byte>) override {}
  void write_block(int32_t, std::span<const std::byte>) override {}
  size_t kv_block_bytes() const override { return 1; }
  size_t workspace_bytes() const override { return 0; }
  int threads() const override { return 1; }
  std::string isa() const override { return ""; }

  static constexpr uint64_t kPoison = ~uint64_t{0};
  std::array<uint64_t, kBlockTokens>& at(int32_t block) { return content[static_cast<size_t>(block)]; }
  std::vector<std::array<uint64_t, kBlockTokens>> content;
};

// Random sequences grow, fork, go back, end and come again, in a pool that is too small for them.
void kv_blocks_hold_what_was_computed(uint32_t seed) {
  constexpr size_t kBlocks = 24, kOperations = 10000, kLongest = 400;
  CountingRunner runner(kBlocks);
  KvCache kv(runner, kBlocks, /*max_cached=*/10, /*poison=*/true);
  std::vector<Sequence> living;
  std::mt19937 random(seed);
  const auto below = [&](size_t n) { return static_cast<size_t>(random() % n); };
  const auto expected = [](const Sequence& s) {
    std::vector<uint64_t> hashes;
    uint64_t hash = 1;
    for (const int32_t token : s.windowed()) hashes.push_back(hash = (hash ^ static_cast<uint64_t>(token)) * 1099511628211u);
    return hashes;
  };
  const auto grow = [&](Sequence& s, size_t n) {
    // Few different tokens, so that prefixes come again.
    for (size_t i = 0; i < n && s.window() < kLongest; ++i) s.tokens.push_back(static_cast<int32_t>(below(40) == 0));
    const size_t end = kv.reserve(s, s.window());
    const std::vector<uint64_t> hashes = expected(s);
    for (size_t p = s.computed; p < end; ++p) {
      const int32_t block = s.blocks[p / kBlockTokens];
      require(kv.pool().is_exclusive(block), "only blocks of its own are written to");
      runner.at(block)[p % kBlockTokens] = hashes[p];
    }
    s.computed = end;
    kv.remember(s);
  };
  for (size_t operation = 0; operation < kOperations; ++operation) {
    const size_t kind = living.empty() ? 0 : below(8);
    if (kind == 0 && living.size() < 12) {
      Sequence& s = living.emplace_back();
      s.tokens.assign(1 + below(200), 0);
      kv.match(s, s.window() - 1);
      require(s.computed < s.window(), "one token at least is left to compute");
    } else if (kind == 1 && living.size() < 12) {
      const Sequence from = living[below(living.size())];
      Sequence& s = living.emplace_back();
      s.tokens = from.tokens;
      s.begin = from.begin;
      kv.share(s, from, from.computed > 0 ? below(from.computed + 1) : 0);
    } else if (kind == 2) {
      Sequence& s = living[below(living.size())];
      const size_t n = 1 + below(s.window());
      s.tokens.resize(s.begin + n);
      kv.truncate(s, n);
    } else if (kind == 3) {
      const size_t i = below(living.size());
      kv.truncate(living[i], 0);
      living.erase(living.begin() + static_cast<ptrdiff_t>(i));
    } else if (kind == 4) {
      Sequence& s = living[below(living.size())];
      kv.truncate(s, 0);  // preempted, or the context slides
      if (below(2) == 0) s.begin += below(s.window());
      if (s.window() > 1) kv.match(s, s.window() - 1);
    } else if (!living.empty()) {
      grow(living[below(living.size())], below(90));
    }

    std::map<int32_t, uint32_t> users;
    for (const Sequence& s : living) {
      require(s.computed <= s.window() && s.computed <= s.blocks.size() * kBlockTokens, "positions lie in blocks");
      for (const int32_t block : s.blocks) ++users[block];
      const std::vector<uint64_t> hashes = expected(s);
      for (size_t p = 0; p < s.computed; ++p) {
        require(runner.at(s.blocks[p / kBlockTokens])[p % kBlockTokens] == hashes[p], "a block holds its prefix");
      }
    }
    for (int32_t block = 0; block < static_cast<int32_t>(kBlocks); ++block) {
      const auto found = users.find(block);
      require(kv.pool().users(block) == (found == users.end() ? 0 : found->second), "users are counted");
    }
    require(kv.pool().available() + users.size() == kBlocks, "no block is lost");
    require(kv.pool().cached() <= 10, "the prefix cache is bounded");
  }
  for (Sequence& s : living) kv.truncate(s, 0);
  require(kv.pool().available() == kBlocks, "every block returns");
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
  for (uint32_t seed = 0; seed < 3; ++seed) kv_blocks_hold_what_was_computed(seed);
  checksums_do_not_depend_on_the_number_of_threads();
  std::puts("ok");
}
