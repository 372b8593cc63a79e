// Log-probabilities of tokens: log softmax(logits)[token].
#pragma once

#include <span>
#include <vector>

#include "core/sampling.h"
#include "cpu/kernel_table.h"

namespace gptx::cpu {

// log(sum of exp(logits)); NaN where one is not finite.
double log_sum_exp(const KernelTable& kernels, std::span<const float> logits) noexcept;

// The n most likely tokens, most likely first, ties to the lowest id. Allocates nothing: `out` has room.
void top_logprobs(std::span<const float> logits, double log_sum_exp, size_t n, std::vector<TokenLogprob>& out) noexcept;

// What a ScoreTask asks of its row. Allocates nothing: `out.top` has room.
void score(const KernelTable& kernels, std::span<const float> logits, const ScoreTask& task, Score& out) noexcept;

}  // namespace gptx::cpu
