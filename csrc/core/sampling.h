// How a token is chosen from logits, on every backend.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace gptx {

// Ranges are checked by gptx/sampling.py. The filters act in the order of the fields and are those of
// transformers' logits processors of the same names.
struct SamplingParams {
  double repetition_penalty = 1.0;  // of every token of the sequence (Keskar et al., 2019)
  double temperature = 1.0;         // 0: the most likely token, ties to the lowest id
  int64_t top_k = 0;                // 0: all
  double top_p = 1.0;               // nucleus (Holtzman et al., 2020)
  double min_p = 0.0;               // share of the largest probability
  uint64_t seed = 0;
};

// One token to choose.
struct SampleTask {
  size_t logit_row;                   // which of the step's logits
  uint64_t position;                  // of the token in its sequence
  std::span<const int32_t> sequence;  // prompt and what was generated
  std::span<const int32_t> banned;    // ids that are never chosen
  SamplingParams params;
};

// Stands for a token where a logit is not finite.
inline constexpr int32_t kNoToken = -1;

}  // namespace gptx
