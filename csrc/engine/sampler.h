// From logits to a token: penalties, filters, then one draw from the counter RNG.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

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

class Sampler {
 public:
  explicit Sampler(size_t vocab_size) : seen_(vocab_size, false) {}

  // The token at `position` of a sequence. `logits` [V] may be changed; `banned` ids are never
  // chosen. Returns -1 if a logit is not finite.
  int32_t sample(std::span<float> logits, std::span<const int32_t> sequence,
                 std::span<const int32_t> banned, const SamplingParams& params, uint64_t position);

 private:
  struct Candidate {
    int32_t id;
    float logit;
    double p;
  };

  void penalize(std::span<float> logits, std::span<const int32_t> sequence, double penalty);
  void keep_top_k(std::span<const float> logits, size_t k);
  void keep_top_p(double top_p);
  int32_t draw(double u) const;

  std::vector<bool> seen_;
  std::vector<float> heap_;
  std::vector<Candidate> candidates_;
};

}  // namespace gptx
