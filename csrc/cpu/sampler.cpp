#include "cpu/sampler.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>

#include "core/philox.h"
#include "cpu/logit_scan.h"
#include "cpu/logprobs.h"

namespace gptx::cpu {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();
constexpr int32_t kBreaker = -1;  // among lengths of repetitions

// A changed logit, rounded once; what overflows stays comparable.
float rounded(double logit) {
  constexpr double kLargest = std::numeric_limits<float>::max();
  return logit < -kLargest ? kNever : static_cast<float>(std::min(logit, kLargest));
}

void ban(std::span<float> logits, int32_t id) { logits[static_cast<size_t>(id)] = kNever; }

// Tokens that would complete an n-gram of the sequence again.
void ban_repeated_ngrams(std::span<float> logits, std::span<const int32_t> sequence, size_t n) {
  if (sequence.size() < n) return;
  const std::span<const int32_t> prefix = sequence.last(n - 1);
  for (size_t end = n - 1; end < sequence.size(); ++end) {
    if (std::ranges::equal(prefix, sequence.subspan(end - prefix.size(), prefix.size()))) ban(logits, sequence[end]);
  }
}

// The last token of a word where the sequence ends with those before it.
void ban_words(std::span<float> logits, std::span<const int32_t> sequence,
               const std::vector<std::vector<int32_t>>& words) {
  for (const std::span<const int32_t> word : words) {
    if (word.empty() || word.size() - 1 > sequence.size()) continue;
    const std::span<const int32_t> prefix = word.first(word.size() - 1);
    if (std::ranges::equal(prefix, sequence.last(prefix.size()))) ban(logits, word.back());
  }
}

void ban_all_but(std::span<float> logits, std::span<const uint32_t> allowed) {
  for (size_t begin = 0; begin < logits.size(); begin += 32) {
    const std::span<float> part = logits.subspan(begin, std::min<size_t>(32, logits.size() - begin));
    uint32_t not_allowed = ~allowed[begin / 32];
    if (not_allowed == ~0u) {
      std::ranges::fill(part, kNever);
      continue;
    }
    for (; not_allowed != 0; not_allowed &= not_allowed - 1) {
      const auto i = static_cast<size_t>(std::countr_zero(not_allowed));
      if (i < part.size()) part[i] = kNever;
    }
  }
}

// The sum of f(x) over the logits that are not banned.
template <class F>
double sum_of_allowed(std::span<const float> logits, F f) {
  double lanes[kScanLanes] = {};
  const auto add = [&](size_t lane, float x) { lanes[lane] += x == kNever ? 0.0 : f(static_cast<double>(x)); };
  const size_t whole = logits.size() / kScanLanes * kScanLanes;
  for (size_t i = 0; i < whole; i += kScanLanes) {
    for (size_t j = 0; j < kScanLanes; ++j) add(j, logits[i + j]);
  }
  for (size_t i = whole; i < logits.size(); ++i) add(0, logits[i]);
  double sum = 0;
  for (const double lane : lanes) sum += lane;
  return sum;
}

// The population's standard deviation of the logits that are not banned.
double standard_deviation(std::span<const float> logits) {
  const double count = sum_of_allowed(logits, [](double) { return 1.0; });
  const double mean = sum_of_allowed(logits, [](double x) { return x; }) / count;
  return std::sqrt(sum_of_allowed(logits, [&](double x) { return (x - mean) * (x - mean); }) / count);
}

// e^x for x <= 0 within one unit in the last place, 0 below -708. The algorithm is that of fdlibm; without branches
// a compiler vectorizes it.
inline double exp_of_negative(double x) {
  const double clamped = x < -708.0 ? -708.0 : x;
  const double t = clamped * 1.44269504088896338700e+00 + 0x1.8p52;  // the sum's low bits hold round(x / ln 2)
  const double n = t - 0x1.8p52;
  const double high = clamped - n * 6.93147180369123816490e-01;
  const double low = n * 1.90821492927058770002e-10;
  const double r = high - low;
  const double s = r * r;
  const double c = r - s * (1.66666666666666019037e-01 +
                            s * (-2.77777777770155933842e-03 +
                                 s * (6.61375632143793436117e-05 +
                                      s * (-1.65339022054652515390e-06 + s * 4.13813679705723846039e-08))));
  const double y = 1.0 - ((low - (r * c) / (2.0 - c)) - high);
  const double scaled = std::bit_cast<double>(std::bit_cast<uint64_t>(y) + (std::bit_cast<uint64_t>(t) << 52));
  return x < -708.0 ? 0.0 : scaled;
}

// Makes exponents their exponentials and returns the sum of these.
double exponentials(std::span<double> block) {
  for (double& x : block) x = exp_of_negative(x);
  constexpr size_t kSums = 8;  // that do not wait for each other
  double sums[kSums] = {};
  const size_t whole = block.size() / kSums * kSums;
  for (size_t i = 0; i < whole; i += kSums) {
    for (size_t j = 0; j < kSums; ++j) sums[j] += block[i + j];
  }
  for (size_t i = whole; i < block.size(); ++i) sums[0] += block[i];
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

}  // namespace

Sampler::Sampler(size_t vocab_size, const KernelTable& kernels) : kernels_(&kernels), counts_(vocab_size, 0) {
  raw_.reserve(vocab_size);
  heap_.reserve(vocab_size);
  sums_.reserve(vocab_size / kScanBlock + 1);
  candidates_.reserve(vocab_size);
  ranked_.reserve(vocab_size);
}

void Sampler::sample(std::span<float> logits, const SampleTask& task, Choice& out) noexcept {
  out.token = kNoToken;
  out.logprob = std::numeric_limits<float>::quiet_NaN();
  out.top.clear();
  if (!all_finite(logits)) return;
  if (task.params->logprobs < 0) {
    out.token = choose(logits, task);
    return;
  }
  const double sum = log_sum_exp(*kernels_, logits);
  top_logprobs(logits, sum, static_cast<size_t>(task.params->logprobs), out.top);
  raw_.assign(logits.begin(), logits.end());
  out.token = choose(logits, task);
  out.logprob = static_cast<float>(raw_[static_cast<size_t>(out.token)] - sum);
}

void Sampler::candidates(std::span<const float> logits, std::span<float> given, const SampleTask& task, size_t n,
                         Candidates& out) {
  out = {};
  out.finite = all_finite(logits);
  if (!out.finite) return;
  const double sum = log_sum_exp(*kernels_, logits);
  if (task.params->logprobs > 0) {
    out.top.reserve(static_cast<size_t>(task.params->logprobs));
    top_logprobs(logits, sum, static_cast<size_t>(task.params->logprobs), out.top);
  }
  const auto logprob = [&](size_t id) { return static_cast<float>(logits[id] - sum); };
  if (task.forced != kNoToken) {
    out.best.push_back({task.forced, 0.0f, logprob(static_cast<size_t>(task.forced))});
    return;
  }
  std::span<float> scores = given;
  if (given.empty()) {
    raw_.resize(logits.size());
    for (size_t i = 0; i < logits.size(); ++i) raw_[i] = logprob(i);
    scores = raw_;
  }
  adjust(scores, task);
  if (!given.empty()) {
    const float top = maximum(scores);
    if (top != kNever) out.log_sum = top + std::log(kernels_->sum_exp(scores.data(), scores.size(), top));
  }
  const float least = n < scores.size() ? kth_largest(scores, n) : kNever;
  for_each_in_blocks(
      scores, [&](float largest) { return largest >= least && largest != kNever; },
      [&](size_t i) {
        if (scores[i] < least || scores[i] == kNever) return;
        out.best.push_back({static_cast<int32_t>(i), scores[i], logprob(i)});
      });
  std::ranges::stable_sort(out.best, std::ranges::greater(), &gptx::Candidate::score);
  if (out.best.size() > n) out.best.resize(n);  // ties with the last one
}

int32_t Sampler::choose(std::span<float> logits, const SampleTask& task) {
  const SamplingParams& params = *task.params;
  if (task.forced != kNoToken) return task.forced;
  adjust(logits, task);
  if (params.temperature == 0.0) return argmax(logits);

  const auto k = static_cast<size_t>(params.top_k);
  const bool some = params.top_k > 0 && k < logits.size();
  double least = some ? kth_largest(logits, k) : kNever;
  const float top = some ? *std::ranges::max_element(heap_) : maximum(logits);
  if (top == kNever) return 0;  // everything is banned
  // Temperature scales logits and their deviation alike, so it makes no difference to n sigma.
  if (params.top_n_sigma > 0.0) least = std::max(least, top - params.top_n_sigma * standard_deviation(logits));

  const Scale scale{.top = top, .temperature = params.temperature};
  const double u = philox_uniform(params.seed, task.position);
  const bool nucleus = params.top_p < 1.0, all = least == kNever;
  double total = 0;
  if (all && (nucleus || (params.min_p == 0.0 && params.typical_p == 1.0))) {
    // Of all tokens only the sums of their weights are kept: candidates are those that a filter might keep.
    total = weigh_all(logits, scale);
    if (!nucleus) return draw_from_all(logits, scale, u * total);
    // Tokens with less weight than this sum to less than 1 - top_p.
    least = scale.least_logit((1.0 - params.top_p) * total / static_cast<double>(logits.size()));
  } else if (all && params.min_p > 0.0) {
    least = scale.least_logit(params.min_p);
  }
  keep_from(logits, least);
  const double kept = weigh(scale);
  if (nucleus) keep_top_p(params.top_p * (all ? total : kept));
  // The most likely token has the weight exp(0), so min_p is a share of 1.
  if (params.min_p > 0.0) std::erase_if(candidates_, [&](const Candidate& c) { return c.p < params.min_p; });
  if (params.typical_p < 1.0) keep_typical(params.typical_p, scale);
  return draw(u);
}

void Sampler::adjust(std::span<float> logits, const SampleTask& task) {
  const SamplingParams& params = *task.params;
  for (const std::span<const TokenBias> biases : {std::span(params.logit_bias), task.bias}) {
    for (const TokenBias& b : biases) {
      float& logit = logits[static_cast<size_t>(b.token)];
      logit = rounded(static_cast<double>(logit) + b.bias);
    }
  }
  if (params.repetition_penalty != 1.0) penalize_sequence(logits, task.sequence, params.repetition_penalty);
  if (params.presence_penalty != 0.0 || params.frequency_penalty != 0.0) {
    penalize_generated(logits, task.sequence.subspan(task.prompt), params);
  }
  if (params.dry_multiplier != 0.0) penalize_repetition(logits, task.sequence, params);
  if (params.no_repeat_ngram_size > 0) {
    ban_repeated_ngrams(logits, task.sequence, static_cast<size_t>(params.no_repeat_ngram_size));
  }
  ban_words(logits, task.sequence, params.bad_words);
  for (const int32_t id : task.banned) ban(logits, id);
  if (!task.allowed.empty()) ban_all_but(logits, task.allowed);
}

void Sampler::penalize_sequence(std::span<float> logits, std::span<const int32_t> sequence, double penalty) {
  for (const int32_t token : sequence) {
    const auto id = static_cast<size_t>(token);
    if (counts_[id] > 0) continue;
    counts_[id] = 1;
    const double logit = logits[id];
    logits[id] = rounded(logit > 0 ? logit / penalty : logit * penalty);
  }
  for (const int32_t token : sequence) counts_[static_cast<size_t>(token)] = 0;
}

void Sampler::penalize_generated(std::span<float> logits, std::span<const int32_t> generated,
                                 const SamplingParams& params) {
  for (const int32_t token : generated) ++counts_[static_cast<size_t>(token)];
  for (const int32_t token : generated) {
    const auto id = static_cast<size_t>(token);
    if (counts_[id] == 0) continue;
    logits[id] = rounded(logits[id] - (params.presence_penalty + params.frequency_penalty * counts_[id]));
    counts_[id] = 0;
  }
}

// For every token, counts_ becomes the length of the longest earlier part that it followed and that equals the end of
// the sequence.
void Sampler::penalize_repetition(std::span<float> logits, std::span<const int32_t> sequence,
                                  const SamplingParams& params) {
  const size_t n =
      params.dry_range > 0 ? std::min(sequence.size(), static_cast<size_t>(params.dry_range)) : sequence.size();
  const int32_t* const tokens = sequence.last(n).data();
  const auto length_at = [&](size_t i) -> int32_t& { return counts_[static_cast<size_t>(tokens[i])]; };
  for (const int32_t token : params.dry_breakers) counts_[static_cast<size_t>(token)] = kBreaker;
  size_t reach = 0;  // tokens behind the last breaker
  while (reach < n && length_at(n - 1 - reach) != kBreaker) ++reach;
  for (size_t i = 0; i + 1 < n && reach > 0; ++i) {
    int32_t& longest = length_at(i + 1);
    if (longest == kBreaker) continue;
    const size_t most = std::min(reach, i + 1);
    size_t length = 0;
    while (length < most && tokens[i - length] == tokens[n - 1 - length]) ++length;
    longest = std::max(longest, static_cast<int32_t>(length));
  }
  for (size_t i = 0; i < n; ++i) {
    const int32_t length = length_at(i);
    length_at(i) = 0;
    if (length < 1 || length < params.dry_allowed_length) continue;
    const auto excess = static_cast<double>(length - params.dry_allowed_length);
    float& logit = logits[static_cast<size_t>(tokens[i])];
    logit = rounded(logit - params.dry_multiplier * std::pow(params.dry_base, excess));
  }
  for (const int32_t token : params.dry_breakers) counts_[static_cast<size_t>(token)] = 0;
}

float Sampler::kth_largest(std::span<const float> logits, size_t k) {
  // The k largest so far, the least of them in front.
  heap_.assign(logits.begin(), logits.begin() + static_cast<ptrdiff_t>(k));
  std::make_heap(heap_.begin(), heap_.end(), std::greater<>());
  const std::span<const float> rest = logits.subspan(k);
  for_each_in_blocks(
      rest, [&](float largest) { return largest > heap_.front(); },
      [&](size_t i) {
        if (rest[i] <= heap_.front()) return;
        std::pop_heap(heap_.begin(), heap_.end(), std::greater<>());
        heap_.back() = rest[i];
        std::push_heap(heap_.begin(), heap_.end(), std::greater<>());
      });
  return heap_.front();
}

// The sum of the weights of all logits.
double Sampler::weigh_all(std::span<const float> logits, const Scale& scale) {
  sums_.clear();
  double total = 0;
  double p[kScanBlock];
  for (size_t begin = 0; begin < logits.size(); begin += kScanBlock) {
    const size_t n = std::min(kScanBlock, logits.size() - begin);
    for (size_t i = 0; i < n; ++i) p[i] = scale.exponent(logits[begin + i]);
    sums_.push_back(exponentials(std::span(p, n)));
    total += sums_.back();
  }
  return total;
}

// The first token at which the sum of the weights exceeds `rest`.
int32_t Sampler::draw_from_all(std::span<const float> logits, const Scale& scale, double rest) const {
  size_t block = 0;
  while (block + 1 < sums_.size() && rest >= sums_[block]) rest -= sums_[block++];
  for (size_t i = block * kScanBlock; i < logits.size(); ++i) {
    rest -= exp_of_negative(scale.exponent(logits[i]));
    if (rest < 0) return static_cast<int32_t>(i);
  }
  size_t last = logits.size() - 1;  // the sums were rounded
  while (logits[last] == kNever) --last;
  return static_cast<int32_t>(last);
}

// Leaves the tokens whose logit is at least `least`, ties included, in the order of their ids.
void Sampler::keep_from(std::span<const float> logits, double least) {
  candidates_.clear();
  for_each_in_blocks(
      logits, [&](float largest) { return largest >= least; },
      [&](size_t i) {
        if (logits[i] >= least && logits[i] != kNever) candidates_.push_back({static_cast<int32_t>(i), logits[i], 0.0});
      });
}

// Gives the candidates their weights and returns the sum of these.
double Sampler::weigh(const Scale& scale) {
  double total = 0;
  double p[kScanBlock];
  for (size_t begin = 0; begin < candidates_.size(); begin += kScanBlock) {
    const size_t n = std::min(kScanBlock, candidates_.size() - begin);
    const std::span<Candidate> block = std::span(candidates_).subspan(begin, n);
    for (size_t i = 0; i < n; ++i) p[i] = scale.exponent(block[i].logit);
    total += exponentials(std::span(p, n));
    for (size_t i = 0; i < n; ++i) block[i].p = p[i];
  }
  return total;
}

// Leaves the fewest most likely tokens whose weights reach `target`, at least one; ties to the lowest ids.
void Sampler::keep_top_p(double target) {
  ranked_.clear();
  for (const Candidate& c : candidates_) ranked_.push_back({-c.p, c.p, c.id});
  const Ranked last = last_to_reach(target);
  std::erase_if(candidates_, [&](const Candidate& c) { return c.p < last.p || (c.p == last.p && c.id > last.id); });
}

// Leaves the tokens whose surprise is nearest to the entropy and whose probabilities reach typical_p, with the ties of
// the last of them.
void Sampler::keep_typical(double typical_p, const Scale& scale) {
  double total = 0, entropy = 0;
  for (const Candidate& c : candidates_) total += c.p;
  const double log_total = std::log(total);
  for (const Candidate& c : candidates_) {
    if (c.p > 0) entropy += c.p / total * (log_total - scale.exponent(c.logit));
  }
  const auto distance = [&](const Candidate& c) {
    return std::abs(log_total - scale.exponent(c.logit) - entropy);
  };
  ranked_.clear();
  for (const Candidate& c : candidates_) ranked_.push_back({distance(c), c.p, c.id});
  const double farthest = last_to_reach(typical_p * total).key;
  std::erase_if(candidates_, [&](const Candidate& c) { return distance(c) > farthest; });
}

// The last of the fewest ranked candidates that reach the target, or of all; changes their order. Halving takes about
// two passes over them, sorting would take many.
Sampler::Ranked Sampler::last_to_reach(double target) {
  const auto before = [](const Ranked& a, const Ranked& b) { return a.key != b.key ? a.key < b.key : a.id < b.id; };
  auto begin = ranked_.begin(), end = ranked_.end();
  while (end - begin > 1) {
    const auto middle = begin + (end - begin) / 2;
    std::nth_element(begin, middle, end, before);
    double sum = 0;
    for (auto r = begin; r != middle; ++r) sum += r->p;
    if (sum >= target) {
      end = middle;
    } else {
      target -= sum;
      begin = middle;
    }
  }
  return *begin;
}

int32_t Sampler::draw(double u) const {
  double total = 0;
  for (const Candidate& c : candidates_) total += c.p;
  double rest = u * total;
  for (const Candidate& c : candidates_) {
    rest -= c.p;
    if (rest < 0) return c.id;
  }
  return candidates_.back().id;
}

}  // namespace gptx::cpu
