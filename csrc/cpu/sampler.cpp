#include "cpu/sampler.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "core/philox.h"

namespace gptx::cpu {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();

// Lanes that know no order are what a compiler vectorizes.
constexpr size_t kLanes = 16;

bool all_finite(std::span<const float> logits) {
  float zeros[kLanes] = {};  // 0 * x is NaN for infinity and NaN
  const size_t whole = logits.size() / kLanes * kLanes;
  for (size_t i = 0; i < whole; i += kLanes) {
    for (size_t j = 0; j < kLanes; ++j) zeros[j] += 0.0f * logits[i + j];
  }
  for (size_t i = whole; i < logits.size(); ++i) zeros[0] += 0.0f * logits[i];
  return std::all_of(zeros, zeros + kLanes, [](float x) { return x == 0.0f; });
}

constexpr size_t kBlock = 4 * kLanes;

// The largest of the block of logits that begins at `begin`.
float block_maximum(std::span<const float> logits, size_t begin) {
  const std::span<const float> block =
      logits.subspan(begin, std::min(kBlock, logits.size() - begin));
  if (block.size() < kBlock) return *std::max_element(block.begin(), block.end());
  float lanes[kLanes];
  std::copy_n(block.begin(), kLanes, lanes);
  for (size_t i = kLanes; i < kBlock; i += kLanes) {
    for (size_t j = 0; j < kLanes; ++j) lanes[j] = block[i + j] > lanes[j] ? block[i + j] : lanes[j];
  }
  return *std::max_element(lanes, lanes + kLanes);
}

// Calls f(i) for the logits, in order, of every block whose maximum `wanted` accepts.
template <class Wanted, class F>
void for_each_in_blocks(std::span<const float> logits, Wanted wanted, F f) {
  for (size_t begin = 0; begin < logits.size(); begin += kBlock) {
    if (!wanted(block_maximum(logits, begin))) continue;
    const size_t end = std::min(begin + kBlock, logits.size());
    for (size_t i = begin; i < end; ++i) f(i);
  }
}

// The first of the largest logits.
int32_t argmax(std::span<const float> logits) {
  float best = kNever;
  size_t where = 0;
  for_each_in_blocks(
      logits, [&](float maximum) { return maximum > best; },
      [&](size_t i) {
        if (logits[i] > best) {
          best = logits[i];
          where = i;
        }
      });
  return static_cast<int32_t>(where);
}

}  // namespace

Sampler::Sampler(size_t vocab_size, const KernelTable& kernels) : kernels_(&kernels), counts_(vocab_size, 0) {
  heap_.reserve(vocab_size);
  candidates_.reserve(vocab_size);
}

void Sampler::sample(std::span<float> logits, const SampleTask& task, Choice& out) noexcept {
  out.token = all_finite(logits) ? choose(logits, task) : kNoToken;
}

int32_t Sampler::choose(std::span<float> logits, const SampleTask& task) {
  const SamplingParams& params = *task.params;
  penalize(logits, task);
  for (const int32_t id : task.banned) logits[static_cast<size_t>(id)] = kNever;
  if (params.temperature == 0.0) return argmax(logits);

  const size_t k = params.top_k > 0 ? static_cast<size_t>(params.top_k) : logits.size();
  keep_top_k(logits, std::min(k, logits.size()));
  if (candidates_.empty()) return argmax(logits);  // everything is banned

  double top = kNever;
  for (const Candidate& c : candidates_) top = std::max<double>(top, c.logit);
  for (Candidate& c : candidates_) c.p = std::exp((c.logit - top) / params.temperature);
  if (params.top_p < 1.0) keep_top_p(params.top_p);
  // The most likely token has p = exp(0), so min_p is a share of 1.
  std::erase_if(candidates_, [&](const Candidate& c) { return c.p < params.min_p; });
  return draw(philox_uniform(params.seed, task.position));
}

void Sampler::penalize(std::span<float> logits, const SampleTask& task) {
  const double penalty = task.params->repetition_penalty;
  if (penalty == 1.0) return;
  for (const int32_t token : task.sequence) {
    const auto id = static_cast<size_t>(token);
    if (counts_[id] > 0) continue;
    counts_[id] = 1;
    const double logit = logits[id];
    logits[id] = static_cast<float>(logit > 0 ? logit / penalty : logit * penalty);
  }
  for (const int32_t token : task.sequence) counts_[static_cast<size_t>(token)] = 0;
}

// Leaves the tokens whose logit is at least the k-th largest, in the order of their ids.
void Sampler::keep_top_k(std::span<const float> logits, size_t k) {
  float least = kNever;
  if (k < logits.size()) {
    // The k largest so far, the least of them in front.
    heap_.assign(logits.begin(), logits.begin() + static_cast<ptrdiff_t>(k));
    std::make_heap(heap_.begin(), heap_.end(), std::greater<>());
    const std::span<const float> rest = logits.subspan(k);
    for_each_in_blocks(
        rest, [&](float maximum) { return maximum > heap_.front(); },
        [&](size_t i) {
          if (rest[i] <= heap_.front()) return;
          std::pop_heap(heap_.begin(), heap_.end(), std::greater<>());
          heap_.back() = rest[i];
          std::push_heap(heap_.begin(), heap_.end(), std::greater<>());
        });
    least = heap_.front();
  }
  candidates_.clear();
  for_each_in_blocks(
      logits, [&](float maximum) { return maximum >= least; },
      [&](size_t i) {
        if (logits[i] >= least && logits[i] != kNever) {
          candidates_.push_back({static_cast<int32_t>(i), logits[i], 0.0});
        }
      });
}

// Leaves the fewest most likely tokens whose probabilities reach top_p, at least one.
void Sampler::keep_top_p(double top_p) {
  double total = 0;
  for (const Candidate& c : candidates_) total += c.p;
  // Tokens this unlikely sum to less than 1 - top_p, so they are out without being sorted.
  const double least = (1.0 - top_p) * total / static_cast<double>(candidates_.size());
  std::erase_if(candidates_, [&](const Candidate& c) { return c.p < least; });
  std::sort(candidates_.begin(), candidates_.end(), [](const Candidate& a, const Candidate& b) {
    return a.p != b.p ? a.p > b.p : a.id < b.id;
  });
  double sum = 0;
  size_t kept = 0;
  while (kept < candidates_.size() && (kept == 0 || sum < top_p * total)) {
    sum += candidates_[kept++].p;
  }
  candidates_.resize(kept);
  std::sort(candidates_.begin(), candidates_.end(),
            [](const Candidate& a, const Candidate& b) { return a.id < b.id; });
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
