// libgptx_cuda on the emulator, driven through its C interface: for every precision and cache the logits of a
// sequence are the same bits in one piece, in chunks, token by token and in company, whatever memory holds that they do
// not see; and the tokens that it draws are those of the CPU's sampler. Run under the sanitizers.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
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
constexpr int32_t kBlocks = 40;

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
  uint64_t kv_block_bytes = 0;
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
    o.kv_blocks = kBlocks;
    o.rows = 256;
    o.logit_rows = kLogitRows;
    o.steps_ahead = 4;
    check(api->open(&o, &model, &error));
    if (failed) std::exit(1);
    kv_block_bytes = api->kv_block_bytes(&o);
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
    for (uint64_t i = 0; i < others; ++i) parts.push_back({company.data(), 1 + i % 9, 0, company_block.data(), 1, 0, 1});
    parts.push_back({tokens.data() + position, end - position, position, blocks.data(), blocks.size(), n, 1});
    std::vector<gptx_cuda_sample> samples;
    for (uint64_t i = 0; i < n; ++i) samples.push_back({i, end, 1, 1.0, 0.0, 1.0, 0.0, 0, nullptr, 0, nullptr, 0});
    const gptx_cuda_step step{parts.data(), parts.size(), samples.data(), n, 1, 0};
    std::vector<int32_t> greedy(n);
    check(api->run(model, &step, greedy.data(), &error));
    std::vector<float> out(n * kVocab);
    for (uint64_t i = 0; i < n; ++i) {
      float* const row = out.data() + i * kVocab;
      float* from = nullptr;
      check(api->logits(model, &i, 1, &from, &error));
      std::copy_n(from, kVocab, row);
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

  // The random products of the start have the same bits by warps and by warpgroups, whoever runs when.
  expect(std::string(m.api->multiplier(m.model)) == (precision == 0 ? "mma" : "wgmma"), "a product of warpgroups", 0);

  m.logits(tokens, 0, 86, 0, one);  // in a piece of many rows
  const std::vector<float> whole = m.logits(tokens, 86, 150, 64, one);
  // From here on nothing but what a sequence wrote itself is a number.
  for (int32_t block = 0; block < kBlocks; ++block) m.check(m.api->poison_block(m.model, block, &m.error));
  m.logits(tokens, 0, 86, 0, one);
  expect(same(m.logits(tokens, 86, 150, 64, one), whole.data()), "poisoned memory", 86);
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
  const gptx_cuda_part part{&tokens[119], 1, 119, one.data(), one.size(), 1, 1};
  const gptx_cuda_step step{&part, 1, &sample, 1, 4, 0};
  m.check(m.api->run(m.model, &step, ahead.data(), &m.error));
  int32_t token = tokens[119];
  for (uint64_t i = 0; i < 4; ++i) {
    gptx_cuda_sample next = sample;
    next.position = 120 + i;
    const gptx_cuda_part row{&token, 1, 119 + i, one.data(), one.size(), 1, 1};
    const gptx_cuda_step decode{&row, 1, &next, 1, 1, 0};
    int32_t chosen = -2;
    m.check(m.api->run(m.model, &decode, &chosen, &m.error));
    single.push_back(token = chosen);
  }
  expect(ahead == single, "a step of several tokens", 4);

  // A block goes to another place, on the device and by way of the host.
  const uint64_t block_bytes = m.kv_block_bytes;
  std::vector<char> bytes(block_bytes);
  m.logits(tokens, 0, 100, 0, one);
  m.check(m.api->copy_block(m.model, one[0], 20, &m.error));
  m.check(m.api->read_block(m.model, one[1], bytes.data(), &m.error));
  m.check(m.api->write_block(m.model, 21, bytes.data(), &m.error));
  m.check(m.api->poison_block(m.model, one[0], &m.error));
  m.check(m.api->poison_block(m.model, one[1], &m.error));
  m.check(m.api->read_block(m.model, one[1], bytes.data(), &m.error));
  expect(std::count(bytes.begin(), bytes.end(), '\xff') == static_cast<int64_t>(block_bytes), "a poisoned block", 0);
  m.logits(tokens, 100, 101, 0, {20, 21}, 2);
  expect(same(m.logits(tokens, 101, 110, 9, {20, 21}), &whole[15 * kVocab]), "a moved block", 101);

  // Two rows that share a block: which of them have a token chosen, and in which order, changes none.
  const std::vector<int32_t> left = {20, 21}, right = {20, 30};
  m.logits(tokens, 64, 80, 0, right);
  const gptx_cuda_part pair[] = {{&tokens[110], 1, 110, left.data(), left.size(), 1, 1},
                                 {&tokens[80], 1, 80, right.data(), right.size(), 1, 1}};
  gptx_cuda_sample samples[] = {sample, sample};
  samples[1].logit_row = 1;
  samples[1].seed = 12;
  const auto choose = [&](std::vector<gptx_cuda_sample> some) {
    const gptx_cuda_step decode{pair, 2, some.data(), some.size(), 1, 0};
    std::vector<int32_t> chosen(some.size(), -2);
    m.check(m.api->run(m.model, &decode, chosen.data(), &m.error));
    return chosen;
  };
  const std::vector<int32_t> both = choose({samples[0], samples[1]});
  expect(choose({samples[1], samples[0]}) == std::vector{both[1], both[0]}, "samples in another order", 2);
  expect(choose({samples[1]}) == std::vector{both[1]}, "a sample of the second row", 1);
  samples[1].repetition_penalty = 1.5;
  samples[1].sequence = tokens.data();
  samples[1].n_sequence = 80;
  choose({samples[1]});
  const uint64_t rows[] = {1, 0};
  float* both_rows = nullptr;
  m.check(m.api->logits(m.model, rows, 2, &both_rows, &m.error));
  const std::vector<float> row(both_rows + kVocab, both_rows + 2 * kVocab);
  expect(same(row, &whole[24 * kVocab]), "a row without a sample", 110);
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
    const gptx_cuda_part part{tokens.data(), 20, 0, blocks.data(), blocks.size(), 1, 1};
    const gptx_cuda_step step{&part, 1, &sample, 1, 1, 0};
    int32_t chosen = -2;
    m.check(m.api->run(m.model, &step, &chosen, &m.error));
    if (chosen != expected.token) std::fprintf(stderr, "seed %lu: token %d instead of %d\n", seed, chosen, expected.token);
    good = good && chosen == expected.token;
  }
  return good && !m.failed;
}

// The hidden state, multiplied by the head here, is the logits.
bool check_hidden(const Weights& weights) {
  Model m(weights, 0, 0);
  std::vector<int32_t> tokens(30);
  for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<int32_t>(i * 31 % kVocab);
  const std::vector<char>& bytes = weights.data.back();
  std::vector<float> wte(bytes.size() / 4), hidden(kEmbd);
  std::memcpy(wte.data(), bytes.data(), bytes.size());
  bool good = true;
  for (const uint64_t n : {uint64_t{30}, uint64_t{4}}) {  // with every row in the last layer, and with few
    const std::vector<float> logits = m.logits(tokens, 0, 30, n, {4});
    for (uint64_t i = 0; i < n; ++i) {
      m.check(m.api->hidden(m.model, i, hidden.data(), &m.error));
      for (uint64_t v = 0; v < kVocab; ++v) {
        double sum = 0;
        for (uint64_t k = 0; k < kEmbd; ++k) sum += double{hidden[k]} * double{wte[(v / 16 * kEmbd + k) * 16 + v % 16]};
        good = good && std::abs(sum - double{logits[i * kVocab + v]}) < 1e-5;
      }
    }
  }
  if (!good) std::fprintf(stderr, "a hidden state is not what the head multiplies\n");
  return good && !m.failed;
}

}  // namespace

int main() {
  bool good = check_sampling(Weights(0));
  good = check_hidden(Weights(0)) && good;
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
