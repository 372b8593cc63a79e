// libgptx_cuda on the emulator, driven through its C interface: for every precision and cache the logits of a
// sequence are the same bits in one piece, in chunks, token by token and in company; and the tokens that it draws are
// those of the CPU's sampler. Run under the sanitizers.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <deque>
#include <random>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/sampler.h"
#include "cuda/abi.h"

namespace {

constexpr uint64_t kVocab = 83, kContext = 200, kLayers = 2, kHeads = 2, kEmbd = 40, kInner = 90;
constexpr uint64_t kWidth = 32;  // of a head of 20, padded
constexpr uint64_t kLogitRows = 64;

uint64_t up(uint64_t n, uint64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Random weights in the layout of a model file: which number is whose does not matter here.
struct Weights {
  std::deque<std::string> names;
  std::deque<std::vector<char>> data;
  std::vector<gptx_cuda_tensor> tensors;
  std::mt19937 random{7};
  int dtype;

  explicit Weights(int type) : dtype(type) {
    floats("wpe.weight", kContext * up(kEmbd, 16), 0.1f);
    for (uint64_t i = 0; i < kLayers; ++i) {
      const std::string h = "h." + std::to_string(i) + ".";
      norm(h + "ln_1");
      linear(h + "attn.c_attn", 3 * kHeads * kWidth, kEmbd);
      linear(h + "attn.c_proj", kEmbd, kEmbd);
      norm(h + "ln_2");
      linear(h + "mlp.c_fc", kInner, kEmbd);
      linear(h + "mlp.c_proj", kEmbd, kInner);
    }
    norm("ln_f");
    matrix("wte", kVocab, kEmbd);
  }
  void norm(const std::string& base) {
    floats(base + ".weight", up(kEmbd, 16), 1.0f);
    floats(base + ".bias", up(kEmbd, 16), 0.1f);
  }
  void linear(const std::string& base, uint64_t n, uint64_t k) {
    matrix(base, n, k);
    floats(base + ".bias", up(n, 16), 0.1f);
  }
  void matrix(const std::string& base, uint64_t n, uint64_t k) {
    const uint64_t rows = up(n, 16);
    if (dtype == 0) return floats(base + ".weight", rows * k, 0.2f);
    if (dtype == 1) {
      std::vector<char>& bytes = add(base + ".weight", rows * up(k, 2) * 2);
      for (uint64_t i = 0; i < bytes.size(); i += 2) {
        const float x = uniform(0.2f);
        std::memcpy(&bytes[i], reinterpret_cast<const char*>(&x) + 2, 2);
      }
      return;
    }
    for (char& q : add(base + ".weight", rows * up(k, 4))) q = static_cast<char>(static_cast<int>(random() % 255) - 127);
    floats(base + ".scale", rows, 0.002f);
    add(base + ".colsum", rows * 4);
  }
  void floats(const std::string& name, uint64_t n, float size) {
    std::vector<char>& bytes = add(name, n * 4);
    for (uint64_t i = 0; i < n; ++i) {
      const float x = uniform(size);
      std::memcpy(&bytes[i * 4], &x, 4);
    }
  }
  float uniform(float size) { return size * (static_cast<float>(random() % 2001) / 1000.0f - 1.0f); }
  std::vector<char>& add(const std::string& name, uint64_t bytes) {
    names.push_back(name);
    data.emplace_back(bytes);
    tensors.push_back({names.back().c_str(), data.back().data(), bytes});
    return data.back();
  }
};

struct Model {
  const gptx_cuda_api* api = gptx_cuda_get_api(GPTX_CUDA_ABI);
  gptx_cuda_model* model = nullptr;
  gptx_cuda_error error{};
  bool failed = false;

  Model(const Weights& weights, int precision, int kv_type) {
    gptx_cuda_model_options o{};
    o.vocab_size = kVocab;
    o.block_size = kContext;
    o.n_layer = kLayers;
    o.n_head = kHeads;
    o.n_embd = kEmbd;
    o.n_inner = kInner;
    o.activation = "gelu_new";
    o.layer_norm_epsilon = 1e-5f;
    o.scale_attn_weights = o.tie_word_embeddings = 1;
    o.dtype = weights.dtype;
    o.tensors = weights.tensors.data();
    o.n_tensors = weights.tensors.size();
    o.precision = precision;
    o.kv_type = kv_type;
    o.kv_blocks = 40;
    o.rows = 256;
    o.logit_rows = kLogitRows;
    o.steps_ahead = 4;
    check(api->open(&o, &model, &error));
  }
  ~Model() { api->close(model); }
  void check(gptx_cuda_status status) {
    if (status == GPTX_CUDA_OK) return;
    std::fprintf(stderr, "status %d: %s\n", status, error.message);
    failed = true;
  }
  // Logits of the last `n` of tokens[position .. end], with others in the step. The greedy tokens must be their arg-max.
  std::vector<float> logits(const std::vector<int32_t>& tokens, uint64_t position, uint64_t end, uint64_t n,
                            const std::vector<int32_t>& blocks, uint64_t others = 0) {
    std::vector<gptx_cuda_part> parts;
    const std::vector<int32_t> company = {5, 6, 7, 8, 9, 10, 11, 12, 13};
    const std::vector<int32_t> company_block = {39};
    for (uint64_t i = 0; i < others; ++i) parts.push_back({company.data(), 1 + i % 9, 0, company_block.data(), 1, 0});
    parts.push_back({tokens.data() + position, end - position, position, blocks.data(), blocks.size(), n});
    std::vector<gptx_cuda_sample> samples;
    for (uint64_t i = 0; i < n; ++i) samples.push_back({i, end, 1, 1.0, 0.0, 1.0, 0.0, 0, nullptr, 0, nullptr, 0});
    const gptx_cuda_step step{parts.data(), parts.size(), samples.data(), n, 1};
    std::vector<int32_t> greedy(n);
    check(api->run(model, &step, greedy.data(), &error));
    std::vector<float> out(n * kVocab);
    for (uint64_t i = 0; i < n; ++i) {
      float* const row = out.data() + i * kVocab;
      check(api->logits(model, i, row, &error));
      if (std::max_element(row, row + kVocab) - row != greedy[i]) {
        std::fprintf(stderr, "token %d is not the arg-max\n", greedy[i]);
        failed = true;
      }
    }
    return out;
  }
};

bool same(const std::vector<float>& a, const float* b) { return std::memcmp(a.data(), b, a.size() * 4) == 0; }

bool check_mode(const Weights& weights, int precision, int kv_type) {
  Model m(weights, precision, kv_type);
  std::vector<int32_t> tokens(150);
  std::mt19937 random(3);
  for (int32_t& t : tokens) t = static_cast<int32_t>(random() % kVocab);
  const std::vector<int32_t> one = {3, 1, 7}, two = {30, 9, 12};
  bool good = true;
  const auto expect = [&](bool equal, const char* what, uint64_t at) {
    if (!equal) std::fprintf(stderr, "precision %d, cache %d: %s differs at %lu\n", precision, kv_type, what, at);
    good = good && equal;
  };

  m.logits(tokens, 0, 86, 0, one);  // in a piece of many rows
  const std::vector<float> whole = m.logits(tokens, 86, 150, 64, one);
  for (const uint64_t chunk : {1, 9, 40}) {
    m.logits(tokens, 0, 86, 0, two, chunk % 3);
    for (uint64_t at = 86; at < 150; at += chunk) {
      const uint64_t end = at + chunk < 150 ? at + chunk : 150;
      if (chunk == 1 && at > 96) break;
      expect(same(m.logits(tokens, at, end, end - at, two, chunk % 4), &whole[(at - 86) * kVocab]), "a chunk", chunk);
    }
  }

  // Tokens of several steps at once are those of one at a time.
  const gptx_cuda_sample sample{0, 120, 11, 1.0, 0.9, 0.8, 0.01, 20, nullptr, 0, nullptr, 0};
  std::vector<int32_t> ahead(4), single;
  m.logits(tokens, 0, 119, 0, one);
  const gptx_cuda_part part{&tokens[119], 1, 119, one.data(), one.size(), 1};
  const gptx_cuda_step step{&part, 1, &sample, 1, 4};
  m.check(m.api->run(m.model, &step, ahead.data(), &m.error));
  int32_t token = tokens[119];
  for (uint64_t i = 0; i < 4; ++i) {
    gptx_cuda_sample next = sample;
    next.position = 120 + i;
    const gptx_cuda_part row{&token, 1, 119 + i, one.data(), one.size(), 1};
    const gptx_cuda_step decode{&row, 1, &next, 1, 1};
    int32_t chosen = -2;
    m.check(m.api->run(m.model, &decode, &chosen, &m.error));
    single.push_back(token = chosen);
  }
  expect(ahead == single, "a step of several tokens", 4);
  return good && !m.failed;
}

// Every filter, from the same logits, on ever new schedules.
bool check_sampling(const Weights& weights) {
  Model m(weights, 0, 0);
  gptx::cpu::Sampler sampler(kVocab, gptx::cpu::kernels_named(""));
  const std::vector<int32_t> blocks = {0, 1, 2}, banned = {3, 50, 82};
  std::vector<int32_t> tokens(20);
  for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<int32_t>(i * 37 % kVocab);
  const std::vector<float> logits = m.logits(tokens, 0, 20, 1, blocks);
  bool good = true;
  for (uint64_t seed = 0; seed < 48; ++seed) {
    gptx::SamplingParams params;
    params.repetition_penalty = seed % 3 == 0 ? 1.5 : 1.0;
    params.temperature = seed % 8 == 7 ? 0.0 : 0.3 + 0.4 * static_cast<double>(seed % 4);
    params.top_k = static_cast<int64_t>(seed % 5 * 7);
    params.top_p = seed % 2 == 0 ? 0.2 + 0.02 * static_cast<double>(seed) : 1.0;
    params.min_p = seed % 7 == 0 ? 0.1 : 0.0;
    params.seed = seed;
    const std::vector<int32_t> no = seed % 4 == 1 ? banned : std::vector<int32_t>();
    std::vector<float> copy = logits;
    gptx::Choice expected;
    sampler.sample(copy,
                   {.logit_row = 0,
                    .position = 20,
                    .prompt = 20,
                    .sequence = tokens,
                    .banned = no,
                    .allowed = {},
                    .params = &params},
                   expected);
    const gptx_cuda_sample sample{0,           20,           seed,          params.repetition_penalty,
                                  params.temperature, params.top_p, params.min_p, params.top_k,
                                  tokens.data(), tokens.size(), no.data(),     no.size()};
    const gptx_cuda_part part{tokens.data(), 20, 0, blocks.data(), blocks.size(), 1};
    const gptx_cuda_step step{&part, 1, &sample, 1, 1};
    int32_t chosen = -2;
    m.check(m.api->run(m.model, &step, &chosen, &m.error));
    if (chosen != expected.token) std::fprintf(stderr, "seed %lu: token %d instead of %d\n", seed, chosen, expected.token);
    good = good && chosen == expected.token;
  }
  return good && !m.failed;
}

}  // namespace

int main() {
  bool good = check_sampling(Weights(0));
  struct Mode {
    int dtype, precision, kv_type;
  };
  // Every precision, and every cache.
  for (const Mode mode : {Mode{0, 0, 0}, Mode{1, 1, 1}, Mode{2, 2, 2}, Mode{2, 3, 1}, Mode{2, 0, 1}, Mode{1, 1, 2}}) {
    good = check_mode(Weights(mode.dtype), mode.precision, mode.kv_type) && good;
  }
  std::puts(good ? "ok" : "failed");
  return good ? 0 : 1;
}
