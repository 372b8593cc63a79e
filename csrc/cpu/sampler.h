// From logits to a token: penalties, filters, then one draw from the counter RNG.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/sampling.h"

namespace gptx::cpu {

class Sampler {
 public:
  explicit Sampler(size_t vocab_size) : seen_(vocab_size, false) {}

  // The token for a task. `logits` [V] may be changed.
  int32_t sample(std::span<float> logits, const SampleTask& task);

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

}  // namespace gptx::cpu
