#include "cpu/logprobs.h"

#include <algorithm>
#include <cmath>

namespace gptx::cpu {

double log_sum_exp(const KernelTable&, std::span<const float> logits) noexcept {
  const double top = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float x : logits) sum += std::exp(x - top);
  return top + std::log(sum);
}

void top_logprobs(std::span<const float>, double, size_t, std::vector<TokenLogprob>&) noexcept {}

void score(const KernelTable& kernels, std::span<const float> logits, const ScoreTask& task, Score& out) noexcept {
  out.logprob = static_cast<float>(logits[static_cast<size_t>(task.token)] - log_sum_exp(kernels, logits));
}

}  // namespace gptx::cpu
