// From logits to a token: what changes logits, then the filters, then one draw from the counter RNG.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/sampling.h"
#include "cpu/kernel_table.h"

namespace gptx::cpu {

class Sampler {
 public:
  Sampler(size_t vocab_size, const KernelTable& kernels);

  // What it has reserved.
  size_t bytes() const noexcept {
    return counts_.capacity() * sizeof(counts_[0]) + heap_.capacity() * sizeof(heap_[0]) +
           candidates_.capacity() * sizeof(candidates_[0]);
  }

  // Chooses the token of a task; `logits` [V] may be changed. Allocates nothing: `out.top` has room for what
  // params.logprobs asks, and everything else was reserved.
  void sample(std::span<float> logits, const SampleTask& task, Choice& out) noexcept;

 private:
  struct Candidate {
    int32_t id;
    float logit;
    double p;
  };

  int32_t choose(std::span<float> logits, const SampleTask& task);
  void penalize(std::span<float> logits, const SampleTask& task);
  void keep_top_k(std::span<const float> logits, size_t k);
  void keep_top_p(double top_p);
  int32_t draw(double u) const;

  const KernelTable* kernels_;
  std::vector<int32_t> counts_;  // [V], zeros between calls
  std::vector<float> heap_;
  std::vector<Candidate> candidates_;
};

}  // namespace gptx::cpu
