#include "cpu/logprobs.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "cpu/logit_scan.h"

namespace gptx::cpu {

double log_sum_exp(const KernelTable& kernels, std::span<const float> logits) noexcept {
  if (!all_finite(logits)) return std::numeric_limits<double>::quiet_NaN();
  const float top = maximum(logits);
  return top + std::log(kernels.sum_exp(logits.data(), logits.size(), top));
}

void top_logprobs(std::span<const float> logits, double log_sum_exp, size_t n,
                  std::vector<TokenLogprob>& out) noexcept {
  out.clear();
  n = std::min(n, logits.size());
  if (n == 0) return;
  // The n best so far as a heap, the worst of them in front; logits until all are found.
  const auto better = [](const TokenLogprob& a, const TokenLogprob& b) {
    return a.logprob != b.logprob ? a.logprob > b.logprob : a.token < b.token;
  };
  for (size_t i = 0; i < n; ++i) out.push_back({static_cast<int32_t>(i), logits[i]});
  std::make_heap(out.begin(), out.end(), better);
  const std::span<const float> rest = logits.subspan(n);
  for_each_in_blocks(
      rest, [&](float largest) { return largest > out.front().logprob; },
      [&](size_t i) {
        if (rest[i] <= out.front().logprob) return;  // a tie has the higher id
        std::pop_heap(out.begin(), out.end(), better);
        out.back() = {static_cast<int32_t>(n + i), rest[i]};
        std::push_heap(out.begin(), out.end(), better);
      });
  std::sort_heap(out.begin(), out.end(), better);
  for (TokenLogprob& t : out) t.logprob = static_cast<float>(t.logprob - log_sum_exp);
}

void score(const KernelTable& kernels, std::span<const float> logits, const ScoreTask& task, Score& out) noexcept {
  out = {.top = std::move(out.top)};
  out.top.clear();
  const double sum = log_sum_exp(kernels, logits);
  if (std::isnan(sum)) return;
  const auto token = static_cast<size_t>(task.token);
  const float logit = logits[token];
  out.logprob = static_cast<float>(logit - sum);
  for (const float x : logits.first(token)) out.rank += x >= logit;
  for (const float x : logits.subspan(token + 1)) out.rank += x > logit;
  top_logprobs(logits, sum, task.top, out.top);
}

}  // namespace gptx::cpu
